/** Data sets: the list, the rows of a split, and the upload. */

import { ask, askAll, upload } from "./api.js";
import { announce, bar, bytes, h, show, table, when } from "./dom.js";

const SPLITS = ["train", "validation", "test"];
const ROWS = 10;

export const title = "Data sets";

export async function render(place, { parts: [name], signal, heading }) {
  if (name) {
    heading.textContent = name;
    return one(place, name, signal);
  }
  const found = await askAll("datasets", { signal });
  const rows = found.map((data) => [h("a", { href: `#/datasets/${data.name}` }, data.name), Object.entries(data.splits).map(([split, { num_rows: count }]) => `${split} ${show(count)}`).join(", "),
    bytes(Object.values(data.splits).reduce((sum, split) => sum + split.size_bytes, 0)), when(data.created_at)]);
  place.append(found.length ? table("Data sets, newest first", ["Name", "Rows", "Size", "Made"], rows) : h("p", {}, "There is no data set yet."), uploadForm());
}

function uploadForm() {
  const name = h("input", { id: "name", required: true });
  const files = SPLITS.map((split) => h("input", { type: "file", id: split, name: split, accept: ".jsonl,.csv,.parquet", required: split === "train", onchange: () => (name.value ||= nameOf(files[0].files[0])) }));
  const fields = () => {
    const form = new FormData();
    form.append("name", name.value);
    files.forEach((input) => input.files[0] && form.append(input.name, input.files[0]));
    return form;
  };
  return uploader("Upload a data set", "datasets", fields,
    h("p", { class: "hint" }, "JSON Lines, CSV or Parquet, one file a split. Every row is checked; a refused upload leaves nothing behind."),
    files.map((input) => h("p", {}, h("label", { for: input.id }, input.name), input)), h("p", {}, h("label", { for: "name" }, "Name"), name));
}

const nameOf = (file) => {
  const stem = (file?.name ?? "").replace(/\.\w+$/, "");
  return SPLITS.includes(stem) ? "data" : stem;
};

/** Returns a form that uploads what `fields` returns to `/v1/<path>`, and shows how far that is. */
export function uploader(text, path, fields, ...children) {
  const wrong = h("p", { class: "problem", role: "alert", hidden: true });
  const button = h("button", { type: "submit" }, "Upload");
  const sent = bar(0, "Sent");
  sent.hidden = true;
  async function send(event) {
    event.preventDefault();
    wrong.hidden = true;
    sent.hidden = false;
    button.disabled = true;
    try {
      const made = await upload(path, fields(), (share) => (sent.value = share));
      announce(`${made.name} is uploaded.`);
      location.hash = `#/${path}/${made.name}`;
    } catch (error) {
      wrong.hidden = false;
      wrong.textContent = [error.message, ...(error.details ?? []).slice(0, 10).map((detail) => detail.message ?? "")].join(" ");
      sent.hidden = true;
      button.disabled = false;
    }
  }
  return h("section", { "aria-labelledby": "upload-head" }, h("h2", { id: "upload-head" }, text), h("form", { onsubmit: send, class: "narrow" }, children, wrong, sent, button));
}

async function one(place, name, signal) {
  const data = await ask(`datasets/${encodeURIComponent(name)}`, { signal });
  const splits = Object.entries(data.splits);
  const rows = splits.map(([split, found]) => [split, found.num_rows, bytes(found.size_bytes), found.text_column, found.label_column, Object.keys(found.label_counts).length]);
  const pick = h("select", { id: "split", onchange: () => show_(0) }, splits.map(([split]) => h("option", {}, split)));
  const shown = h("div", { "aria-live": "polite" });
  const [earlier, later] = [-ROWS, ROWS].map((by) => h("button", { type: "button", onclick: () => show_(offset + by) }, by < 0 ? "Earlier rows" : "Later rows"));
  let offset = 0;
  async function show_(from) {
    offset = Math.max(0, from);
    const found = await ask(`datasets/${encodeURIComponent(name)}/preview`, { query: { split: pick.value, offset, limit: ROWS }, signal });
    const columns = Object.keys(data.splits[pick.value].columns);
    const text = (value) => (typeof value === "string" ? value : JSON.stringify(value) ?? "");
    shown.replaceChildren(table(`Rows ${offset + 1} to ${offset + found.data.length} of ${found.num_rows}`, ["Row", ...columns], found.data.map((row, place_) => [String(offset + place_ + 1), ...columns.map((column) => text(row[column]))])));
    earlier.disabled = offset === 0;
    later.disabled = found.next_offset === null;
  }
  place.append(h("p", {}, h("a", { href: "#/datasets" }, "All data sets")), table("Splits", ["Split", "Rows", "Size", "Text", "Label", "Labels"], rows),
    h("h2", {}, "Rows"), h("p", {}, h("label", { for: "split" }, "Split "), pick, " ", earlier, " ", later), shown);
  await show_(0);
}
