/** How good models are against how large they are, over all jobs that measured theirs. */

import { askAll } from "./api.js";
import { bytes, h, show, table, words } from "./dom.js";
import { scatter } from "./plots.js";

const COSTS = new Set(["size_bytes", "num_parameters", "throughput_per_s", "latency_p50_ms", "latency_p95_ms"]);
const BETTER_SMALL = new Set(["perplexity", "loss", "rmse", "mae", "bits_per_byte", "kl_to_teacher"]);
const PREFERRED = ["accuracy", "f1", "mean", "perplexity", "rmse"];

export const title = "Quality against size";

export async function render(place, { signal }) {
  const results = await askAll("results", { signal });
  if (!results.length) {
    place.append(h("p", {}, "No job has measured a model yet; a stage ‘evaluate’ does."));
    return;
  }
  const tests = [...new Set(results.map(splitOf))];
  const split = h("select", { id: "split", onchange: () => draw() }, tests.map((name) => h("option", { value: name }, name)));
  const score = h("select", { id: "score", onchange: () => draw(true) });
  const shown = h("div", {});
  place.append(
    h("form", { class: "filters", "aria-label": "What to compare", onsubmit: (event) => event.preventDefault() },
      h("p", {}, h("label", { for: "split" }, "Measured on"), split), h("p", {}, h("label", { for: "score" }, "Quality"), score)),
    h("p", { class: "legend" }, "Squares are teachers, circles students, triangles exported forms. Models measured on one split compare."), shown);

  function draw(keeps = false) {
    const some = results.filter((result) => splitOf(result) === split.value);
    const rows = some.flatMap((result) => result.models.map((model) => ({ ...model, job: result })));
    const names = [...new Set(rows.flatMap((row) => Object.keys(row).filter((name) => typeof row[name] === "number" && !COSTS.has(name))))];
    if (!keeps) {
      score.replaceChildren(...names.map((name) => h("option", { value: name }, label(name))));
      score.value = PREFERRED.find((name) => names.includes(name)) ?? names[0];
    }
    const known = rows.filter((row) => typeof row[score.value] === "number" && row.size_bytes > 0);
    shown.replaceChildren(...(known.length ? [plotOf(known, score.value)] : []), tableOf(rows, score.value));
  }
  draw();
}

const splitOf = (result) => (typeof result.test === "string" ? result.test : Object.values(result.test).join(", "));
const label = (name) => `${words(name)}${BETTER_SMALL.has(name) ? " (less is better)" : ""}`;

function plotOf(rows, score) {
  const points = rows.map((row) => ({
    x: row.size_bytes, y: row[score], href: `#/jobs/${row.job.job_id}`,
    kind: ["teacher", "student"].includes(row.name) ? row.name : "form",
    label: `${row.name} of ${row.job.name}: ${words(score)} ${show(row[score])}, ${bytes(row.size_bytes)}`,
  }));
  return scatter(points, { x: "size", y: label(score), showX: bytes });
}

function tableOf(rows, score) {
  const heads = ["Job", "Model", label(score), "Size", "p95, ms", "Parameters"];
  const cells = (row) => [h("a", { href: `#/jobs/${row.job.job_id}` }, row.job.name), row.name, row[score] ?? null, bytes(row.size_bytes), row.latency_p95_ms ?? null, row.num_parameters ?? null];
  return table("All models, newest job first", heads, rows.map(cells));
}
