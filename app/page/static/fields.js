/** Fields of a form, made of the JSON schema of what they set. */

import { h, prose, words } from "./dom.js";

const LONG_TEXT = 500;
let count = 0;

/**
 * A field: its element, what was chosen (undefined where nothing is set, so that the server's default holds), the field
 * inside it of that name, and what says that it is wrong.
 * @typedef {{node: Element, read: () => any, child: (name: string) => Field|undefined, fail: (message: string) => void}} Field
 */

/**
 * Returns the field of a schema.
 * @param {string} name
 * @param {Object} schema
 * @param {{root: Object, required?: boolean, value?: any, choices?: (name: string, schema: Object) => {value: string, text: string}[]|null}} options
 *   `root` holds the `$defs` of the schema, `value` is what it begins with, and `choices` are known values of a text
 * @returns {Field}
 */
export function makeField(name, schema, options) {
  const whole = resolve(schema, options.root);
  const given = options.value ?? whole.default;
  const some = { ...options, given, hint: whole.description ?? "" };
  const forms = (whole.anyOf ?? []).map((form) => resolve(form, options.root)).filter((form) => form.type !== "null");
  if (forms.length > 1) return oneOfForms(name, forms, some);
  if (forms.length === 1) {
    const form = { ...forms[0], default: whole.default, description: whole.description ?? forms[0].description };
    return isScalar(form) ? scalar(name, form, { ...some, nullable: true }) : optional(name, form, some);
  }
  if (whole.oneOf) return kinds(name, whole.oneOf.map((form) => resolve(form, options.root)), some);
  if (whole.properties) return group(name, whole, some);
  if (whole.type === "array") return list(name, whole, some);
  return isScalar(whole) ? scalar(name, whole, some) : written(name, whole, some);
}

function resolve(schema, root) {
  if (!schema.$ref) return schema;
  const { $ref, ...more } = schema;
  return { ...root.$defs[$ref.split("/").at(-1)], ...more };
}

const isScalar = (schema) => ["string", "number", "integer", "boolean"].includes(schema.type) || "enum" in schema || "const" in schema;
const isSame = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/** Returns the ids of a field's parts, and the part that says what is wrong with it. */
function parts(hint, control) {
  const id = `field-${++count}`;
  const wrong = h("p", { id: `${id}-wrong`, class: "problem", hidden: true });
  const told = h("p", { id: `${id}-hint`, class: "hint" }, prose(hint));
  const fail = (message) => {
    wrong.hidden = false;
    wrong.textContent = message;
    control?.setAttribute("aria-invalid", "true");
    for (let box = wrong.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  };
  control?.setAttribute("id", id);
  control?.setAttribute("aria-describedby", `${hint ? `${id}-hint ` : ""}${id}-wrong`);
  return { id, wrong, told: hint ? told : null, fail };
}

function boundsOf(schema) {
  const [low, high] = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum];
  const found = [schema.type === "integer" ? "a whole number" : "a number"];
  if (low !== undefined) found.push("minimum" in schema ? `at least ${low}` : `above ${low}`);
  if (high !== undefined) found.push("maximum" in schema ? `at most ${high}` : `below ${high}`);
  return ` Give ${found.join(", ")}.`;
}

function scalar(name, schema, { required, given, hint, nullable, choices }) {
  const isNumber = schema.type === "number" || schema.type === "integer";
  const known = choices?.(name, schema);
  const by = `${hint}${isNumber ? boundsOf(schema) : ""}${nullable && !required ? " Empty: none." : ""}`;
  if (known) return chosenText(name, known, { required, hint: by });
  const values = schema.enum ?? (schema.const === undefined ? null : [schema.const]);
  let control;
  if (values) control = h("select", {}, required || given !== undefined ? null : h("option", { value: "" }, "–"), values.map((one) => h("option", { value: one }, one)));
  else if (schema.type === "boolean") control = h("input", { type: "checkbox" });
  else if (isNumber) control = h("input", { type: "number", step: schema.type === "integer" ? "1" : "any", min: schema.minimum ?? schema.exclusiveMinimum, max: schema.maximum ?? schema.exclusiveMaximum });
  else control = schema.maxLength > LONG_TEXT ? h("textarea", { rows: "3" }) : h("input", { type: "text" });
  if (schema.type === "boolean") control.checked = given === true;
  else if (given !== undefined && given !== null) control.value = String(given);
  const { id, wrong, told, fail } = parts(by, control);
  control.required = Boolean(required) && schema.type !== "boolean";
  const label = h("label", { for: id }, words(name), required ? h("span", { class: "needed" }, " (needed)") : null);
  const node = schema.type === "boolean" ? h("div", { class: "field" }, h("p", {}, control, label), told, wrong) : h("div", { class: "field" }, label, control, told, wrong);
  const read = () => {
    const text = control.value;
    const value = schema.type === "boolean" ? control.checked : text === "" ? (nullable && given !== null && given !== undefined ? null : undefined) : isNumber ? Number(text) : text;
    return isSame(value, schema.default) && !required ? undefined : value;
  };
  return { node, read, child: () => undefined, fail };
}

/** A text that is one of those which are known, or another. */
function chosenText(name, known, { required, hint }) {
  const other = h("input", { type: "text", "aria-label": `${words(name)}, another`, hidden: true });
  const pick = h("select", { onchange: () => (other.hidden = pick.value !== "*") },
    required ? null : h("option", { value: "" }, "–"), known.map(({ value, text }) => h("option", { value }, text)), h("option", { value: "*" }, "another …"));
  const { id, wrong, told, fail } = parts(hint, pick);
  other.hidden = pick.value !== "*"; // where nothing is known
  const node = h("div", { class: "field" }, h("label", { for: id }, words(name), required ? h("span", { class: "needed" }, " (needed)") : null), pick, other, told, wrong);
  return { node, read: () => (pick.value === "*" ? other.value : pick.value) || undefined, child: () => undefined, fail };
}

/** An object: what must be given stands open, and all else is made when somebody looks at it. */
export function group(name, schema, { root, given = {}, required, choices, title = words(name), skip = ["kind"] }) {
  const fields = new Map();
  const rest = [];
  const make = (key) => {
    const value = given?.[key];
    const field = makeField(key, schema.properties[key], { root, value, required: (schema.required ?? []).includes(key), choices });
    fields.set(key, field);
    return field.node;
  };
  const open = h("div", {});
  for (const key of Object.keys(schema.properties).filter((one) => !skip.includes(one))) {
    if ((schema.required ?? []).includes(key)) open.append(make(key));
    else rest.push(key);
  }
  const more = rest.length ? later(`Settings (${rest.length})`, () => rest.map(make)) : null;
  const { wrong, told, fail } = parts(schema.description?.split("\n\n")[0] ?? "", null);
  const node = h("fieldset", {}, h("legend", {}, title), told, wrong, open, more?.node);
  const child = (key) => (rest.includes(key) && more.build(), fields.get(key));
  const read = () => {
    const found = {};
    for (const [key, value] of Object.entries(given ?? {})) if (!fields.has(key) && !skip.includes(key)) found[key] = value;
    for (const [key, field] of fields) {
      const value = field.read();
      if (value !== undefined) found[key] = value;
    }
    return Object.keys(found).length || required ? found : undefined;
  };
  return { node, read, child, fail };
}

function later(text, make) {
  let isMade = false;
  const node = h("details", { class: "more", ontoggle: () => node.open && build() }, h("summary", {}, text));
  function build() {
    if (isMade) return;
    isMade = true;
    node.append(...make());
  }
  return { node, build };
}

/** One of several kinds, each with settings of its own. */
function kinds(name, forms, { root, given, required, choices }) {
  const byKind = new Map(forms.map((form) => [form.properties.kind.const, { schema: form, root }]));
  return chooseKind(name, byKind, { given, required, choices });
}

/**
 * Returns a field that is one of some kinds.
 * @param {string} name
 * @param {Map<string, {schema: Object, root: Object}>} byKind
 * @returns {Field}
 */
export function chooseKind(name, byKind, { given, required, choices, title = words(name) }) {
  const pick = h("select", { onchange: () => change() }, required || given ? null : h("option", { value: "" }, "none"), [...byKind.keys()].map((kind) => h("option", {}, kind)));
  if (given?.kind) pick.value = given.kind;
  const { id, wrong, told, fail } = parts("", pick);
  const inside = h("div", {});
  let field = null;
  function change() {
    const chosen = byKind.get(pick.value);
    field = chosen ? group(pick.value, chosen.schema, { root: chosen.root, given: given?.kind === pick.value ? given : {}, choices, required: true }) : null;
    inside.replaceChildren(...(field ? [field.node] : []));
  }
  change();
  const node = h("div", { class: "field kind" }, h("label", { for: id }, title), pick, told, wrong, inside);
  const child = (key) => (key === "kind" ? { fail, child: () => undefined } : field?.child(key));
  return { node, read: () => (field ? { kind: pick.value, ...field.read() } : undefined), child, fail };
}

/** What may be left out as a whole. */
function optional(name, schema, { root, given, choices, hint }) {
  const box = h("input", { type: "checkbox", onchange: () => change() });
  box.checked = given !== null && given !== undefined;
  const { id, wrong, told, fail } = parts(hint, box);
  const inside = h("div", {});
  let field = null;
  function change() {
    field = box.checked ? makeField(name, { ...schema, description: "", default: undefined }, { root, value: given ?? undefined, required: true, choices }) : null;
    inside.replaceChildren(...(field ? [field.node] : []));
  }
  change();
  const node = h("div", { class: "field" }, h("p", {}, box, h("label", { for: id }, `Set ${words(name)}`)), told, wrong, inside);
  const read = () => {
    const value = field ? field.read() : null;
    return isSame(value, schema.default ?? null) ? undefined : value;
  };
  return { node, read, child: (key) => field?.child(key), fail };
}

/** A value that can be written in several forms. */
function oneOfForms(name, forms, { root, required, choices, hint }) {
  const titles = forms.map((form) => form.title ?? (form.type === "array" ? `a list of ${form.items?.type ?? "value"}s` : form.type ?? "one of several"));
  const pick = h("select", { onchange: () => change() }, required ? null : h("option", { value: "" }, "as it is by default"), titles.map((text, place) => h("option", { value: place }, words(text))));
  const { id, wrong, told, fail } = parts(hint, pick);
  const inside = h("div", {});
  let field = null;
  function change() {
    field = pick.value === "" ? null : makeField(name, forms[pick.value], { root, required: true, choices });
    inside.replaceChildren(...(field ? [field.node] : []));
  }
  change();
  const node = h("div", { class: "field" }, h("label", { for: id }, `${words(name)}, written as`), pick, told, wrong, inside);
  return { node, read: () => field?.read(), child: (key) => field?.child(key), fail: (message) => (field?.fail ?? fail)(message) };
}

/** A list, whose items are added and taken out. */
function list(name, schema, { root, given, required, choices, hint }) {
  const items = [];
  const rows = h("ol", { class: "items" });
  const add = h("button", { type: "button", class: "small", onclick: () => (append(nextOf(schema, items)), items.at(-1).row.querySelector("input, select, textarea")?.focus()) }, `Add to ${words(name)}`);
  const { wrong, told, fail } = parts(hint, null);
  function append(value) {
    const field = makeField(`${name} ${items.length + 1}`, schema.items ?? { type: "string" }, { root, value, required: true, choices });
    const item = { field };
    item.row = h("li", {}, field.node, h("button", { type: "button", class: "small", onclick: () => remove(item), "aria-label": `Take out ${words(name)} ${items.length + 1}` }, "Take out"));
    items.push(item);
    rows.append(item.row);
  }
  function remove(item) {
    items.splice(items.indexOf(item), 1);
    item.row.remove();
    add.focus();
  }
  const begin = given ?? (required && schema.minItems ? [nextOf(schema, items)] : []);
  begin.forEach(append);
  const node = h("fieldset", {}, h("legend", {}, words(name)), told, wrong, rows, add);
  const read = () => {
    const value = items.map(({ field }) => field.read()).filter((one) => one !== undefined);
    return (!value.length && !required) || isSame(value, schema.default) ? undefined : value;
  };
  return { node, read, child: (key) => items[Number(key)]?.field, fail };
}

function nextOf(schema, items) {
  if (!["integer", "number"].includes(schema.items?.type)) return undefined;
  return items.length ? (items.at(-1).field.read() ?? 0) + 1 : (schema.items.minimum ?? 0);
}

/** What has no field of its own, written as JSON. */
function written(name, schema, { given, required, hint }) {
  const control = h("textarea", { rows: "3", spellcheck: "false", required: Boolean(required) });
  const example = schema.examples?.[0];
  if (given !== undefined && given !== null && !isSame(given, {})) control.value = JSON.stringify(given);
  const { id, wrong, told, fail } = parts(`${hint} Written as JSON${example ? `, such as ${JSON.stringify(example)}` : ""}.`, control);
  const node = h("div", { class: "field" }, h("label", { for: id }, words(name)), control, told, wrong);
  const read = () => {
    if (!control.value.trim()) return undefined;
    try {
      return JSON.parse(control.value);
    } catch {
      return control.value; // the server says what is wrong with it
    }
  };
  return { node, read, child: () => undefined, fail };
}

/** Says the server's problems at their fields, and returns those of fields that are not there. */
export function showProblems(form, details) {
  const lost = [];
  for (const { field, message } of details) {
    let found = form;
    const names = field.split(".");
    while (names.length && found.child(names[0])) found = found.child(names.shift());
    if (found === form) lost.push(`${field}: ${message}`);
    else found.fail(names.length ? `${names.join(".")}: ${message}` : message);
  }
  return lost;
}
