/** A new job: the spec is put together of the methods' own schemas, checked by the server, and submitted. */

import { ApiError, ask, askAll } from "./api.js";
import { announce, bytes, h, show, words } from "./dom.js";
import { chooseKind, group, makeField, showProblems } from "./fields.js";
import { TRIED } from "./jobs.js";
import { toYaml } from "./yaml.js";

const GOAL = ["min_retained", "max_bytes", "max_p95_ms", "runtime", "max_trials", "max_search_seconds"]; // of a stage `search`
const HUB_MODEL = "hub:org/name@main"; // an example of every field that names a model
const DATA = {
  anyOf: [
    { type: "string", title: "a data set", description: "Its splits train, validation and test are used." },
    { type: "object", title: "splits", description: "The split for each purpose, of several tasks one each.", examples: [{ train: "tickets/train", test: { intent: "tickets/test", mood: "moods/test" } }] },
  ],
};
const MORE = {
  properties: {
    seed: { type: "integer", minimum: 0, default: 0, description: "Seed of every random choice." },
    cache: { enum: ["use", "refresh", "off"], default: "use", description: "Whether results of identical stages are taken over, and offered." },
    retries: { type: "integer", minimum: 0, maximum: 20, default: 2, description: "How often a stage is tried again after a failure that may pass." },
    max_seconds: { type: "integer", minimum: 1, description: "The job fails once workers have held it for this long." },
    deterministic: { type: "boolean", default: false, description: "Make the same bytes each time on a GPU, too." },
    metadata: { type: "object", description: "Your own labels; jobs can be listed by them.", examples: [{ team: "support" }] },
  },
};
const USUAL = ["finetune", "distill", "export", "evaluate"];

export const title = "New job";

export async function render(place, { parts: [wanted], signal }) {
  const [methods, datasets, models, jobs] = await Promise.all([
    ask("methods", { signal }), askAll("datasets", { signal }), askAll("models", { signal }), ask("jobs", { query: { state: "succeeded", limit: 100 }, signal })]);
  if (!datasets.length || !models.length) {
    place.append(h("p", { class: "problem" }, "A job needs a model and a data set of yours: ", h("a", { href: "#/models" }, "upload a model"), " and ", h("a", { href: "#/datasets" }, "a data set"), "."));
  }
  new JobForm(place, { families: methods.data, datasets, models, jobs: jobs.data.filter((job) => !(TRIED in job.metadata)), wanted });
}

class JobForm {
  constructor(place, known) {
    this.known = known;
    this.choices = (name, schema) => (schema.examples?.includes(HUB_MODEL) ? this.modelChoices() : null);
    this.fields = {
      name: makeField("name", { type: "string", maxLength: 120, description: "Your name for the job." }, { root: {}, value: "job" }),
      data: makeField("data", DATA, { root: {}, required: true, choices: () => known.datasets.map(({ name }) => ({ value: name, text: name })) }),
      task: this.family("tasks", "task", "text_classification"),
      teacher: this.family("teachers", "teacher", "model"),
    };
    this.more = group("more", MORE, { root: {}, required: true, title: "the job" });
    this.student = this.family("students", "student", "teacher_layers", (kind) => kind !== "searched");
    this.target = this.goal();
    this.stages = new Stages(known.families.stages.filter(({ kind }) => kind !== "search"), this.choices, known.wanted);
    this.place(place);
  }

  modelChoices() {
    const outputs = this.known.jobs.map((job) => ({ value: `job:${job.id}`, text: `student of ${job.name} (${job.id.slice(-8)})` }));
    return [...this.known.models.map(({ name }) => ({ value: name, text: name })), ...outputs];
  }

  family(family, name, kind, fits = () => true) {
    const byKind = new Map(this.known.families[family].filter((one) => fits(one.kind)).map((one) => [one.kind, { schema: one.json_schema, root: one.json_schema }]));
    return chooseKind(name, byKind, { given: { kind }, required: true, choices: this.choices });
  }

  goal() {
    const { json_schema: root } = this.known.families.stages.find(({ kind }) => kind === "search");
    const properties = Object.fromEntries(GOAL.map((name) => [name, root.properties[name]]));
    return group("target", { properties }, { root, given: {}, required: true, title: "the goal" });
  }

  place(place) {
    this.way = h("select", { id: "way", onchange: () => this.turn() }, h("option", { value: "student" }, "a student that I choose"), h("option", { value: "target" }, "the smallest student that reaches a goal"));
    this.chosen = h("div", {}, this.student.node, this.stages.node);
    this.wrong = h("div", { class: "problem", role: "alert", tabindex: "-1", hidden: true });
    this.found = h("div", { role: "status" });
    this.written = h("pre", { tabindex: "0", "aria-label": "The spec" });
    this.form = h("select", { id: "form", onchange: () => this.show() }, ["YAML", "JSON"].map((name) => h("option", {}, name)));
    const copy = h("button", { type: "button", class: "small", onclick: () => navigator.clipboard.writeText(this.written.textContent).then(() => announce("The spec is copied.")) }, "Copy");
    const fields = this.fields;
    this.node = h("form", { novalidate: true, onsubmit: (event) => (event.preventDefault(), this.submit()), oninput: () => this.show(), onchange: () => this.show(), onclick: () => this.show() },
      fields.name.node, fields.data.node, fields.teacher.node, h("div", { class: "field" }, h("label", { for: "way" }, "What to make"), this.way), this.chosen, this.target.node, fields.task.node, this.more.node,
      this.wrong, this.found, h("p", { class: "orders" }, h("button", { type: "button", onclick: () => this.validate() }, "Check"), h("button", { type: "submit", class: "first" }, "Submit")));
    place.append(this.node, h("section", { "aria-labelledby": "spec-head" }, h("h2", { id: "spec-head" }, "The spec"),
      h("p", {}, h("label", { for: "form" }, "Written as "), this.form, " ", copy), this.written));
    this.turn();
  }

  get makesStudent() {
    return this.way.value === "student";
  }

  turn() {
    this.chosen.hidden = !this.makesStudent;
    this.target.node.hidden = this.makesStudent;
    this.show();
  }

  /** Returns the spec, as short as it can be written. */
  spec() {
    const { name, data, task, teacher } = this.fields;
    const made = this.makesStudent ? { student: this.student.read(), stages: this.stages.read() } : { target: this.target.read() };
    const found = { name: name.read(), task: task.read(), teacher: teacher.read(), data: data.read(), ...made, ...this.more.read() };
    return JSON.parse(JSON.stringify(found)); // without what is undefined
  }

  show() {
    const spec = this.spec();
    this.written.textContent = this.form.value === "YAML" ? toYaml(spec) : JSON.stringify(spec, null, 2);
  }

  child(name) {
    const made = this.makesStudent ? { student: this.student, stages: this.stages } : { target: this.target };
    return { ...this.fields, ...made }[name] ?? this.more.child(name);
  }

  async send(path) {
    this.wrong.hidden = true;
    this.found.replaceChildren();
    for (const element of this.node.querySelectorAll("[id$=-wrong]")) element.hidden = true;
    for (const element of this.node.querySelectorAll("[aria-invalid]")) element.removeAttribute("aria-invalid");
    try {
      return await ask(path, { method: "POST", body: this.spec() });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.tell(error);
      return null;
    }
  }

  tell(error) {
    const lost = showProblems(this, error.details);
    this.wrong.replaceChildren(h("p", {}, error.message), lost.length > 1 ? h("ul", {}, lost.map((text) => h("li", {}, text))) : "");
    this.wrong.hidden = false;
    (this.node.querySelector("[aria-invalid]") ?? this.wrong).focus();
  }

  async validate() {
    const found = await this.send("jobs/validate");
    if (!found) return;
    const { num_parameters: count, size_bytes: sizes } = found.student;
    const forms = Object.entries(sizes).map(([form, size]) => `${form} ${bytes(size)}`).join(", ");
    this.found.replaceChildren(h("p", { class: "good" }, `The spec is good. ${count ? `The student will have about ${show(count)} parameters${forms ? `: ${forms}` : ""}.` : ""}`),
      h("ul", {}, found.warnings.map(({ field, message }) => h("li", {}, `${field}: ${message}`))));
  }

  async submit() {
    const job = await this.send("jobs");
    if (job) location.hash = `#/jobs/${job.id}`;
  }
}

/** The stages: those that the task has by itself, or some that are chosen, in their order. */
class Stages {
  constructor(methods, choices, wanted) {
    this.byKind = new Map(methods.map((one) => [one.kind, { schema: one.json_schema, root: one.json_schema }]));
    this.choices = choices;
    this.items = [];
    this.own = h("input", { type: "checkbox", id: "own-stages", onchange: () => this.turn() });
    this.own.checked = Boolean(wanted);
    this.rows = h("ol", { class: "items" });
    this.kind = h("select", { id: "stage-kind" }, [...this.byKind.keys()].map((kind) => h("option", {}, kind)));
    this.inside = h("div", {}, this.rows, h("p", {}, h("label", { for: "stage-kind" }, "Next stage "), this.kind, " ", h("button", { type: "button", class: "small", onclick: () => this.add(this.kind.value) }, "Add the stage")));
    this.wrong = h("p", { class: "problem", hidden: true, id: "stages-wrong" });
    this.node = h("fieldset", {}, h("legend", {}, "stages"), h("p", {}, this.own, h("label", { for: "own-stages" }, "Choose the stages")),
      h("p", { class: "hint" }, "Otherwise the teacher is fine-tuned and the student distilled, written in every form that its task has, and measured."), this.wrong, this.inside);
    USUAL.forEach((kind) => this.add(kind));
    if (wanted && !this.items.some(({ kind }) => kind === wanted)) this.add(wanted);
    this.turn();
  }

  turn() {
    this.inside.hidden = !this.own.checked;
  }

  add(kind) {
    const { schema, root } = this.byKind.get(kind);
    const item = { kind, field: group(kind, schema, { root, choices: this.choices, required: true }) };
    const button = (text, act) => h("button", { type: "button", class: "small", onclick: act, "aria-label": `${text}: ${words(kind)}` }, text);
    item.row = h("li", {}, item.field.node, h("p", {}, button("Earlier", () => this.move(item, -1)), button("Later", () => this.move(item, 1)), button("Take out", () => this.remove(item))));
    this.items.push(item);
    this.rows.append(item.row);
  }

  move(item, by) {
    const from = this.items.indexOf(item);
    const to = from + by;
    if (to < 0 || to >= this.items.length) return;
    this.items.splice(to, 0, ...this.items.splice(from, 1));
    this.rows.replaceChildren(...this.items.map(({ row }) => row));
    item.row.querySelector("legend").scrollIntoView({ block: "nearest" });
  }

  remove(item) {
    this.items.splice(this.items.indexOf(item), 1);
    item.row.remove();
    this.kind.focus();
  }

  read() {
    return this.own.checked ? this.items.map(({ kind, field }) => ({ kind, ...field.read() })) : undefined;
  }

  child(name) {
    return this.own.checked ? this.items[Number(name)]?.field : undefined;
  }

  fail(message) {
    this.wrong.textContent = message;
    this.wrong.hidden = false;
  }
}
