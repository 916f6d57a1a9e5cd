// The sampling settings: a form whose empty fields are left to the worker. Knows nothing of HTTP.

import { read, write } from "./store.js";

const STORED = "settings";

export class Settings {
  /** @param {HTMLFormElement} form its fields bear the names of the request's */
  constructor(form) {
    this.form = form;
    /** @type {(HTMLInputElement|HTMLTextAreaElement)[]} */
    this.fields = [...form.querySelectorAll("input, textarea")];
    const kept = read(STORED) ?? {};
    for (const field of this.fields) {
      if (typeof kept[field.name] === "string") field.value = kept[field.name];
    }
    form.addEventListener("input", () => this.keep());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => this.keep()));
  }

  keep() {
    const filled = this.fields.filter((f) => f.value !== "");
    write(STORED, filled.length > 0 ? Object.fromEntries(filled.map((f) => [f.name, f.value])) : null);
  }

  /** The first field whose value cannot be sent, or null. */
  invalid() {
    return this.fields.find((f) => !f.checkValidity()) ?? null;
  }

  /** @returns {string} */
  get system() {
    return this.form.elements.namedItem("system").value.trim();
  }

  /**
   * What a request carries of them.
   * @returns {Record<string, number|string[]>}
   */
  values() {
    /** @type {Record<string, number|string[]>} */
    const out = {};
    for (const field of this.fields) {
      if (field.name === "stop") {
        const stops = field.value.split("\n").filter((line) => line !== "");
        if (stops.length > 0) out.stop = stops.map(unescape);
      } else if (field.type === "number" && field.value !== "") {
        out[field.name] = field.valueAsNumber;
      }
    }
    return out;
  }
}

/**
 * A stop string as it was meant: a field of lines cannot hold a line break.
 * @param {string} line
 */
function unescape(line) {
  return line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]);
}
