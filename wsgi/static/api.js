// Calls of the worker: HTTP, its errors, its streams of events, and the API key. Knows nothing of the document.

/**
 * A piece of an answer, as it came.
 * @typedef {object} Piece
 * @property {string} text
 * @property {string} reasoning what the model thinks before it answers
 * @property {string|null} finish why the answer ended: stop, length, ...
 * @property {Usage|null} usage token counts, with the last piece
 */
/** @typedef {{prompt_tokens: number, completion_tokens: number, prompt_tokens_details?: {cached_tokens?: number}}} Usage */
/** @typedef {{status?: number, code?: string, id?: string, retryAfter?: number}} Details */

const KEY = "worker-orcd.key";
const UNREACHABLE = "The worker cannot be reached. Is it running, and is this machine connected to it?";
const CUT_OFF = "The connection was lost before the answer was complete.";

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // storage is switched off: the key is asked for again after a reload
}

/** What a call can end with, beside an AbortError: `status` is 0 where there was no answer. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {Details} [details]
   */
  constructor(message, { status = 0, code = "", id = "", retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.id = id;
    this.retryAfter = retryAfter;
  }
}

/**
 * Takes the key that the next calls carry; "" forgets it. It is kept as long as the tab is.
 * @param {string} given
 * @returns {boolean} whether it is one that a header can hold
 */
export function setKey(given) {
  if (!/^[\x21-\x7e]*$/.test(given)) return false;
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // as above
  }
  return true;
}

/** @param {unknown} error */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

/**
 * GET /health, which says how the worker is with any status.
 * @returns {Promise<Record<string, any>>}
 */
export async function health() {
  const response = await call("health", { signal: AbortSignal.timeout(5000) });
  const facts = await response.json().catch(() => null);
  if (facts === null || typeof facts.status !== "string") throw await errorOf(response);
  return facts;
}

/**
 * GET /metrics.
 * @returns {Promise<string>} Prometheus text
 */
export async function metrics() {
  const response = await call("metrics", { signal: AbortSignal.timeout(5000) });
  if (!response.ok) throw await errorOf(response);
  return response.text();
}

/**
 * An answer as it is written. Aborting `signal` closes the connection, which cancels the job.
 * @param {"v1/chat/completions"|"v1/completions"} path
 * @param {object} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Piece>}
 */
export async function* complete(path, body, signal) {
  const response = await call(path, { signal, method: "POST", body: JSON.stringify(body) });
  if (!response.ok) throw await errorOf(response);
  const id = response.headers.get("X-Correlation-Id") ?? "";
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The worker sent something that is no answer.", { status: response.status, id });
    }
    if (chunk.error) throw told(chunk, response.status, id);
    const choice = chunk.choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new ApiError(CUT_OFF, { id });
}

/**
 * @param {string} path relative, so that the page works below any prefix
 * @param {RequestInit} init
 */
async function call(path, init) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (init.body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { ...init, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError(UNREACHABLE);
  }
}

/**
 * The data of each server-sent event; comments and other fields are passed over.
 * @param {Response} response
 * @returns {AsyncGenerator<string>}
 */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  /** @type {string[]} */
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines.map((l) => l.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error instanceof ApiError || isAbort(error)) throw error;
    throw new ApiError(CUT_OFF);
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}

/** @param {Response} response one that is no success */
async function errorOf(response) {
  const id = response.headers.get("X-Correlation-Id") ?? "";
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  const text = response.bodyUsed ? "" : await response.text().catch(() => "");
  try {
    return told(JSON.parse(text), response.status, id, retryAfter);
  } catch {
    const message = `The worker answered ${response.status} ${response.statusText}`.trim();
    return new ApiError(`${message}.`, { status: response.status, id, retryAfter });
  }
}

/**
 * An error in OpenAI's shape, or in that of the worker's own routes.
 * @param {any} body
 * @param {number} status
 * @param {string} id
 * @param {number} [retryAfter] seconds
 */
function told(body, status, id, retryAfter = 0) {
  const error = body.error ?? body;
  if (typeof error.message !== "string") throw new TypeError("no message");
  return new ApiError(error.message, { status, code: String(error.code ?? error.type ?? ""), id, retryAfter });
}
