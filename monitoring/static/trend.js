// The last two minutes as lines, drawn at the size the chart has on the screen, so that text is never stretched.
import {byId} from "./dom.js";

const SECONDS = 120;
const GAP_S = 5;
const HEIGHT = 150;
const LEFT = 58, RIGHT = 44, TOP = 10, BOTTOM = 22;
const NS = "http://www.w3.org/2000/svg";

function shape(name, attributes, text = "") {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

// Round values from zero up to at least `high`.
function linearMarks(high) {
  high = Math.max(high, 1);
  const raw = high / 3;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * size).find((found) => found >= raw);
  return [0, 1, 2, 3].map((index) => index * step).filter((mark, index, all) => !index || all[index - 1] < high);
}

// Powers of ten around the values.
function decades(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.max(first + 1, Math.ceil(Math.log10(high)));
  return Array.from({length: last - first + 1}, (_, index) => 10 ** (first + index));
}

// `lines` are {name, colour, values}, a value for each of `times` (Unix seconds); `show` words a value with its unit.
export function drawTrend(id, times, lines, {logarithmic = false, show}) {
  const svg = byId(id);
  const width = Math.max(240, svg.clientWidth);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();
  const end = times[times.length - 1];
  const positive = lines.flatMap((line) => line.values).filter((value) => value > 0);
  const marks = logarithmic && positive.length
    ? decades(Math.min(...positive), Math.max(...positive)) : linearMarks(Math.max(0, ...positive));
  const scale = logarithmic && positive.length ? Math.log10 : (value) => value;
  const low = scale(marks[0]), high = scale(marks[marks.length - 1]);
  const x = (time) => LEFT + (1 - (end - time) / SECONDS) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (scale(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM);
  for (const mark of marks) {
    svg.append(shape("line", {x1: LEFT, x2: width - RIGHT, y1: y(mark), y2: y(mark)}));
    if (positive.length) svg.append(shape("text", {x: LEFT - 8, y: y(mark) + 4, "text-anchor": "end"}, show(mark)));
  }
  for (const ago of [120, 90, 60, 30, 0]) {
    const words = ago ? `−${ago} s` : "now";
    svg.append(shape("text", {x: x(end - ago), y: HEIGHT - 5, "text-anchor": "middle"}, words));
  }
  if (!positive.length) {
    const middle = (LEFT + width - RIGHT) / 2;
    svg.append(shape("text", {x: middle, y: HEIGHT / 2 - 8, "text-anchor": "middle"}, "no decisions yet"));
  }
  const labels = [];
  for (const line of lines) {
    const path = shape("path", {d: pathOf(times, line.values, x, y, logarithmic)});
    path.style.stroke = `var(${line.colour})`;
    svg.append(path);
    const last = line.values[line.values.length - 1];
    if (last > 0 && lines.length > 1) labels.push({name: line.name, at: y(last) + 4, colour: line.colour});
  }
  labels.sort((a, b) => b.at - a.at);
  labels.forEach((label, index) => {
    if (index) label.at = Math.min(label.at, labels[index - 1].at - 13);
    const text = shape("text", {x: width - RIGHT + 6, y: label.at, class: "name"}, label.name);
    text.style.fill = `var(${label.colour})`;
    svg.append(text);
  });
}

// A line that is interrupted where nothing was heard, or nothing can be shown on a logarithmic scale.
function pathOf(times, values, x, y, logarithmic) {
  let path = "", previous = -Infinity;
  values.forEach((value, index) => {
    if (logarithmic && !(value > 0)) return;
    path += `${times[index] - previous > GAP_S ? "M" : "L"}${x(times[index]).toFixed(1)} ${y(value).toFixed(1)}`;
    previous = times[index];
  });
  return path;
}
