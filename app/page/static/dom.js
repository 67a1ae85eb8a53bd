/** Elements, and how numbers and times are written. Text is only ever set as text. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Returns an element. Of the properties, functions are listeners (`onclick`), `value`, `checked`, `selected` and `open`
 * are set as such, and all else is an attribute, left out where it is null or false.
 * @param {string} tag
 * @param {Object<string, any>} [properties]
 * @param {...(Node|string|number|null|undefined)} children
 */
export function h(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Returns an element of SVG; as `h`. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "selected", "open"].includes(name)) element[name] = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** Replaces what an element holds, if it is other than before; what is the same keeps its focus. */
export function put(element, ...children) {
  const next = h("div", {}, ...children);
  if (element.innerHTML !== next.innerHTML) element.replaceChildren(...next.childNodes);
  return element;
}

/** Returns a table in a box that scrolls by itself; cells are texts or nodes, and numbers stand on the right. */
export function table(caption, heads, rows) {
  const sideOf = (value) => (typeof value === "number" || value === null ? "number" : null);
  const cell = (tag, value, more = {}) => h(tag, { class: sideOf(value), ...more }, sideOf(value) ? show(value) : value);
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
    h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head, place) => h("th", { scope: "col", class: rows.length ? sideOf(rows[0][place]) : null }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value, place) => (place ? cell("td", value) : cell("th", value, { scope: "row" }))))))));
}

/** Says something to those who hear the page. */
export function announce(text) {
  const status = document.getElementById("status");
  if (status.textContent !== text) status.textContent = text;
}

/** Returns a number in few letters. */
export function show(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** Returns bytes in the largest fitting unit. */
export function bytes(value) {
  if (typeof value !== "number") return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = value ? Math.min(4, Math.floor(Math.log10(value) / 3)) : 0;
  return `${power ? (value / 1000 ** power).toFixed(1) : value} ${units[power]}`;
}

/** Returns seconds as hours, minutes and seconds. */
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds)) return "–";
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${seconds < 10 ? Number(seconds.toFixed(1)) : whole} s`;
}

/** Returns a moment in the reader's zone. */
export function when(text) {
  return text ? h("time", { datetime: text }, new Date(text).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" })) : "–";
}

/** Returns the mark of a state; colour is not all that tells it. */
export function badge(state) {
  return h("span", { class: `badge ${state}` }, state);
}

/** Returns a progress bar with what it is of. */
export function bar(share, label) {
  return h("progress", { max: "1", value: share, "aria-label": label }, `${Math.round(100 * share)} %`);
}

/** Returns a text in which what stands between backticks is code. */
export function prose(text) {
  return text.split("`").map((part, place) => (place % 2 ? h("code", {}, part) : part));
}

/** Returns words of a name that is written for machines. */
export function words(name) {
  return name.replaceAll("_", " ");
}
