// How the worker is, from GET /health: the line in the header, the facts in the panel, the bar while it loads.

import { bytes } from "./metrics.js";
import { count, make } from "./view.js";

const WORDS = new Map([
  ["healthy", "Ready"],
  ["loading", "Loading"],
  ["unhealthy", "Unhealthy"],
  ["stopping", "Stopping"],
  ["unreachable", "Not reachable"],
]);

export class WorkerView {
  /** @param {Document} page */
  constructor(page) {
    this.name = page.getElementById("model");
    this.status = page.getElementById("status");
    this.loading = page.getElementById("loading");
    this.facts = page.getElementById("facts");
  }

  /** @param {Record<string, any>} health what GET /health answered, or `status` alone where it gave no answer */
  update(health) {
    const { status, percent = 0 } = health;
    const words = WORDS.get(status) ?? status;
    const shown = status === "loading" ? `${words} ${Math.round(percent)} %` : words;
    // a status that did not change is not said again
    if (this.status.textContent !== shown) this.status.textContent = shown;
    this.status.dataset.status = status;
    this.loading.hidden = status !== "loading";
    this.loading.querySelector("progress").value = percent;
    if (health.model) {
      this.name.textContent = health.model;
      this.name.title = health.model;
      document.title = `${health.model} - worker-orcd`;
    }
    if (!health.model) return; // what was known of it is still the best that is
    const rows = [
      ["Model", health.model],
      ["Weights", health.quant_kind],
      ["Device", health.device],
      ["Context", health.context_length && `${count(health.context_length)} tokens`],
      ["Requests together", health.max_seqs && count(health.max_seqs)],
      ["VRAM", health.vram_bytes_used && bytes(health.vram_bytes_used)],
      ["Up", health.uptime_seconds !== undefined && duration(health.uptime_seconds)],
    ];
    const given = rows.filter(([, value]) => value);
    this.facts.replaceChildren(...given.flatMap(([label, value]) => [make("dt", "", label), make("dd", "", value)]));
  }
}

/** @param {number} seconds */
function duration(seconds) {
  const units = [
    [86400, "d"],
    [3600, "h"],
    [60, "min"],
    [1, "s"],
  ];
  const first = units.findIndex(([size]) => seconds >= size);
  if (first === -1) return "0 s";
  let rest = Math.floor(seconds);
  return units
    .slice(first, first + 2)
    .map(([size, name]) => {
      const n = Math.floor(rest / size);
      rest -= n * size;
      return `${n} ${name}`;
    })
    .join(" ");
}
