/** Plots of SVG; each stands beside a table with the same numbers. */

import { h, show, svg } from "./dom.js";

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [420, 220, 56, 34, 10, 14];

/** A scale from values to places, along a line or by powers of ten. */
function scale(values, from, to, isLog = false) {
  const of = isLog ? Math.log10 : (value) => value;
  let [low, high] = [Math.min(...values), Math.max(...values)].map(of);
  if (low === high) [low, high] = [low - (isLog ? 0.3 : Math.abs(low) * 0.05 || 1), high + (isLog ? 0.3 : Math.abs(high) * 0.05 || 1)];
  const place = (value) => from + ((of(value) - low) / (high - low)) * (to - from);
  const ticks = [0, 0.5, 1].map((share) => low + share * (high - low)).map((value) => (isLog ? 10 ** value : value));
  return { place, ticks };
}

function axes(x, y, labels, showX = show) {
  const floor = HEIGHT - BOTTOM;
  return [
    svg("path", { class: "axis", d: `M${LEFT} ${TOP}V${floor}H${WIDTH - RIGHT}` }),
    x.ticks.map((tick, place) => svg("text", { x: x.place(tick), y: floor + 14, "text-anchor": ["start", "middle", "end"][place] }, showX(tick))),
    y.ticks.map((tick) => svg("text", { x: LEFT - 5, y: y.place(tick) + 4, "text-anchor": "end" }, show(Number(tick.toPrecision(3))))),
    svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, labels.x),
  ];
}

/**
 * Returns a curve with its numbers in a table.
 * @param {string} name
 * @param {[number, number|null][]} points steps and values; one that is not finite is null
 */
export function curve(name, points) {
  const known = points.filter(([, value]) => value !== null);
  if (!known.length) return h("figure", {}, h("figcaption", {}, name), h("p", {}, "No finite value."));
  const [x, y] = [scale(known.map(([step]) => step), LEFT, WIDTH - RIGHT), scale(known.map(([, value]) => value), HEIGHT - BOTTOM, TOP)];
  const values = known.map(([, value]) => value);
  const told = `${name}: from ${show(values[0])} to ${show(values.at(-1))} in ${points.length} points, least ${show(Math.min(...values))}, most ${show(Math.max(...values))}`;
  const path = known.map(([step, value], place) => `${place ? "L" : "M"}${x.place(step).toFixed(1)} ${y.place(value).toFixed(1)}`).join("");
  const mark = known.length === 1 ? svg("circle", { class: "mark", cx: x.place(known[0][0]), cy: y.place(values[0]), r: 3 }) : null;
  return h("figure", {},
    h("figcaption", {}, name),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": told }, axes(x, y, { x: "step" }), svg("path", { class: "line", d: path }), mark),
    numbers(name, points));
}

function numbers(name, points) {
  const rows = h("tbody", {});
  const box = h("div", { class: "scroll short", tabindex: "0", role: "group", "aria-label": `${name}, numbers` },
    h("table", {}, h("thead", {}, h("tr", {}, ["Step", "Value"].map((head) => h("th", { scope: "col" }, head)))), rows));
  const fill = (event) => {
    if (event.target.open) rows.replaceChildren(...points.map(([step, value]) => h("tr", {}, h("td", { class: "number" }, step), h("td", { class: "number" }, show(value)))));
  };
  return h("details", { ontoggle: fill }, h("summary", {}, `Numbers of ${name}`), box);
}

/**
 * Returns points in a plane, each a link that says where it is when it is pointed at or has the focus.
 * @param {{x: number, y: number, label: string, href: string, kind: string}[]} points
 * @param {{x: string, y: string, showX: Function}} labels
 */
export function scatter(points, labels) {
  const x = scale(points.map((point) => point.x), LEFT + 10, WIDTH - RIGHT - 6, true);
  const y = scale(points.map((point) => point.y), HEIGHT - BOTTOM - 6, TOP + 6);
  const said = h("p", { class: "said", "aria-hidden": "true" }, "Point at a mark, or move to it with the Tab key.");
  const marks = points.map((point) => {
    const tell = () => (said.textContent = point.label);
    const place = `translate(${x.place(point.x).toFixed(1)} ${y.place(point.y).toFixed(1)})`;
    return svg("a", { href: point.href, "aria-label": point.label, onfocus: tell, onmouseenter: tell, transform: place, class: `mark ${point.kind}` },
      shape(point.kind), svg("circle", { class: "ring", r: 9 }));
  });
  const frame = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": `${labels.y} against ${labels.x}` }, axes(x, y, labels, labels.showX), marks);
  return h("figure", { class: "large" }, h("figcaption", {}, `${labels.y} against ${labels.x}`), frame, said);
}

function shape(kind) {
  if (kind === "teacher") return svg("rect", { x: -5, y: -5, width: 10, height: 10 });
  if (kind === "student") return svg("circle", { r: 5 });
  return svg("path", { d: "M0 -6L6 5H-6Z" });
}
