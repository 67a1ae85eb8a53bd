/** The public API, as any client speaks to it; the key is sent in a header alone. */

const KEY = "stillhouse-key";
const SLOWEST_MS = 30000;

/** What the server says is wrong. */
export class ApiError extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `The server answers ${status}.`);
    Object.assign(this, { status, code: error.code, details: error.details ?? [], requestId: error.request_id });
  }
}

/** Returns the key that was given, or null. */
export function getKey() {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
}

/** Keeps a key until the tab is closed, or for good. */
export function keepKey(key, remember) {
  forgetKey();
  (remember ? localStorage : sessionStorage).setItem(KEY, key);
}

/** Forgets the key. */
export function forgetKey() {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
}

async function send(path, { method = "GET", query = {}, body, headers = {}, signal } = {}) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== ""));
  const address = `v1/${path}${asked.size ? `?${asked}` : ""}`;
  const type = body === undefined ? {} : { "Content-Type": "application/json" };
  const answer = await fetch(address, {
    method, signal, headers: { Authorization: `Bearer ${getKey()}`, ...type, ...headers }, body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (answer.ok) return answer;
  throw refused(answer.status, await answer.text());
}

function refused(status, text) {
  let error = {};
  try {
    error = JSON.parse(text).error;
  } catch {
    // a proxy's page: the status is all there is to say
  }
  const found = new ApiError(status, error);
  if (status === 401) document.dispatchEvent(new CustomEvent("key-refused", { detail: found.message }));
  return found;
}

/**
 * Returns the parsed answer of `/v1/<path>`, null if it is empty. Raises ApiError.
 * @param {string} path
 * @param {{method?: string, query?: Object, body?: any, signal?: AbortSignal}} [options]
 */
export async function ask(path, options) {
  const answer = await send(path, options);
  return answer.status === 204 ? null : answer.json();
}

/** Returns every row of a list, all of its pages. */
export async function askAll(path, { query = {}, signal, most = 1000 } = {}) {
  const rows = [];
  let after = null;
  do {
    const page = await ask(path, { query: { ...query, limit: 100, after }, signal });
    rows.push(...page.data);
    after = page.next_cursor;
  } while (after && rows.length < most);
  return rows;
}

/** Yields the events of a job from the first one on, as they happen, and goes on after breaks; ends with the job. */
export async function* follow(jobId, signal) {
  let last = 0;
  let pause = 500;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", "Last-Event-ID": String(last) };
      const answer = await send(`jobs/${jobId}/events`, { headers, signal });
      for await (const frame of frames(answer.body)) {
        if (frame.event === "done") return;
        last = Number(frame.id);
        pause = 500;
        yield JSON.parse(frame.data);
      }
    } catch (error) {
      if (signal.aborted || (error instanceof ApiError && error.status < 500)) throw error;
    }
    await sleep(pause, signal);
    pause = Math.min(2 * pause, SLOWEST_MS);
  }
}

async function* frames(body) {
  let text = "";
  for await (const part of parts(body.pipeThrough(new TextDecoderStream()))) {
    const whole = (text + part).split("\n\n");
    text = whole.pop();
    for (const block of whole) {
      const lines = block.split("\n").filter((line) => !line.startsWith(":")).map((line) => line.match(/^(\w+): ?(.*)$/s));
      const frame = Object.fromEntries(lines.filter(Boolean).map(([, name, value]) => [name, value]));
      if (frame.data !== undefined) yield frame;
    }
  }
}

async function* parts(stream) {
  const reader = stream.getReader(); // not every browser takes a stream for a list
  for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
}

/** Waits, or raises as soon as the signal is given. */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/**
 * Calls `look` again and again until it returns true; after a failure it waits longer each time, and it rests while
 * nobody sees the page.
 */
export async function poll(look, everyMs, signal) {
  let pause = everyMs;
  while (!signal.aborted) {
    try {
      if (!document.hidden && (await look())) return;
      pause = everyMs;
    } catch (error) {
      if (signal.aborted || (error instanceof ApiError && error.status < 500)) throw error;
      pause = Math.min(2 * pause, SLOWEST_MS);
    }
    await sleep(pause, signal);
  }
}

/** Returns the answer to a form that is uploaded; `onProgress` is told the share that is sent. Raises ApiError. */
export function upload(path, form, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how much it has sent
    request.open("POST", `v1/${path}`);
    request.setRequestHeader("Authorization", `Bearer ${getKey()}`);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () => (request.status < 300 ? resolve(JSON.parse(request.responseText)) : reject(refused(request.status, request.responseText)));
    request.onerror = () => reject(new Error("The connection broke."));
    request.send(form);
  });
}

/** Saves what `/v1/<path>` answers as a file; `onProgress` is told the share that is there. Raises ApiError. */
export async function download(path, name, onProgress) {
  const answer = await send(path);
  const total = Number(answer.headers.get("Content-Length"));
  const saved = [];
  let count = 0;
  for await (const part of parts(answer.body)) {
    saved.push(part);
    count += part.length;
    onProgress(total ? count / total : 0);
  }
  const address = URL.createObjectURL(new Blob(saved));
  const link = document.createElement("a");
  Object.assign(link, { href: address, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}
