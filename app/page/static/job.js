/** One job: what it does now, what it has measured, what it has made. */

import { ApiError, ask, download, follow, poll } from "./api.js";
import { announce, badge, bar, bytes, duration, h, put, show, table, when, words } from "./dom.js";
import { curve, scatter } from "./plots.js";
import { toYaml } from "./yaml.js";

const EVERY_MS = 1000;
const MOST_POINTS = 300;
const MOST_EVENTS = 500;
const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const ORDERS = {
  pause: new Set(["queued", "running"]),
  resume: new Set(["paused", "pausing"]),
  cancel: new Set(["queued", "running", "pausing", "paused"]),
  retry: new Set(["failed", "cancelled"]),
  delete: ENDED,
};

export const title = "Job";

export async function render(place, { parts: [id], signal, heading }) {
  const job = new JobPage(id, signal, heading);
  place.append(...job.sections);
  await Promise.all([job.watch(), job.listen()]);
}

class JobPage {
  constructor(id, signal, heading) {
    Object.assign(this, { id, signal, heading, done: new Set(), numEvents: 0, metrics: "" });
    this.head = h("div", {});
    this.wrong = h("p", { class: "problem", role: "alert", hidden: true });
    this.orders = h("p", { class: "orders" }, h("a", { class: "button first", href: `#/try/${id}`, hidden: true }, "Try it"),
      Object.keys(ORDERS).map((order) => h("button", { type: "button", name: order, hidden: true, onclick: () => this.order(order) }, order)));
    const section = (name, text) => {
      this[name] = h("div", {});
      return h("section", { "aria-labelledby": `${name}-head`, hidden: true }, h("h2", { id: `${name}-head` }, text), this[name]);
    };
    this.events = h("ol", { class: "events" });
    this.sections = [this.head, this.orders, this.wrong, section("stages", "Stages"), section("measured", "Measured"), section("points", "What the search has tried"),
      section("curves", "Curves"), section("artifacts", "Artifacts"),
      h("section", { "aria-labelledby": "events-head" }, h("h2", { id: "events-head" }, "Events"),
        h("div", { class: "scroll tall", tabindex: "0", role: "group", "aria-label": "Events" }, this.events)),
      section("usage", "Cost"), section("spec", "Spec")];
  }

  say(name, ...children) {
    put(this[name], ...children);
    this[name].parentElement.hidden = !this[name].childNodes.length;
  }

  /** Looks at the job until it has ended. */
  watch() {
    return poll(async () => {
      const job = await ask(`jobs/${this.id}`, { signal: this.signal });
      this.tell(job);
      await this.more(job);
      return ENDED.has(job.state);
    }, EVERY_MS, this.signal);
  }

  tell(job) {
    if (this.heading.textContent !== job.name) this.heading.textContent = job.name;
    document.title = `${job.name} – Stillhouse`;
    const running = job.stages.find((stage) => stage.state === "running");
    const left = running?.eta_s ? `, ${duration(running.eta_s)} left in this stage` : "";
    const doing = running ? `${running.kind}: ${running.step} of ${running.total_steps || "?"} steps${left}` : "";
    put(this.head, h("p", {}, badge(job.state), " ", bar(job.progress, "Done of the job"), ` ${Math.round(100 * job.progress)} %`), h("p", { class: "hint" }, doing),
      job.error ? this.failure(job.error) : null,
      h("p", { class: "hint" }, h("span", { class: "id" }, job.id), ", made ", when(job.created_at), job.finished_at ? [", ended ", when(job.finished_at)] : "",
        job.parent_id ? [", goes on from ", h("a", { href: `#/jobs/${job.parent_id}` }, "another job")] : ""));
    announce(`${job.name} is ${job.state}${running ? `, ${running.kind}` : ""}`);
    for (const button of this.orders.querySelectorAll("button")) button.hidden = !ORDERS[button.name].has(job.state);
    this.orders.querySelector("a").hidden = job.state !== "succeeded";
    this.say("stages", table("Stages, in order", ["Stage", "State", "Done", "Steps", "Took", "Log"], job.stages.map((stage) => this.stage(stage))));
    this.say("measured", ...measuredBy(job));
    this.say("spec", h("details", {}, h("summary", {}, "The spec with all defaults"), h("pre", { tabindex: "0" }, toYaml(job.spec))));
  }

  failure(error) {
    return h("div", { class: "problem" }, h("p", {}, h("strong", {}, error.reason ?? "failed"), `: ${error.message ?? ""}`), error.suggestion ? h("p", {}, error.suggestion) : null);
  }

  stage(stage) {
    const began = stage.started_at && new Date(stage.started_at);
    const took = stage.finished_at && began ? duration((new Date(stage.finished_at) - began) / 1000) : "–";
    const log = stage.log_url ? saver(`jobs/${this.id}/stages/${stage.ordinal}/log`, `${stage.kind}.log`, "log") : "";
    return [stage.kind, badge(stage.state), bar(stage.progress, `Done of ${stage.kind}`), `${show(stage.step)} of ${show(stage.total_steps)}`, took, log];
  }

  /** Asks for what grows while the job runs. */
  async more(job) {
    const { signal } = this;
    const base = `jobs/${this.id}`;
    const [series, artifacts, usage, points] = await Promise.all([
      ask(`${base}/metrics`, { query: { max_points: MOST_POINTS }, signal }), ask(`${base}/artifacts`, { signal }), ask(`${base}/usage`, { signal }),
      job.stages.some((stage) => stage.kind === "search") ? ask(`${base}/pareto`, { signal }) : { data: [] }]);
    const told = JSON.stringify(series.data.map((one) => [one.name, one.num_points]));
    if (told !== this.metrics) this.draw(series.data);
    this.metrics = told;
    this.say("artifacts", ...artifacts.data.map((artifact) => artifactOf(this.id, artifact)));
    this.say("usage", h("p", {}, `Workers have held it for ${duration(usage.seconds)}.`),
      usage.teacher.requests ? h("p", {}, `Its teacher's API was asked ${show(usage.teacher.requests)} times: ${show(usage.teacher.prompt_tokens)} tokens read, ${show(usage.teacher.completion_tokens)} written.`) : null);
    this.say("points", ...pointsOf(this.id, points.data));
  }

  draw(series) {
    const isOpen = new Set([...this.curves.querySelectorAll("details[open] > summary")].map((summary) => summary.textContent));
    this.curves.replaceChildren(...[...Map.groupBy(series, (one) => one.ordinal).values()].map((some) =>
      h("div", {}, h("h3", {}, some[0].stage), figures(some.filter(isMain)), others(some))));
    for (const summary of this.curves.querySelectorAll("details > summary")) summary.parentElement.open = isOpen.has(summary.textContent);
    this.curves.parentElement.hidden = !series.length;
  }

  async listen() {
    for await (const event of follow(this.id, this.signal)) {
      const item = h("li", { class: event.level }, when(event.at), " ", h("strong", {}, event.type), " ", event.message);
      this.events.prepend(item);
      if (this.events.childElementCount > MOST_EVENTS) this.events.lastChild.remove();
    }
  }

  async order(name) {
    this.wrong.hidden = true;
    if (name === "delete" && !confirm("Delete the job, with all that it made?")) return;
    try {
      const job = name === "delete" ? await ask(`jobs/${this.id}`, { method: "DELETE" }) : await ask(`jobs/${this.id}/${name}`, { method: "POST" });
      if (job?.id === this.id) this.tell(job);
      else location.hash = job ? `#/jobs/${job.id}` : "#/jobs";
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.wrong.textContent = error.message;
      this.wrong.hidden = false;
    }
  }
}

const isMain = ({ name }) => name.startsWith("validation/") || name === "loss/total";
const figures = (series) => h("div", { class: "figures" }, series.map((one) => curve(one.name, one.points)));

function others(series) {
  const rest = series.filter((one) => !isMain(one));
  return rest.length ? h("details", {}, h("summary", {}, `${rest.length} further curves of ${rest[0].stage} ${rest[0].ordinal}`), figures(rest)) : null;
}

/** Returns the main table of what a job has measured, if it has. */
function measuredBy(job) {
  const models = job.stages.findLast((stage) => stage.kind === "evaluate")?.summary?.models ?? [];
  if (!models.length) return [];
  const names = [...new Set(models.flatMap(Object.keys))].filter((name) => name !== "name" && models.some((row) => ["number", "string"].includes(typeof row[name])));
  return [table("Models on the test split", ["model", ...names.map(words)], models.map((row) => [row.name, ...names.map((name) => (name === "size_bytes" ? bytes(row[name]) : (row[name] ?? null)))]))];
}

function pointsOf(id, points) {
  if (!points.length) return [];
  const marks = points.map((point) => ({
    x: point.size_bytes, y: point.retained, href: `#/jobs/${id}`, kind: point.on_front ? "student" : "form",
    label: `student ${point.number} as ${point.form}: keeps ${show(point.retained)}, ${bytes(point.size_bytes)}, p95 ${show(point.latency_p95_ms)} ms${point.on_front ? ", on the front" : ""}${point.meets ? ", meets the goal" : ""}`,
  }));
  const rows = points.map((point) => [`${point.number} ${point.form}`, point.retained, bytes(point.size_bytes), point.latency_p95_ms, point.on_front ? "yes" : "no", point.meets ? "yes" : "no"]);
  return [h("p", { class: "legend" }, "Circles are on the Pareto front: nothing is at least as good in quality, bytes and time."),
    scatter(marks, { x: "size", y: "share of the teacher's score", showX: bytes }),
    table("Students of the search", ["Student", "Keeps", "Size", "p95, ms", "On the front", "Meets the goal"], rows)];
}

function artifactOf(id, artifact) {
  const base = `jobs/${id}/artifacts/${artifact.name}`;
  const files = artifact.files.map((file) => h("li", {}, saver(`${base}/${file.path.split("/").map(encodeURIComponent).join("/")}`, file.path.split("/").at(-1), file.path), ` ${bytes(file.size_bytes)}`));
  return h("div", { class: "artifact" },
    h("p", {}, h("strong", {}, artifact.name), ` of ${artifact.stage}, ${bytes(artifact.size_bytes)} `, saver(`${base}/download`, `${artifact.name}.tar`, "all as one tar", artifact.name)),
    h("details", {}, h("summary", {}, `${artifact.files.length} files of ${artifact.name}`), h("ul", {}, files)));
}

/** Returns a button that saves a file, and shows how far that is. */
function saver(path, name, text, of = "") {
  const bare = `Download ${text}`;
  const label = h("span", {}, bare);
  const save = async () => {
    try {
      await download(path, name, (share) => (label.textContent = `${bare}: ${Math.round(100 * share)} %`));
      announce(`${name} is saved.`);
      label.textContent = bare;
    } catch (error) {
      label.textContent = `${bare}: ${error.message}`;
    }
  };
  return h("button", { type: "button", class: "small", onclick: save, "aria-label": of ? `${bare}: ${of}` : null }, label);
}
