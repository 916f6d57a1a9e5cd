// One message on the screen: its text, what can be done with it, its figures and its error.

import { MarkdownView } from "./markdown.js";

/**
 * @typedef {object} Figures of one answer
 * @property {number} tokens
 * @property {boolean} counted by the worker; before, it is the number of pieces that came
 * @property {number|null} firstMs until the first piece
 * @property {number|null} rate tokens/s after the first
 * @property {number|null} prompt tokens of the prompt
 * @property {number|null} cached of those, taken from the prefix cache
 */
/**
 * @typedef {object} Message
 * @property {"user"|"assistant"} role
 * @property {string} content
 * @property {string} [reasoning]
 * @property {string|null} [finish] why the answer ended; "stopped" where a person ended it
 * @property {Figures} [figures]
 * @property {{message: string, status: number, code: string, id: string, retryAfter: number}} [error]
 */

/** What an error is called, by its status. */
const TITLES = new Map([
  [0, "No connection"],
  [200, "The answer broke off"],
  [401, "An API key is needed"],
  [403, "Not allowed"],
  [404, "Not offered by this worker"],
  [413, "Too long"],
  [429, "The worker is busy"],
  [503, "The worker is not ready"],
  [504, "Out of time"],
]);
const ENDS = new Map([
  ["length", "ended at the token limit"],
  ["stopped", "stopped"],
]);

/**
 * @param {string} name
 * @param {string} [className]
 * @param {string} [text]
 * @returns {any}
 */
export function make(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

export class MessageView {
  /**
   * @param {Message} message
   * @param {boolean} plain whether the text is shown as it is, without Markdown
   * @param {() => void} again makes the answer anew
   */
  constructor(message, plain, again) {
    this.message = message;
    this.shown = "";
    this.node = make("article", `message ${message.role}`);
    this.node.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
    this.thoughts = make("details", "thoughts");
    this.thoughts.append(make("summary", "", "Thoughts"), make("p"));
    this.text = make("div", "text");
    this.markdown = plain || message.role === "user" ? null : new MarkdownView(this.text);
    this.text.classList.toggle("verbatim", this.markdown === null);
    this.problem = make("div", "problem");
    this.problem.setAttribute("role", "alert");
    this.figures = make("p", "figures");
    this.copy = button("Copy", () => this.copied());
    this.again = button("Regenerate", again);
    const actions = make("div", "actions");
    actions.append(this.copy, ...(message.role === "assistant" ? [this.again] : []));
    const foot = make("div", "foot");
    foot.append(this.figures, actions);
    this.node.append(this.thoughts, this.text, this.problem, foot);
    this.update(false, false);
  }

  /**
   * @param {boolean} busy whether the answer is being written
   * @param {boolean} last whether it is the last of the conversation
   */
  update(busy, last) {
    const { content, reasoning, error, figures, finish } = this.message;
    this.node.classList.toggle("busy", busy);
    this.thoughts.hidden = !reasoning;
    if (reasoning) this.thoughts.lastElementChild.textContent = reasoning;
    if (busy && reasoning) this.thoughts.open = content === "";
    // what is shown already stays as it is, and with it what a person has selected there
    if (content !== this.shown && this.markdown === null) this.text.textContent = content;
    else if (content !== this.shown) this.markdown.update(content);
    this.shown = content;
    this.problem.hidden = !error;
    if (error && !this.problem.hasChildNodes()) this.problem.append(...describe(error));
    const shown = [...(figures ? describeFigures(figures) : []), ...(ENDS.has(finish) ? [ENDS.get(finish)] : [])];
    if (busy && content === "" && !reasoning) shown.unshift("waiting for the first token");
    this.figures.replaceChildren(...shown.map((words) => make("span", "", words)));
    this.copy.hidden = busy || content === "";
    this.again.hidden = busy || !last;
    this.again.textContent = error ? "Try again" : "Regenerate";
  }

  async copied() {
    const done = await copy(this.message.content);
    this.copy.textContent = done ? "Copied" : "Could not copy";
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }
}

/**
 * @param {string} label
 * @param {() => void} onClick
 */
function button(label, onClick) {
  const made = make("button", "quiet", label);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

/** @param {NonNullable<Message["error"]>} error */
function describe(error) {
  const title = TITLES.get(error.status) ?? (error.status >= 500 ? "The worker failed" : "The request was refused");
  const parts = [make("strong", "", title), make("p", "", error.message)];
  if (error.retryAfter > 0) parts.push(make("p", "", `Try again in ${error.retryAfter} s.`));
  const small = [error.status >= 400 && error.status, error.code, error.id && `correlation id ${error.id}`].filter(Boolean);
  if (small.length > 0) parts.push(make("small", "", small.join(" · ")));
  return parts;
}

/** @param {Figures} figures */
function describeFigures({ tokens, counted, firstMs, rate, prompt, cached }) {
  const parts = [];
  if (tokens > 0) parts.push(`${counted ? "" : "~"}${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate !== null) parts.push(`${short(rate)} tokens/s`);
  if (firstMs !== null) parts.push(`first token ${firstMs < 1000 ? `${Math.round(firstMs)} ms` : seconds(firstMs)}`);
  if (prompt !== null) parts.push(`prompt ${count(prompt)}${cached ? `, ${count(cached)} cached` : ""}`);
  return parts;
}

/** @param {number} n */
export function count(n) {
  return Math.round(n).toLocaleString("en");
}

/** @param {number} n a rate */
export function short(n) {
  return n < 100 ? n.toFixed(1) : count(n);
}

/** @param {number} ms */
function seconds(ms) {
  return `${(ms / 1000).toFixed(1)} s`;
}

/**
 * To the clipboard; pages that are neither local nor encrypted have no clipboard of their own.
 * @param {string} text
 * @returns {Promise<boolean>}
 */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", "hidden");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
