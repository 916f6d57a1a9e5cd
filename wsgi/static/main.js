// The page: puts its parts together, and asks the worker how it is while somebody looks.

import { ApiError, health, metrics, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { Metrics } from "./metrics.js";
import { Settings } from "./settings.js";
import { WorkerView } from "./worker.js";

const POLL_MS = 2000;
const LOADING_POLL_MS = 500;

/** @param {string} id */
const byId = (id) => /** @type {any} */ (document.getElementById(id));
const wide = matchMedia("(min-width: 60rem)");

const settings = new Settings(byId("settings"));
const chat = new Chat(byId("log"), settings);
const worker = new WorkerView(document);
const figures = new Metrics(byId("metrics"));
const prompt = byId("prompt");
let status = "";
let modeChosen = false;
let keyWanted = false;
let hasMetrics = true;
/** @type {string|null|undefined} */
let template;

// -- the conversation

function refresh() {
  const busy = chat.running !== null;
  const completion = chat.mode === "completion";
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("send").disabled = status === "loading";
  byId("clear").disabled = chat.messages.length === 0;
  byId("mode").disabled = busy;
  byId("empty").hidden = chat.messages.length > 0;
  byId("system-field").hidden = completion;
  byId("no-template").hidden = template !== null;
  byId("lead").textContent = completion ? "Begin a text" : "Start a conversation";
  prompt.placeholder = completion ? "Text to be continued" : "Ask something";
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.checked = radio.value === chat.mode;
}

const page = byId("scroll");
let atEnd = true;

/** Stays at the end of the conversation where the reader is there. */
function follow() {
  if (atEnd) page.scrollTop = page.scrollHeight;
}

page.addEventListener("scroll", () => (atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 48));
new ResizeObserver(follow).observe(page);

function send() {
  const text = chat.mode === "completion" ? prompt.value : prompt.value.trim();
  const goesOn = chat.mode === "completion" && chat.messages.length > 0;
  if (chat.running !== null || status === "loading" || (text === "" && !goesOn)) return;
  const invalid = settings.invalid();
  if (invalid !== null) {
    showPanel(true);
    invalid.reportValidity();
    return;
  }
  prompt.value = "";
  grow();
  atEnd = true;
  chat.send(text);
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

chat.addEventListener("change", refresh);
chat.addEventListener("change", follow);
chat.addEventListener("progress", follow);
chat.addEventListener("unauthorized", () => {
  askForKey();
  byId("key-field").focus();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  const breaks = event.shiftKey || event.isComposing || matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || (breaks && !event.ctrlKey && !event.metaKey)) return;
  event.preventDefault();
  send();
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", () => {
  chat.stop();
  prompt.focus();
});
byId("clear").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});
byId("mode").addEventListener("change", (event) => {
  modeChosen = true;
  chat.switchTo(event.target.value);
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (!wide.matches && !byId("panel").hidden) showPanel(false);
  else chat.stop();
});
addEventListener("pagehide", () => chat.keep());

// -- the panel: beside the conversation where there is room, over it where there is none

/** @param {boolean} open */
function setPanel(open) {
  byId("panel").hidden = !open;
  byId("panel-toggle").setAttribute("aria-expanded", String(open));
}

/** @param {boolean} open what a person asked for: the focus goes along where one covers the other */
function showPanel(open) {
  setPanel(open);
  if (!wide.matches) (open ? byId("panel") : byId("panel-toggle")).focus();
}

byId("panel-toggle").addEventListener("click", () => showPanel(byId("panel").hidden));
byId("panel-close").addEventListener("click", () => showPanel(false));
wide.addEventListener("change", () => setPanel(wide.matches));
setPanel(wide.matches);

// -- the API key

function askForKey() {
  keyWanted = true;
  byId("key").hidden = false;
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const taken = setKey(byId("key-field").value.trim());
  byId("key-problem").hidden = taken;
  if (!taken) return;
  keyWanted = false;
  byId("key").hidden = true;
  byId("key-field").value = "";
  const { messages } = chat;
  if (messages[messages.length - 1]?.error?.status === 401) chat.regenerate();
  look();
  prompt.focus();
});

// -- how the worker is

async function lookAtHealth() {
  const facts = await health().catch(({ status }) => ({ status: status ? `Refused (${status})` : "unreachable" }));
  const before = status;
  status = facts.status;
  worker.update(facts);
  if (facts.model) chat.model = facts.model;
  if (facts.chat_template_sha256 !== undefined && status !== "loading") template = facts.chat_template_sha256;
  if (template === null && !modeChosen) chat.switchTo("completion");
  if (before !== status || template === null) refresh();
}

async function lookAtMetrics() {
  if (status !== "healthy" || keyWanted || !hasMetrics) return;
  try {
    figures.update(await metrics());
  } catch (error) {
    figures.hide();
    if (error instanceof ApiError && error.status === 401) askForKey();
    if (error instanceof ApiError && error.status === 404) hasMetrics = false;
  }
}

let timer = 0;
let looking = false;

/** Asks now, and again as long as the page is seen. */
async function look() {
  clearTimeout(timer);
  if (looking || document.visibilityState !== "visible") return;
  looking = true;
  await lookAtHealth();
  await lookAtMetrics();
  looking = false;
  timer = setTimeout(look, status === "loading" ? LOADING_POLL_MS : POLL_MS);
}

document.addEventListener("visibilitychange", look);
refresh();
grow();
look();
follow();
if (wide.matches) prompt.focus();
