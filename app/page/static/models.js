/** Models: the list, one with its files, and the upload of a folder. */

import { ask, askAll } from "./api.js";
import { uploader } from "./datasets.js";
import { bytes, h, show, table, when } from "./dom.js";

export const title = "Models";

export async function render(place, { parts: name, signal, heading }) {
  if (name.length) {
    heading.textContent = name.join("/");
    return one(place, name.map(encodeURIComponent).join("/"), signal);
  }
  const found = await askAll("models", { signal });
  const rows = found.map((model) => [h("a", { href: `#/models/${model.name}` }, model.name), model.facts.model_type ?? "", model.facts.num_layers ?? null, model.facts.num_parameters ?? null, bytes(model.size_bytes), when(model.created_at)]);
  place.append(found.length ? table("Models, newest first", ["Name", "Kind", "Layers", "Parameters", "Size", "Made"], rows) : h("p", {}, "There is no model yet."), uploadForm());
}

function uploadForm() {
  const name = h("input", { id: "name", required: true });
  const folder = h("input", { type: "file", id: "folder", webkitdirectory: true, multiple: true, required: true, onchange: () => (name.value ||= folder.files[0]?.webkitRelativePath.split("/")[0] ?? "") });
  const fields = () => {
    const form = new FormData();
    form.append("name", name.value);
    for (const file of folder.files) form.append("files", file, file.webkitRelativePath.split("/").slice(1).join("/"));
    return form;
  };
  return uploader("Upload a model", "models", fields,
    h("p", { class: "hint" }, "A folder of transformers: config.json, safetensors and tokenizer. What could run code when it is loaded is refused."),
    h("p", {}, h("label", { for: "folder" }, "Folder"), folder), h("p", {}, h("label", { for: "name" }, "Name"), name));
}

async function one(place, name, signal) {
  const model = await ask(`models/${name}`, { signal });
  const facts = Object.entries(model.facts).filter(([, value]) => value !== null && typeof value !== "object");
  place.append(h("p", {}, h("a", { href: "#/models" }, "All models")), h("p", {}, `${bytes(model.size_bytes)}, uploaded `, when(model.created_at)),
    table("What its files say", ["Fact", "Value"], facts.map(([fact, value]) => [fact, show(value)])),
    table("Files", ["Path", "Size", "sha256"], model.files.map((file) => [file.path, bytes(file.size_bytes), h("span", { class: "id" }, file.sha256.slice(0, 16))])));
}
