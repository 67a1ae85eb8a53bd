/** The shop window: every method that a spec can name. */

import { ask } from "./api.js";
import { h, prose, show, table, words } from "./dom.js";

export const title = "Methods";

export async function render(place, { parts: [family, kind], signal, heading }) {
  const { data } = await ask("methods", { signal });
  const method = data[family]?.find((one) => one.kind === kind);
  if (!method) {
    place.append(...Object.entries(data).map(([name, methods]) => familyOf(name, methods)));
    return;
  }
  heading.textContent = `${words(kind)}, of the ${words(family)}`;
  const [first, ...rest] = method.description.split("\n\n");
  const use = family === "stages" ? h("a", { class: "button", href: `#/new/${kind}` }, "Make a job with it") : null;
  place.append(h("p", {}, h("a", { href: "#/methods" }, "All methods")), h("p", {}, prose(first)), ...rest.map((text) => h("p", {}, prose(text))), ...(use ? [use] : []), settingsOf(method));
}

function familyOf(name, methods) {
  const rows = methods.map((method) => [h("a", { href: `#/methods/${name}/${method.kind}` }, method.kind), prose(method.description.split("\n\n")[0])]);
  return h("section", { "aria-labelledby": `family-${name}` }, h("h2", { id: `family-${name}` }, words(name)), table(`Methods: ${words(name)}`, ["Kind", "What it does"], rows));
}

function settingsOf(method) {
  const settings = Object.entries(method.json_schema.properties).filter(([name]) => name !== "kind");
  if (!settings.length) return h("p", {}, "It has no settings.");
  const rows = settings.map(([name, schema]) => [h("code", {}, name), prose(schema.description ?? ""), method.required.includes(name) ? "needed" : show(textOf(method.defaults[name])), limitsOf(schema)]);
  return h("div", {}, table("Settings", ["Name", "What it is", "Default", "Bounds"], rows),
    h("details", {}, h("summary", {}, "JSON schema"), h("pre", { tabindex: "0" }, JSON.stringify(method.json_schema, null, 1))));
}

const textOf = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : value === null ? "none" : typeof value === "boolean" ? String(value) : value);

function limitsOf(schema) {
  const form = schema.anyOf?.find((one) => one.type !== "null") ?? schema;
  if (form.enum) return form.enum.join(", ");
  const signs = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", exclusiveMaximum: "<", minItems: "items ≥", maxItems: "items ≤", maxLength: "letters ≤" };
  return Object.entries(signs).filter(([name]) => name in form).map(([name, sign]) => `${sign} ${form[name]}`).join(", ");
}
