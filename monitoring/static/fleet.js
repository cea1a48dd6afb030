// The fleet: how much of it runs what, and a tile a device. Tiles stay where they are; only their words change.
import {byId, clock, count, element, percent, redraw, setText, span, swatch} from "./dom.js";
import {roleChip} from "./versions.js";

const SILENT_AFTER_S = 15;
const DENSE_ABOVE = 120;
const tiles = new Map();
const regions = new Map();
let chosen = "";
let attentionOnly = false;

export const isSilent = (device, now) => !device.last_seen || now - device.last_seen > SILENT_AFTER_S;

// A device that never had a model says that no model of its own may answer, too; that is a beginning, not an alarm.
export const isSafe = (device) => device.state.toLowerCase() === "safe" || (device.safe_mode && device.running !== "");

// What a reader must know first about a device: [kind, words]; the kind is also its class.
function standing(device, versions, now) {
  if (!device.last_seen) return ["silent", "never heard"];
  if (isSilent(device, now)) return ["silent", `silent ${span(now - device.last_seen)}`];
  const state = device.state.toLowerCase();
  if (isSafe(device)) return ["safe", "safe mode"];
  if (state === "restoring") return ["back", "rolling back"];
  if (state === "on_probation") return ["probation", "on probation"];
  if (state && state !== "idle") return ["busy", state.replaceAll("_", " ")];
  const role = versions.get(device.running)?.role;
  if (role === "withdrawn") return ["back", "withdrawn"];
  if (role === "canary") return ["canary", "canary"];
  return ["", device.running ? "" : "no model"];
}

const MARKS = {silent: "○", safe: "!", back: "↶", probation: "◔", busy: "↓", canary: "★"};
const needsAttention = (kind) => kind === "silent" || kind === "safe" || kind === "back";

export function drawFleet(state, versions) {
  const known = new Set();
  let attention = 0;
  for (const device of state.devices) {
    known.add(device.device_id);
    const [kind, words] = standing(device, versions, state.time);
    attention += needsAttention(kind);
    updateTile(tileOf(device), device, kind, words, versions);
  }
  for (const [id, tile] of tiles) {
    if (known.has(id)) continue;
    tile.box.remove();
    tiles.delete(id);
  }
  for (const [name, region] of regions) region.box.hidden = !drawRegion(name, region, state);
  if (!byId("fleet").querySelector(".device[tabindex='0']:not([hidden])")) {
    const first = byId("fleet").querySelector(".device:not([hidden])");
    if (first) first.tabIndex = 0;
  }
  byId("fleet").classList.toggle("dense", state.devices.length > DENSE_ABOVE);
  byId("attention").hidden = state.devices.length === 0;
  byId("attention").disabled = attention === 0 && !attentionOnly;
  setText("attention", attention ? `Needs attention: ${attention}` : "Nothing needs attention");
  byId("fleet-empty").hidden = state.devices.length > 0 && !(attentionOnly && attention === 0);
  setText("fleet-empty", state.devices.length ? "Nothing needs attention." : "No device has enrolled yet.");
  drawShares(state, versions);
  drawChosen(state, versions);
}

function regionOf(name) {
  let region = regions.get(name);
  if (!region) {
    region = {box: element("section", "region"), title: element("h3"), grid: element("div", "tiles")};
    region.box.append(region.title, region.grid);
    regions.set(name, region);
    const after = [...regions.keys()].sort().find((other) => other > name);
    byId("fleet").insertBefore(region.box, after ? regions.get(after).box : null);
  }
  return region;
}

function tileOf(device) {
  let tile = tiles.get(device.device_id);
  if (!tile) {
    tile = {box: element("button", "device"), name: element("b", "", device.device_id), mark: element("i", "mark"),
      text: element("span"), region: device.region};
    tile.box.type = "button";
    tile.box.tabIndex = -1;
    tile.box.dataset.device = device.device_id;
    tile.mark.ariaHidden = "true";
    tile.box.append(tile.name, tile.mark, tile.text);
    tiles.set(device.device_id, tile);
    regionOf(device.region).grid.append(tile.box);
  }
  return tile;
}

function updateTile(tile, device, kind, words, versions) {
  const version = versions.get(device.running);
  const classes = `device ${kind}${device.device_id === chosen ? " chosen" : ""}`;
  if (tile.box.className !== classes) tile.box.className = classes;
  tile.box.style.setProperty("--version", `var(${version?.colour ?? "--none"})`);
  tile.box.hidden = attentionOnly && !needsAttention(kind);
  const text = words || version?.label || device.version;
  if (tile.text.textContent !== text) tile.text.textContent = text;
  if (tile.mark.textContent !== (MARKS[kind] ?? "")) tile.mark.textContent = MARKS[kind] ?? "";
  const label = `${device.device_id}, ${device.device_class}, ${device.version || "no model"}${words ? `, ${words}` : ""}`;
  if (tile.box.title !== label) { tile.box.title = label; tile.box.ariaLabel = label; }
  tile.box.ariaExpanded = String(device.device_id === chosen);
}

function drawRegion(name, region, state) {
  const mine = state.devices.filter((device) => device.region === name);
  const heard = mine.filter((device) => !isSilent(device, state.time)).length;
  const text = `${name || "no region"}: ${heard} of ${count(mine.length, "device")} heard`;
  if (region.title.textContent !== text) region.title.textContent = text;
  region.box.classList.toggle("bad", mine.length > 0 && heard === 0);
  return mine.some((device) => !tiles.get(device.device_id).box.hidden);
}

function drawShares(state, versions) {
  const groups = new Map();
  for (const device of state.devices) {
    const key = isSafe(device) ? "safe" : versions.has(device.running) ? device.running : "none";
    groups.set(key, (groups.get(key) ?? 0) + 1);
  }
  const order = [...versions.keys(), "safe", "none"].filter((key) => groups.has(key));
  const rows = order.map((key) => ({key, devices: groups.get(key), ...versions.get(key)}));
  const colour = (row) => row.colour ?? (row.key === "safe" ? "--warn" : "--none");
  byId("share").hidden = byId("legend").hidden = rows.length === 0;
  redraw("share", rows, () => rows.map((row) => {
    const part = element("i");
    part.style.flexGrow = row.devices;
    part.style.background = `var(${colour(row)})`;
    return part;
  }));
  redraw("legend", rows, () => rows.map((row) => element("li", "", swatch(colour(row)),
    row.label ?? (row.key === "safe" ? "safe mode" : "no model"), " ",
    element("b", "", row.devices), element("small", "", ` ${percent(row.devices / state.devices.length)}`),
    ...(row.role ? [" ", roleChip(row.role)] : []))));
}

function drawChosen(state, versions) {
  const device = state.devices.find((one) => one.device_id === chosen);
  byId("device").hidden = !device;
  if (!device) return;
  const [, words] = standing(device, versions, state.time);
  const rows = [
    ["Class, region", `${device.device_class}, ${device.region}`],
    ["Version", device.version || "none"],
    ["State", words || device.state.toLowerCase() || "unknown"],
    ["Last heard", device.last_seen ? `${clock(device.last_seen)}, ${span(state.time - device.last_seen)} ago` : "never"],
    ["Decisions", device.decisions.toLocaleString("en")],
    ["Requests lost", device.lost_requests],
    ["Records dropped", device.dropped],
    ["Plan", device.plan_serial || "none"],
    ["Manifest", device.running ? `${device.running.slice(0, 16)}…` : "none"],
  ];
  redraw("device", [chosen, rows], () => [element("h3", "", chosen), element("dl", "",
    ...rows.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value))))]);
}

// Chooses a device, or nothing; one tile is in the tab order, arrow keys move among the visible ones.
export function watchFleet(redrawNow) {
  byId("attention").addEventListener("click", () => {
    attentionOnly = !attentionOnly;
    byId("attention").ariaPressed = String(attentionOnly);
    redrawNow();
  });
  byId("fleet").addEventListener("click", (event) => {
    const id = event.target.closest(".device")?.dataset.device;
    if (id === undefined) return;
    chosen = chosen === id ? "" : id;
    redrawNow();
  });
  byId("fleet").addEventListener("keydown", (event) => {
    const visible = [...byId("fleet").querySelectorAll(".device:not([hidden])")];
    const at = visible.indexOf(document.activeElement);
    if (at < 0) return;
    const across = visible.filter((box) => box.offsetTop === visible[at].offsetTop).length;
    const moves = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -at, End: visible.length - 1 - at};
    const next = visible[at + (moves[event.key] ?? 0)];
    if (!(event.key in moves) || !next) return;
    event.preventDefault();
    next.focus();
  });
  byId("fleet").addEventListener("focusin", (event) => {
    for (const tile of tiles.values()) tile.box.tabIndex = tile.box === event.target ? 0 : -1;
  });
}
