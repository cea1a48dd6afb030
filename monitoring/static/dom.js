// Making elements and words. Every text goes in as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function element(name, classes = "", ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  made.append(...children.map((child) => child instanceof Node ? child : String(child)));
  return made;
}

export function setText(id, text) {
  const found = byId(id);
  if (found.textContent !== text) found.textContent = text;
}

// Replaces what `id` shows, but only when `value` changed; what the reader unfolded or focused stays so.
const shown = new Map();
export function redraw(id, value, build) {
  const key = JSON.stringify(value);
  if (shown.get(id) === key) return;
  shown.set(id, key);
  const place = byId(id);
  const folds = new Map([...place.querySelectorAll("details")].map((fold) => [fold.dataset.name, fold.open]));
  const focused = place.contains(document.activeElement) && document.activeElement.closest("details")?.dataset.name;
  place.replaceChildren(...[build()].flat());
  for (const fold of place.querySelectorAll("details")) {
    if (folds.has(fold.dataset.name)) fold.open = folds.get(fold.dataset.name);
    if (focused === fold.dataset.name) fold.querySelector("summary").focus({preventScroll: true});
  }
}

export function fold(name, summary, ...children) {
  const made = element("details", "", element("summary", "", summary), ...children);
  made.dataset.name = name;
  return made;
}

export const empty = (text) => element("p", "empty", text);

export function chip(text, kind = "") {
  return element("span", `chip ${kind}`.trim(), text);
}

export function swatch(colour) {
  const made = element("i", "swatch");
  made.style.background = `var(${colour})`;
  return made;
}

// `heads` are [text, numeric] pairs; a cell is a node or a text.
export function table(heads, rows) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const [text, numeric] of heads) {
    const cell = element("th", numeric ? "number" : "", text);
    cell.scope = "col";
    head.append(cell);
  }
  const body = made.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((cell, index) => {
      const place = row.insertCell();
      if (heads[index][1]) place.className = "number";
      place.append(cell instanceof Node ? cell : String(cell));
    });
  }
  return element("div", "scroll", made);
}

// Three significant digits without idle zeros: 1.47, 10, 121.
const short = (value) => String(Number(value.toPrecision(3)));

export function micros(value) {
  if (!(value > 0)) return "–";
  if (value < 1000) return `${short(value)} µs`;
  return value < 1e6 ? `${short(value / 1000)} ms` : `${short(value / 1e6)} s`;
}

export function bytes(value) {
  if (value < 1000) return `${value} B`;
  return value < 1e6 ? `${short(value / 1000)} kB` : `${short(value / 1e6)} MB`;
}

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], {hour12: false});
export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export function span(seconds) {
  if (seconds < 90) return `${Math.max(0, seconds).toFixed(0)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(0)} h`;
  return `${(seconds / 86400).toFixed(0)} d`;
}
