// The conversation: what has been said in each mode, and the one answer that may be on its way. Requests carry the
// conversation to the worker that served the page and to nobody else.

import { ApiError, complete, isAbort } from "./api.js";
import { read, write } from "./store.js";
import { MessageView } from "./view.js";

/** @typedef {import("./view.js").Message} Message */
/** @typedef {"chat"|"completion"} Mode */

const STORED = "conversation";

export class Chat extends EventTarget {
  /**
   * Fires "change" when an answer begins or ends, or another conversation is shown, and "unauthorized".
   * @param {HTMLElement} log where the messages are shown
   * @param {import("./settings.js").Settings} settings
   */
  constructor(log, settings) {
    super();
    this.log = log;
    this.settings = settings;
    this.model = "default";
    /** @type {Mode} */
    this.mode = "chat";
    this.conversations = kept();
    /** @type {AbortController|null} */
    this.running = null;
    /** @type {MessageView[]} */
    this.views = [];
    this.show();
  }

  /** @returns {Message[]} */
  get messages() {
    return this.conversations[this.mode];
  }

  /** @param {Mode} mode each has its own conversation */
  switchTo(mode) {
    if (this.running !== null || mode === this.mode) return;
    this.mode = mode;
    this.show();
  }

  /** @param {string} text may be empty in completion mode, where the answer then goes on from what there is */
  async send(text) {
    if (this.running !== null) return;
    if (text !== "") this.add({ role: "user", content: text });
    await this.answer();
  }

  /** The last answer once more, from what stood before it. */
  async regenerate() {
    if (this.running !== null || this.messages.length === 0) return;
    if (this.messages[this.messages.length - 1].role === "assistant") {
      this.messages.pop();
      this.views.pop()?.node.remove();
    }
    await this.answer();
  }

  /** Closing the connection cancels the job. */
  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.conversations[this.mode] = [];
    this.keep();
    this.show();
  }

  keep() {
    const empty = this.conversations.chat.length + this.conversations.completion.length === 0;
    write(STORED, empty ? null : this.conversations);
  }

  show() {
    const plain = this.mode === "completion";
    this.views = this.messages.map((m) => new MessageView(m, plain, () => this.regenerate()));
    this.log.replaceChildren(...this.views.map((v) => v.node));
    this.changed();
  }

  changed() {
    this.views.forEach((view, i) => {
      const last = i === this.views.length - 1;
      view.update(last && this.running !== null, last);
    });
    this.log.setAttribute("aria-busy", String(this.running !== null));
    this.dispatchEvent(new Event("change"));
  }

  /** @param {Message} message */
  add(message) {
    const view = new MessageView(message, this.mode === "completion", () => this.regenerate());
    this.messages.push(message);
    this.views.push(view);
    this.log.append(view.node);
    return view;
  }

  /** Asks for an answer to what has been said. Never rejects: what goes wrong is shown in its place. */
  async answer() {
    const [path, body] = this.request();
    const running = new AbortController();
    this.running = running;
    /** @type {Message} */
    const message = { role: "assistant", content: "", finish: null };
    const view = this.add(message);
    this.changed();
    this.keep();
    try {
      await this.receive(complete(path, body, running.signal), message, view);
    } catch (error) {
      if (isAbort(error)) message.finish = "stopped";
      else message.error = describe(error);
    }
    // a conversation that was cleared meanwhile has nothing to do with this answer
    if (this.running === running) this.running = null;
    this.changed();
    this.keep();
    if (message.error?.status === 401) this.dispatchEvent(new Event("unauthorized"));
  }

  /**
   * @param {AsyncIterable<import("./api.js").Piece>} pieces
   * @param {Message} message takes them
   * @param {MessageView} view
   */
  async receive(pieces, message, view) {
    const began = performance.now();
    let first = 0;
    let frame = 0;
    const figures = { tokens: 0, counted: false, firstMs: null, rate: null, prompt: null, cached: null };
    message.figures = figures;
    try {
      for await (const piece of pieces) {
        const now = performance.now();
        message.content += piece.text;
        if (piece.reasoning) message.reasoning = (message.reasoning ?? "") + piece.reasoning;
        if (piece.finish !== null) message.finish = piece.finish;
        if (piece.text || piece.reasoning) {
          first ||= now;
          figures.firstMs = first - began;
          figures.tokens += 1;
        }
        if (piece.usage !== null) count(figures, piece.usage);
        if (now > first && first > 0 && figures.tokens > 1 && (piece.text || piece.reasoning || piece.usage)) {
          figures.rate = (1000 * (figures.tokens - 1)) / (now - first);
        }
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          view.update(true, true);
          this.dispatchEvent(new Event("progress"));
        });
      }
    } finally {
      cancelAnimationFrame(frame);
    }
  }

  /** @returns {["v1/chat/completions"|"v1/completions", object]} the route and the body of the next request */
  request() {
    const common = {
      model: this.model,
      stream: true,
      stream_options: { include_usage: true },
      ...this.settings.values(),
    };
    if (this.mode === "completion") {
      return ["v1/completions", { ...common, prompt: this.messages.map((m) => m.content).join("") }];
    }
    const { system } = this.settings;
    const messages = system === "" ? [] : [{ role: "system", content: system }];
    return ["v1/chat/completions", { ...common, messages: [...messages, ...turns(this.messages)] }];
  }
}

/**
 * What has been said, as turns that alternate, which templates insist on: an answer that never came leaves two questions.
 * @param {Message[]} messages
 */
function turns(messages) {
  /** @type {{role: string, content: string}[]} */
  const out = [];
  for (const { role, content } of messages) {
    const last = out[out.length - 1];
    if (content === "") continue;
    if (last?.role === role) last.content += `\n\n${content}`;
    else out.push({ role, content });
  }
  return out;
}

/**
 * @param {import("./view.js").Figures} figures
 * @param {import("./api.js").Usage} usage
 */
function count(figures, usage) {
  figures.tokens = usage.completion_tokens;
  figures.counted = true;
  figures.prompt = usage.prompt_tokens;
  figures.cached = usage.prompt_tokens_details?.cached_tokens ?? null;
}

/** @param {unknown} error */
function describe(error) {
  const { message, status, code, id, retryAfter } = error instanceof ApiError ? error : new ApiError(String(error));
  return { message, status, code, id, retryAfter };
}

/** @returns {Record<Mode, Message[]>} the conversations of the last visit, as far as they are what this page writes */
function kept() {
  const found = read(STORED) ?? {};
  const list = (messages) => (Array.isArray(messages) ? messages.filter(sound).map(known) : []);
  return { chat: list(found.chat), completion: list(found.completion) };
}

/** @param {any} message */
function sound(message) {
  return (message?.role === "user" || message?.role === "assistant") && typeof message.content === "string";
}

/**
 * @param {any} message
 * @returns {Message}
 */
function known({ role, content, reasoning, finish, figures, error }) {
  const isFigure = (value) => value === null || typeof value === "number" || typeof value === "boolean";
  return {
    role,
    content,
    finish: typeof finish === "string" ? finish : null,
    ...(typeof reasoning === "string" && { reasoning }),
    ...(typeof figures?.tokens === "number" && Object.values(figures).every(isFigure) && { figures }),
    ...(typeof error?.message === "string" && { error }),
  };
}
