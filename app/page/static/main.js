/** The key, the colours, and which view the address names. */

import { ApiError, ask, forgetKey, getKey, keepKey } from "./api.js";
import { announce, h } from "./dom.js";

const VIEWS = {
  jobs: () => import("./jobs.js"),
  job: () => import("./job.js"),
  new: () => import("./submit.js"),
  results: () => import("./results.js"),
  try: () => import("./try.js"),
  datasets: () => import("./datasets.js"),
  models: () => import("./models.js"),
  methods: () => import("./methods.js"),
};
const main = document.getElementById("main");
const [nav, leave, theme] = [document.querySelector("nav"), document.getElementById("leave"), document.getElementById("theme")];
let leaving = new AbortController();

/** Shows the view of the address; what the one before had begun is ended. */
async function open() {
  takeKey();
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  nav.hidden = leave.hidden = !getKey();
  if (!getKey()) return askForKey();
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const view = name === "jobs" && rest[0] ? "job" : name in VIEWS ? name : "jobs";
  for (const link of nav.children) {
    const isHere = link.hash === `#/${view === "job" ? "jobs" : view}`;
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const { title, render } = await VIEWS[view]();
  if (signal.aborted) return;
  const heading = h("h1", { tabindex: "-1" }, title);
  const place = h("div", {});
  main.replaceChildren(heading, place);
  document.title = `${title} – Stillhouse`;
  heading.focus({ preventScroll: true });
  scrollTo(0, 0);
  try {
    await render(place, { parts: rest, signal, heading });
  } catch (error) {
    if (!signal.aborted) place.prepend(problem(error));
  }
}

function problem(error) {
  const id = error instanceof ApiError && error.requestId ? ` (request ${error.requestId})` : "";
  return h("p", { class: "problem", role: "alert" }, `${error.message}${id}`);
}

/** Takes a key out of the address's fragment, which no server ever sees, and wipes it there. */
function takeKey() {
  const found = location.hash.match(/^#key=(\S+)$/);
  if (!found) return;
  keepKey(decodeURIComponent(found[1]), false);
  history.replaceState(null, "", "#/jobs");
}

function askForKey(why = "") {
  const key = h("input", { type: "password", id: "key", autocomplete: "off", required: true, "aria-describedby": "key-hint key-problem" });
  const remember = h("input", { type: "checkbox", id: "remember" });
  const wrong = h("p", { id: "key-problem", class: "problem", role: "alert", hidden: !why }, why);
  const heading = h("h1", { tabindex: "-1" }, "Your API key");
  async function submit(event) {
    event.preventDefault();
    keepKey(key.value.trim(), remember.checked);
    try {
      await ask("jobs", { query: { limit: 1 } });
      open();
    } catch (error) {
      forgetKey();
      wrong.hidden = false;
      wrong.textContent = error.message;
      key.setAttribute("aria-invalid", "true");
      key.focus();
    }
  }
  document.title = "Your API key – Stillhouse";
  main.replaceChildren(heading, h("form", { onsubmit: submit, class: "narrow" },
    h("p", { id: "key-hint" }, "It begins with sk_. `stillhouse up` prints one, and a link with it in; on a server its operator makes one."),
    h("p", {}, h("label", { for: "key" }, "API key"), key),
    h("p", {}, remember, h("label", { for: "remember" }, "Remember it on this computer, not only in this tab")),
    wrong, h("button", { type: "submit" }, "Open")));
  heading.focus();
}

function paint() {
  document.documentElement.dataset.theme = theme.value = localStorage.getItem("stillhouse-theme") ?? "";
}

theme.addEventListener("change", () => {
  localStorage.setItem("stillhouse-theme", theme.value);
  paint();
});
leave.addEventListener("click", () => {
  forgetKey();
  announce("The key is forgotten.");
  open();
});
document.addEventListener("key-refused", (event) => {
  if (nav.hidden) return;
  forgetKey();
  leaving.abort();
  nav.hidden = leave.hidden = true;
  askForKey(event.detail);
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the fragment names a view
  main.focus();
});
window.addEventListener("hashchange", open);
paint();
open();
