/** Specs as YAML. */

const PLAIN = /^[A-Za-z][\w./:@-]*$/;
const WORDS = /^(true|false|null|yes|no|on|off|y|n)$/i;

/** Returns a value as YAML that every reader of 1.1 and 1.2 takes for the same; texts are in quotes if need be. */
export function toYaml(value) {
  return `${write(value, "").trimStart()}\n`;
}

function write(value, indent) {
  if (Array.isArray(value)) {
    if (value.every((one) => typeof one !== "object")) return `[${value.map((one) => scalar(one)).join(", ")}]`;
    return value.map((one) => `\n${indent}- ${write(one, `${indent}  `).replace(/^\n\s*/, "")}`).join("");
  }
  if (value === null || typeof value !== "object") return scalar(value);
  const lines = Object.entries(value).map(([name, inner]) => {
    const text = write(inner, `${indent}  `);
    return `\n${indent}${scalar(name)}:${text.startsWith("\n") ? text : ` ${text}`}`;
  });
  return lines.length ? lines.join("") : "{}";
}

function scalar(value) {
  return typeof value === "string" && PLAIN.test(value) && !WORDS.test(value) && !value.endsWith(":") ? value : JSON.stringify(value);
}
