// What GET /metrics says, as figures on the screen. A metric that the worker does not have is not shown.

import { count, make, short } from "./view.js";

const PREFIX = "worker_orcd_";
const N_POINTS = 60;
const SVG = "http://www.w3.org/2000/svg";

/** @typedef {{labels: Record<string, string>, value: number}} Sample */
/** @typedef {Map<string, Sample[]>} Samples by name, without the prefix */

/**
 * @param {string} text Prometheus text
 * @returns {Samples}
 */
export function parse(text) {
  /** @type {Samples} */
  const samples = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (found === null || !found[1].startsWith(PREFIX)) continue;
    const name = found[1].slice(PREFIX.length);
    const pairs = (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g);
    const sample = { labels: Object.fromEntries([...pairs].map((p) => [p[1], p[2]])), value: Number(found[3]) };
    if (Number.isNaN(sample.value)) continue;
    if (!samples.has(name)) samples.set(name, []);
    samples.get(name).push(sample);
  }
  return samples;
}

/**
 * The sum over the labels of a metric, or null where there is none.
 * @param {Samples} samples
 * @param {string} name
 */
function total(samples, name) {
  return samples.get(name)?.reduce((sum, s) => sum + s.value, 0) ?? null;
}

/** The counters between two looks, as a rate; a worker that began anew counts from nothing. */
class Rate {
  constructor() {
    /** @type {number|null} */
    this.before = null;
    this.at = 0;
  }

  /**
   * @param {number|null} value
   * @param {number} now milliseconds
   * @returns {number|null} per second
   */
  next(value, now) {
    const { before, at } = this;
    this.before = value;
    this.at = now;
    return value === null || before === null || value < before ? null : (1000 * (value - before)) / (now - at);
  }
}

export class Metrics {
  /** @param {HTMLElement} panel hidden until there is something to show */
  constructor(panel) {
    this.panel = panel;
    this.generated = new Rate();
    this.prompted = new Rate();
    /** @type {number[]} */
    this.points = [];
    this.rate = make("strong", "rate", "–");
    const head = make("p", "throughput");
    head.append(this.rate, make("span", "", "tokens/s, all requests"));
    this.line = document.createElementNS(SVG, "polyline");
    const chart = document.createElementNS(SVG, "svg");
    chart.setAttribute("viewBox", `0 0 ${N_POINTS - 1} 20`);
    chart.setAttribute("preserveAspectRatio", "none");
    chart.setAttribute("aria-hidden", "true");
    chart.append(this.line);
    this.list = make("dl");
    this.bars = make("div", "bars");
    panel.append(head, chart, this.list, this.bars);
    this.head = [head, chart];
  }

  /** @param {string} text Prometheus text */
  update(text) {
    const samples = parse(text);
    const now = performance.now();
    const generated = total(samples, "generation_tokens_total");
    const rate = this.generated.next(generated, now);
    const prompted = this.prompted.next(total(samples, "prompt_tokens_total"), now);
    for (const node of this.head) node.toggleAttribute("hidden", generated === null);
    if (rate !== null) this.draw(rate);
    const rows = [
      ["Running", total(samples, "num_requests_running"), count],
      ["Waiting", total(samples, "num_requests_waiting"), count],
      ["Prompt tokens/s", prompted, short],
      ["Generated", generated, count],
      ["Prefix cache hits", hits(samples), percent],
    ];
    this.list.replaceChildren(...rows.filter(([, value]) => value !== null).flatMap(([label, value, show]) => {
      return [make("dt", "", label), make("dd", "", show(value))];
    }));
    const kv = total(samples, "kv_cache_usage_perc");
    const vram = samples.get("vram_bytes")?.filter((p) => p.value > 0) ?? []; // a worker without a GPU has zeros
    this.bars.replaceChildren(
      ...(kv === null ? [] : [bar("KV cache", percent(kv), [{ label: "used", share: kv }], true)]),
      ...(vram.length === 0 ? [] : [vramBar(vram)]),
    );
    this.panel.hidden = samples.size === 0;
  }

  /** Nothing is known: of another worker, or of none. */
  hide() {
    this.panel.hidden = true;
    this.points = [];
    this.generated = new Rate();
    this.prompted = new Rate();
  }

  /** @param {number} rate tokens/s */
  draw(rate) {
    this.rate.textContent = short(rate);
    this.points = [...this.points, rate].slice(-N_POINTS);
    const top = Math.max(1, ...this.points);
    const left = N_POINTS - this.points.length;
    const place = (value, i) => `${left + i},${(19 - (18 * value) / top).toFixed(2)}`;
    this.line.setAttribute("points", this.points.map(place).join(" "));
  }
}

/**
 * The share of prompt tokens that the prefix cache had, or null.
 * @param {Samples} samples
 */
function hits(samples) {
  const asked = total(samples, "prefix_cache_queries_total");
  const found = total(samples, "prefix_cache_hits_total");
  return asked === null || found === null || asked === 0 ? null : found / asked;
}

/** @param {Sample[]} parts bytes, more than none, each with the label `part` */
function vramBar(parts) {
  const sum = parts.reduce((s, p) => s + p.value, 0);
  const shares = parts.sort((a, b) => b.value - a.value).map((p) => ({
    label: `${(p.labels.part ?? "all").replaceAll("_", " ")} ${bytes(p.value)}`,
    share: p.value / sum,
  }));
  return bar("VRAM", bytes(sum), shares, false);
}

/**
 * @param {string} title
 * @param {string} value
 * @param {{label: string, share: number}[]} parts shares of the whole, 0 to 1
 * @param {boolean} single whether the one part needs no legend
 */
function bar(title, value, parts, single) {
  const head = make("p", "bar-head");
  head.append(make("span", "", title), make("span", "", value));
  const track = make("div", "track");
  const legend = make("ul", "legend");
  parts.forEach(({ label, share }, i) => {
    const piece = make("span", `piece part-${i % 5}`);
    piece.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
    track.append(piece);
    const item = make("li", "", label);
    item.prepend(make("i", `part-${i % 5}`));
    legend.append(item);
  });
  const node = make("div", "bar");
  node.append(head, track, ...(single ? [] : [legend]));
  return node;
}

/** @param {number} share 0 to 1 */
function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

/** @param {number} n */
export function bytes(n) {
  const [unit, name] = n < 2 ** 20 ? [2 ** 10, "KiB"] : n < 2 ** 30 ? [2 ** 20, "MiB"] : [2 ** 30, "GiB"];
  return `${(n / unit).toFixed(n / unit < 10 ? 2 : n / unit < 100 ? 1 : 0)} ${name}`;
}
