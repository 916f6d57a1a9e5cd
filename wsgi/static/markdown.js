// A small subset of Markdown as elements: code, headings, lists, bold and italic text, inline code. Text becomes text
// nodes only; links stay text, so that no answer can lead anywhere. Knows nothing of the conversation.

/** @typedef {{node: HTMLElement, end: number}} Block a block and the offset of the text behind it */

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6})\s+(\S.*)$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
// a run of backticks is one to three long: a model that repeats itself can write thousands, and no pattern may choke on it
const INLINE = /(?<!`)(`{1,3})(?!`)(.+?)(?<!`)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=[^\s*])([^*\n]*[^\s*])\*/gs;

/** Shows a text that grows. What is complete stays as it is, so that a long answer costs no more than a short one. */
export class MarkdownView {
  /** @param {HTMLElement} root an empty element */
  constructor(root) {
    this.root = root;
    this.done = 0; // the text up to here is shown by blocks that no longer change
    /** @type {HTMLElement[]} */
    this.open = [];
  }

  /** @param {string} text all of it; begins with what was shown before */
  update(text) {
    for (const node of this.open) node.remove();
    // The last block can still grow, and a line whose end has not come can still become anything.
    const whole = text.slice(0, text.lastIndexOf("\n") + 1);
    const done = parse(whole, this.done).slice(0, -1);
    if (done.length > 0) this.done = done[done.length - 1].end;
    this.open = parse(text, this.done).map((b) => b.node);
    this.root.append(...done.map((b) => b.node), ...this.open);
  }
}

/**
 * @param {string} text
 * @param {number} from
 * @returns {Block[]}
 */
function parse(text, from) {
  /** @type {Block[]} */
  const blocks = [];
  const lines = text.slice(from).split("\n");
  let at = from;
  let i = 0;
  const take = () => {
    const line = lines[i++];
    at += line.length + 1;
    return line;
  };
  while (i < lines.length) {
    const line = lines[i];
    let node;
    if (line.trim() === "") {
      take();
      continue;
    } else if (FENCE.test(line)) {
      node = code(take, () => i < lines.length);
    } else if (HEADING.test(line)) {
      const [, marks, title] = HEADING.exec(take());
      node = inline(element(`h${Math.min(6, marks.length + 2)}`), title);
    } else if (ITEM.test(line)) {
      const items = [];
      while (i < lines.length && isOfList(lines[i])) items.push(take());
      node = list(items);
    } else {
      const paragraph = [take()];
      while (i < lines.length && lines[i].trim() !== "" && !startsBlock(lines[i])) paragraph.push(take());
      node = inline(element("p"), paragraph.join("\n"));
    }
    blocks.push({ node, end: Math.min(at, text.length) });
  }
  return blocks;
}

/** @param {string} line */
function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || ITEM.test(line);
}

/** @param {string} line an item, or the continuation of one */
function isOfList(line) {
  return ITEM.test(line) || (/^\s+\S/.test(line) && !FENCE.test(line));
}

/**
 * A code block, to its closing fence or to the end of the text.
 * @param {() => string} take
 * @param {() => boolean} more
 */
function code(take, more) {
  const [, fence, language] = FENCE.exec(take());
  const lines = [];
  while (more()) {
    const line = take();
    if (line.trim().startsWith(fence) && line.trim().replaceAll(fence[0], "") === "") break;
    lines.push(line);
  }
  const pre = element("pre");
  if (language) pre.dataset.language = language;
  pre.tabIndex = 0; // it may scroll, and a keyboard must reach that
  pre.append(element("code", lines.join("\n")));
  return pre;
}

/**
 * A list, with those inside it by their indentation.
 * @param {string[]} lines
 */
function list(lines) {
  /** @type {{indent: number, list: HTMLElement}[]} */
  const open = [];
  let root = null;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item === null) {
      inline(open[open.length - 1].list.lastElementChild, `\n${line.trim()}`);
      continue;
    }
    const [, space, number, text] = item;
    const indent = space.replaceAll("\t", "    ").length;
    while (open.length > 1 && indent < open[open.length - 1].indent) open.pop();
    if (open.length === 0 || indent >= open[open.length - 1].indent + 2) {
      const inner = element(number === undefined ? "ul" : "ol");
      if (number !== undefined) inner.start = Number(number);
      if (root === null) root = inner;
      else open[open.length - 1].list.lastElementChild.append(inner);
      open.push({ indent, list: inner });
    }
    open[open.length - 1].list.append(inline(element("li"), text));
  }
  return root;
}

/**
 * Appends a text with its inline code, bold and italic parts.
 * @param {HTMLElement} parent
 * @param {string} text
 * @returns {HTMLElement} the parent
 */
function inline(parent, text) {
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    parent.append(text.slice(from, found.index));
    from = found.index + found[0].length;
    if (found[2] !== undefined) parent.append(element("code", found[2].replace(/^ (.+) $/s, "$1")));
    else if (found[3] !== undefined) parent.append(inline(element("strong"), found[3]));
    else parent.append(inline(element("em"), found[4]));
  }
  parent.append(text.slice(from));
  return parent;
}

/**
 * @param {string} name
 * @param {string} [text]
 * @returns {any}
 */
function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}
