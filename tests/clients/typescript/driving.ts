// What a user does with a client generated from the OpenAPI document: prints as JSON what it found.
import createClient from "openapi-fetch";

import type { components, paths } from "./schema";

declare const process: { argv: string[] };

const [baseUrl, key] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${key}` } });
const spec: components["schemas"]["JobSpec"] = {
  name: "typed",
  task: { kind: "text_classification", text: "text", label: "label" },
  teacher: { model: "minilm" },
  student: { kind: "teacher_layers", keep: [0, 2] },
  data: "tickets",
  stages: [{ kind: "distill", epochs: 1 }, { kind: "export", formats: [{ kind: "onnx_int8" }] }],
} as components["schemas"]["JobSpec"];

const made = await client.POST("/v1/jobs", { body: spec });
if (made.error) throw new Error(made.error.error.message);
const shown = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id: made.data.id } } });
const listed = await client.GET("/v1/jobs", { params: { query: { state: "queued", limit: 5 } } });
const cancelled = await client.POST("/v1/jobs/{job_id}/cancel", { params: { path: { job_id: made.data.id } } });
const unknown = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id: "job_0" } } });
const bad = await client.POST("/v1/jobs", { body: { ...spec, stages: [{ kind: "distill", epochs: -1 }] } as never });

console.log(
  JSON.stringify({
    stages: shown.data?.stages.map((stage) => stage.kind),
    listed: listed.data?.data.map((job) => job.name),
    state: cancelled.data?.state,
    unknown: unknown.error?.error.code,
    bad: bad.error?.error.param,
  }),
);
