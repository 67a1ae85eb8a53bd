/** Try it: a text, and what teacher and student say of it, side by side. */

import { ApiError, ask, askAll, poll } from "./api.js";
import { announce, h, show, words } from "./dom.js";
import { TRIED } from "./jobs.js";

const EVERY_MS = 500;
const MOST_LABELS = 5;
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

export const title = "Try it";

export async function render(place, { parts: [wanted], signal }) {
  const jobs = (await askAll("jobs", { query: { state: "succeeded" }, signal, most: 200 })).filter((job) => !(TRIED in job.metadata));
  if (!jobs.length) {
    place.append(h("p", {}, "No job has made a student yet."));
    return;
  }
  const job = h("select", { id: "job", onchange: () => turn() }, jobs.map(({ id, name }) => h("option", { value: id }, `${name} (${id.slice(-8)})`)));
  if (jobs.some(({ id }) => id === wanted)) job.value = wanted;
  const text = h("textarea", { id: "text", rows: "3", maxlength: "8192", required: true });
  const pair = h("textarea", { id: "pair", rows: "2", maxlength: "8192" });
  const second = h("p", {}, h("label", { for: "pair" }, "Second text"), pair);
  const button = h("button", { type: "submit", class: "first" }, "Ask both");
  const [wrong, doing, said] = [h("p", { class: "problem", role: "alert", hidden: true }), h("p", { role: "status" }), h("div", {})];
  let spec = null;
  async function turn() {
    spec = (await ask(`jobs/${job.value}`, { signal })).spec;
    const tasks = [spec.task, ...Object.values(spec.task.tasks ?? {})];
    second.hidden = !tasks.some((task) => task.pair);
    pair.required = !second.hidden;
  }
  async function submit(event) {
    event.preventDefault();
    wrong.hidden = button.disabled = true;
    try {
      const made = await fork(job.value, spec, text.value, second.hidden ? [] : [pair.value]);
      const ended = await wait(made.id, signal, (state) => (doing.textContent = state));
      if (ended.state !== "succeeded") throw new Error(ended.error?.message ?? `The job is ${ended.state}.`);
      const [row] = await ask(`jobs/${made.id}/artifacts/predictions/predictions.json`, { signal });
      said.prepend(answerOf(row, ended.stages.at(-1).summary.milliseconds));
      doing.textContent = "";
      announce("Both have answered.");
      said.firstChild.focus();
    } catch (error) {
      if (signal.aborted) return;
      wrong.hidden = false;
      doing.textContent = "";
      wrong.textContent = error instanceof ApiError && error.status === 403 ? `${error.message} To try a text is a small job, which needs it.` : error.message;
    } finally {
      button.disabled = false;
    }
  }
  place.append(
    h("form", { onsubmit: submit, class: "narrow" },
      h("p", {}, h("label", { for: "job" }, "Models of the job"), job), h("p", {}, h("label", { for: "text" }, "Text"), text), second,
      h("p", { class: "hint" }, "A worker answers, in a job of its own that the list leaves out; the text is kept in its spec until you delete it."), button), wrong, doing, said);
  await turn();
}

/** Makes a job that takes over all that another one did, and has its models answer a text. */
function fork(id, spec, text, pairs) {
  const stage = { kind: "predict", texts: [text], ...(pairs.length ? { pairs } : {}) };
  const overrides = { name: "try", metadata: { [TRIED]: id }, stages: [stage] };
  return ask(`jobs/${id}/fork`, { method: "POST", body: { from_stage: spec.stages.length, overrides } });
}

async function wait(id, signal, tell) {
  let job = null;
  await poll(async () => {
    job = await ask(`jobs/${id}`, { signal });
    tell(job.state === "queued" ? "Waiting for a worker …" : "The models are answering …");
    return ENDED.has(job.state);
  }, EVERY_MS, signal);
  return job;
}

function answerOf(row, milliseconds) {
  const roles = ["teacher", "student"].filter((role) => role in row);
  return h("article", { tabindex: "-1", "aria-label": "Answer" }, h("blockquote", {}, row.text, row.pair ? h("p", {}, row.pair) : null),
    h("div", { class: "sides" }, roles.map((role) => h("section", { "aria-label": role },
      h("h2", {}, role), bodyOf(row[role]), h("p", { class: "hint" }, `${show(milliseconds[role][0])} ms`)))));
}

function bodyOf(answer) {
  if (answer.tasks) return h("div", {}, Object.entries(answer.tasks).map(([name, inner]) => h("div", {}, h("h3", {}, words(name)), bodyOf(inner))));
  if (answer.labels) return h("ol", { class: "labels" }, answer.labels.slice(0, MOST_LABELS).map((one) => h("li", {}, h("span", {}, one.label), meter(one), h("span", {}, `${(100 * one.probability).toFixed(1)} %`))));
  if (answer.words) return h("p", { class: "tagged" }, answer.words.map((one) => [one.label === "O" ? one.word : h("mark", {}, one.word, h("small", {}, ` ${one.label}`)), " "]).flat());
  if ("value" in answer) return h("p", { class: "value" }, show(answer.value));
  return h("p", { class: "continuation" }, answer.continuation, answer.is_cut ? " …" : "");
}

const meter = ({ label, probability }) => h("meter", { max: "1", value: probability, "aria-label": `Probability of ${label}` });
