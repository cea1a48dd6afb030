// The live page: one event stream in, one redraw per event. Every text goes in as text, never as markup.
"use strict";

const TREND_SECONDS = 120;
const SILENT_AFTER_S = 15;
const PALETTE = ["--v0", "--v1", "--v2", "--v3", "--v4", "--v5"];
const trend = [];
const tiles = new Map();

const byId = (id) => document.getElementById(id);

function element(name, text = "", classes = "") {
  const made = document.createElement(name);
  if (text !== "") made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

function setText(id, text) {
  const found = byId(id);
  if (found.textContent !== text) found.textContent = text;
}

const micros = (value) => value <= 0 ? "–" : value < 1000 ? `${value.toFixed(0)} µs` : `${(value / 1000).toFixed(1)} ms`;
const bytes = (value) => value < 10000 ? `${value} B` : `${(value / 1000).toFixed(1)} kB`;
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], {hour12: false});

function table(heads, rows) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  for (const [text, numeric] of heads) {
    const cell = element("th", text, numeric ? "number" : "");
    cell.scope = "col";
    head.append(cell);
  }
  const body = made.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((cell, index) => {
      const made = row.insertCell();
      if (heads[index][1]) made.className = "number";
      made.append(cell instanceof Node ? cell : String(cell));
    });
  }
  return made;
}

function fill(id, node, emptyText) {
  byId(id).replaceChildren(node ?? element("p", emptyText, "empty"));
}

function drawTrend(id, series, logarithmic) {
  const svg = byId(id);
  const values = series.flatMap((line) => line.values).filter((value) => value > 0);
  svg.replaceChildren();
  if (values.length === 0) return;
  const scale = (value) => logarithmic ? Math.log10(Math.max(value, 1)) : value;
  const high = scale(Math.max(...values)) * 1.08 || 1;
  const low = logarithmic ? Math.floor(scale(Math.min(...values))) : 0;
  const y = (value) => 116 - ((scale(value) - low) / (high - low || 1)) * 108;
  const NS = "http://www.w3.org/2000/svg";
  const end = trend[trend.length - 1].time;
  for (const mark of [low, (low + high) / 2, high]) {
    const line = document.createElementNS(NS, "line");
    const at = 116 - ((mark - low) / (high - low || 1)) * 108;
    for (const [key, value] of Object.entries({x1: 0, x2: 600, y1: at, y2: at})) line.setAttribute(key, value);
    svg.append(line);
  }
  for (const line of series) {
    const path = document.createElementNS(NS, "path");
    const points = line.values.map((value, index) =>
      `${(600 * (1 - (end - trend[index].time) / TREND_SECONDS)).toFixed(1)} ${y(value).toFixed(1)}`);
    path.setAttribute("d", "M" + points.join("L"));
    path.style.stroke = `var(${line.colour})`;
    const title = document.createElementNS(NS, "title");
    title.textContent = line.name;
    path.append(title);
    svg.append(path);
  }
  const label = document.createElementNS(NS, "text");
  label.setAttribute("x", 4);
  label.setAttribute("y", 14);
  label.textContent = (logarithmic ? 10 ** high : high).toPrecision(3);
  svg.append(label);
}

function colours(state) {
  const found = new Map();
  [...state.releases].sort((a, b) => a.release - b.release)
    .forEach((release, index) => found.set(release.manifest, PALETTE[index % PALETTE.length]));
  return found;
}

function drawFleet(state, palette) {
  const fleet = byId("fleet");
  const counts = new Map();
  for (const device of state.devices) {
    let tile = tiles.get(device.device_id);
    if (!tile) {
      tile = {box: element("div", "", "device"), name: element("b", device.device_id), text: element("span")};
      tile.box.append(tile.name, tile.text);
      tiles.set(device.device_id, tile);
      fleet.append(tile.box);
    }
    const silent = !device.last_seen || state.time - device.last_seen > SILENT_AFTER_S;
    const version = device.safe_mode ? "safe mode" : device.version || "no model";
    counts.set(version, (counts.get(version) ?? 0) + 1);
    tile.box.className = `device${silent ? " silent" : ""}${device.safe_mode ? " safe" : ""}`;
    tile.box.style.borderLeftColor = device.safe_mode ? "" : `var(${palette.get(device.running) ?? "--none"})`;
    const busy = device.state && device.state !== "IDLE" ? ` ${device.state.toLowerCase().replaceAll("_", " ")}` : "";
    tile.text.textContent = silent ? `${version}, silent` : version + busy;
    tile.box.title = `${device.device_id}, ${device.device_class}, ${device.region}: ${device.decisions} decisions`;
  }
  setText("versions", [...counts].map(([version, count]) => `${version}: ${count}`).join("   "));
}

function drawRollouts(state) {
  const rows = [...state.rollouts].reverse().map((rollout) => {
    const last = rollout.history[rollout.history.length - 1];
    return [rollout.name, element("span", rollout.state, `state-${rollout.state}`),
      `${rollout.stages[rollout.stage] ?? rollout.stage} (${rollout.adopted} of ${rollout.in_stage})`,
      last ? last.reason || last.event : ""];
  });
  fill("rollouts", rows.length ? table([["rollout"], ["state"], ["stage"], ["last decision"]], rows) : null, "None yet.");
}

function drawRounds(state) {
  const ended = {published: "published", failed: "failed"};
  const rows = [...state.rounds].reverse().map((round) => {
    const kind = ended[round.state.toLowerCase()] ?? "busy";
    const list = element("span", round.rejected.map((device) => device.device_id).join(", ") || "nobody");
    list.title = round.rejected.map((device) => `${device.device_id}: ${device.reason}`).join("\n");
    return [round.round_id, element("span", round.state.toLowerCase(), `state-${kind}`), round.admitted,
      round.chosen.length, list];
  });
  fill("rounds", rows.length
    ? table([["round"], ["state"], ["admitted", true], ["chosen", true], ["rejected"]], rows) : null, "None yet.");
}

function drawReleases(state, palette) {
  const rows = [...state.releases].sort((a, b) => b.release - a.release).map((release) => {
    const name = element("span");
    const swatch = element("i", "", "swatch");
    swatch.style.background = `var(${palette.get(release.manifest)})`;
    name.append(swatch, release.version + (release.withdrawn ? " (withdrawn)" : ""));
    name.title = release.manifest;
    const patches = Object.values(release.patch_bytes);
    return [name, bytes(release.whole_bytes), patches.length ? bytes(Math.min(...patches)) : "–", release.devices];
  });
  fill("releases", rows.length
    ? table([["version"], ["whole", true], ["smallest patch", true], ["devices", true]], rows) : null, "None yet.");
}

function drawNotes(state) {
  byId("notes").replaceChildren(...[...state.notes].reverse().map((note) => {
    const item = element("li", "", note.kind === "info" ? "" : note.kind);
    const time = element("time", clock(note.time));
    item.append(time, note.text);
    return item;
  }));
}

function draw(state) {
  setText("scope", `${state.tenant} / ${state.model}`);
  setText("act", state.act);
  setText("rate", state.decisions_per_second.toFixed(0));
  setText("p50", micros(state.latency_p50_us));
  setText("p95", micros(state.latency_p95_us));
  setText("p99", micros(state.latency_p99_us));
  setText("total", state.decisions.toLocaleString("en"));
  const heard = state.devices.filter((device) => device.last_seen && state.time - device.last_seen <= SILENT_AFTER_S);
  setText("heard", `${heard.length} of ${state.devices.length}`);
  setText("lost", String(state.devices.reduce((sum, device) => sum + device.lost_requests, 0)));
  trend.push({time: state.time, rate: state.decisions_per_second,
    p50: state.latency_p50_us, p95: state.latency_p95_us, p99: state.latency_p99_us});
  while (trend.length && trend[0].time < state.time - TREND_SECONDS) trend.shift();
  drawTrend("trend-rate", [{name: "decisions / s", colour: "--v0", values: trend.map((at) => at.rate)}], false);
  drawTrend("trend-latency", ["p50", "p95", "p99"].map((key, index) =>
    ({name: key, colour: PALETTE[index], values: trend.map((at) => at[key])})), true);
  const palette = colours(state);
  drawFleet(state, palette);
  drawRollouts(state);
  drawRounds(state);
  drawReleases(state, palette);
  drawNotes(state);
}

function connect() {
  const source = new EventSource("v1/events");
  source.onopen = () => { byId("link").className = "link up"; setText("link", "live"); };
  source.onerror = () => { byId("link").className = "link"; setText("link", "lost the coordinator, trying again"); };
  source.onmessage = (event) => draw(JSON.parse(event.data));
}

connect();
