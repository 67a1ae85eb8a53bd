/** The list of jobs: only the rows in sight are in the page, however many there are. */

import { ask, poll } from "./api.js";
import { announce, badge, bar, h, when } from "./dom.js";

const ROW_PX = 44;
const BEYOND = 8; // rows that are kept on either side of those in sight
const PAGE = 100;
const EVERY_MS = 2000;
const MOST_ASKED = 20;
const STATES = ["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"];
const UNFINISHED = new Set(["queued", "running", "pausing", "paused", "cancelling"]);

export const title = "Jobs";

/** What tells the jobs that only try a text from others: a label with the job whose models they ask. */
export const TRIED = "try_of";

export async function render(place, { signal }) {
  const list = new JobList(signal);
  const state = h("select", { id: "state", onchange: () => list.reset() }, h("option", { value: "" }, "any"), STATES.map((name) => h("option", {}, name)));
  const name = h("input", { id: "name", type: "search", onchange: () => list.reset() });
  const tried = h("input", { id: "tried", type: "checkbox", onchange: () => list.reset() });
  list.filters = () => ({ state: state.value, name: name.value.trim() });
  list.wanted = (job) => tried.checked || !(TRIED in job.metadata);
  place.append(
    h("form", { class: "filters", onsubmit: (event) => event.preventDefault(), "aria-label": "Which jobs" },
      h("p", {}, h("label", { for: "state" }, "State"), state),
      h("p", {}, h("label", { for: "name" }, "Whole name"), name),
      h("p", {}, tried, h("label", { for: "tried" }, "Tried texts, too"))),
    list.count, list.box);
  await list.reset();
  await poll(() => list.refresh(), EVERY_MS, signal);
}

/** Rows by their place, those that were read so far; the next page is read before the last one comes into sight. */
class JobList {
  constructor(signal) {
    this.signal = signal;
    this.count = h("p", { class: "hint" });
    this.body = h("tbody", {});
    const heads = ["Name", "State", "Done", "Made", "Id"].map((head, place) => h("th", { scope: "col", class: place > 2 ? "wide" : null }, head));
    this.table = h("table", { class: "jobs" }, h("caption", { class: "unseen" }, "Jobs, newest first"), h("thead", {}, h("tr", { "aria-rowindex": "1" }, heads)), this.body);
    this.box = h("div", { class: "list", tabindex: "0", role: "group", "aria-label": "Jobs, newest first", onscroll: () => this.schedule() }, this.table);
    [this.above, this.below] = [0, 0].map(() => h("tr", { class: "spacer", "aria-hidden": "true" }, h("td", { colspan: "5" })));
    this.empty();
  }

  empty() {
    Object.assign(this, { rows: [], places: new Map(), shown: new Map(), progress: new Map(), cursor: null, reading: null });
    this.body.replaceChildren(this.above, this.below);
  }

  async reset() {
    this.empty();
    this.box.scrollTop = 0;
    await this.read();
    this.schedule();
  }

  /** Reads the next page; there is one reading at a time, and one that failed is tried again with the next look. */
  async read() {
    const asked = (this.reading = ask("jobs", { query: { ...this.filters(), limit: PAGE, after: this.cursor }, signal: this.signal }));
    const page = await asked.catch((error) => ((this.reading = null), Promise.reject(error)));
    if (this.reading !== asked) return; // other jobs are wanted by now
    this.reading = null;
    this.cursor = page.next_cursor;
    this.rows.push(...page.data.filter(this.wanted));
    this.number();
  }

  number() {
    this.places = new Map(this.rows.map((job, place) => [job.id, place]));
    this.table.setAttribute("aria-rowcount", this.cursor ? "-1" : this.rows.length + 1);
    const told = `${this.rows.length.toLocaleString("en")}${this.cursor ? " or more" : ""} ${this.rows.length === 1 ? "job" : "jobs"}`;
    this.count.textContent = this.rows.length || this.cursor ? told : "There is no such job. “New job” makes one.";
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  inSight() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / ROW_PX) - BEYOND);
    return [first, Math.min(this.rows.length, first + Math.ceil(this.box.clientHeight / ROW_PX) + 2 * BEYOND)];
  }

  /** Puts the rows in sight into the page; a row that stays is the same element, so that it keeps the focus. */
  draw() {
    const [first, end] = this.inSight();
    const wanted = this.rows.slice(first, end);
    const ids = new Set(wanted.map((job) => job.id));
    for (const [id, row] of [...this.shown].filter(([one]) => !ids.has(one))) {
      row.remove();
      this.shown.delete(id);
    }
    let before = this.above;
    wanted.forEach((job, place) => {
      const row = this.shown.get(job.id) ?? this.make(job);
      row.setAttribute("aria-rowindex", first + place + 2);
      if (before.nextSibling !== row) before.after(row);
      before = row;
    });
    this.above.firstChild.style.height = `${first * ROW_PX}px`;
    this.below.firstChild.style.height = `${(this.rows.length - end) * ROW_PX}px`;
    if (this.cursor && !this.reading && end > this.rows.length - PAGE / 2) this.read().then(() => this.schedule(), () => {});
  }

  make(job) {
    const row = h("tr", {},
      h("th", { scope: "row" }, h("a", { href: `#/jobs/${job.id}` }, job.name)),
      h("td", {}), h("td", {}), h("td", { class: "wide" }, when(job.created_at)), h("td", { class: "wide id" }, job.id.slice(-8)));
    this.shown.set(job.id, row);
    this.tell(job);
    return row;
  }

  tell(job) {
    const row = this.shown.get(job.id);
    if (!row) return;
    const [, state, done] = row.children;
    if (state.textContent !== job.state) state.replaceChildren(badge(job.state));
    const share = job.state === "succeeded" ? 1 : this.progress.get(job.id);
    if (share === undefined) done.textContent = job.state === "failed" ? (job.error?.reason ?? "") : "";
    else if (done.firstChild instanceof HTMLProgressElement) done.firstChild.value = share;
    else done.replaceChildren(bar(share, `Done of ${job.name}`));
  }

  /** Looks for new jobs, and at those in sight that have not ended. */
  async refresh() {
    const page = await ask("jobs", { query: { ...this.filters(), limit: PAGE }, signal: this.signal });
    const fresh = page.data.filter((job) => this.wanted(job) && !this.places.has(job.id));
    if (fresh.length) {
      this.rows.unshift(...fresh);
      this.number();
      if (this.box.scrollTop) this.box.scrollTop += fresh.length * ROW_PX; // what is being read stays where it is
    }
    this.schedule();
    page.data.forEach((job) => this.update(job));
    const [first, end] = this.inSight();
    const open = this.rows.slice(first, end).filter((job) => UNFINISHED.has(job.state)).slice(0, MOST_ASKED);
    for (const job of await Promise.all(open.map(({ id }) => ask(`jobs/${id}`, { signal: this.signal })))) {
      this.progress.set(job.id, job.progress);
      this.update(job);
    }
  }

  update(job) {
    const place = this.places.get(job.id);
    if (place === undefined) return;
    const before = this.rows[place].state;
    this.rows[place] = job;
    this.tell(job);
    if (before !== job.state && !UNFINISHED.has(job.state)) announce(`${job.name}: ${job.state}`);
  }
}
