// The live page: one event stream in, one redraw per event; what is on the screen is never older than it says.
import {byId, micros, setText, span} from "./dom.js";
import {drawFleet, isSafe, isSilent, watchFleet} from "./fleet.js";
import {drawNotes, drawReleases, drawRollouts, drawRounds} from "./panels.js";
import {drawTrend} from "./trend.js";
import {isLive, versionsOf} from "./versions.js";

const TREND_SECONDS = 120;
const STALE_AFTER_MS = 4000;
const RETRY_MS = 1000;
const trend = [];
let shown = null;
let heardAt = 0;

function figure(id, text, more, kind = "") {
  setText(id, text);
  setText(`${id}-more`, more || "\u00a0");
  byId(id).parentElement.className = kind;
}

const lostBy = (devices) => devices.reduce((sum, device) => sum + device.lost_requests, 0);

function drawFigures(state) {
  const devices = state.devices;
  const silent = devices.filter((device) => isSilent(device, state.time)).length;
  const safe = devices.filter(isSafe).length;
  const lost = lostBy(devices);
  const before = trend.length ? trend[0].lost : lost;
  const lately = Math.max(0, lost - before);
  figure("rate", `${state.decisions_per_second.toFixed(0)} / s`, `${state.decisions.toLocaleString("en")} in all`);
  figure("p95", micros(state.latency_p95_us), `p50 ${micros(state.latency_p50_us)} · p99 ${micros(state.latency_p99_us)}`);
  figure("heard", `${devices.length - silent} of ${devices.length}`, silent ? `${silent} silent` : "", silent ? "warn" : "");
  figure("safe", String(safe), safe ? "region or baseline answers" : "", safe ? "warn" : "");
  figure("lost", lately.toLocaleString("en"), `${lost.toLocaleString("en")} since the start`, lately ? "bad" : "");
  const newest = state.rollouts[state.rollouts.length - 1];
  const kind = {stopped: "bad", aborted: "bad", paused: "bad", running: "busy", completed: "good"}[newest?.state] ?? "";
  const stage = newest && isLive(newest) ? `, stage ${newest.stage + 1} of ${newest.stages.length}` : "";
  figure("rollout", newest?.state ?? "none", newest ? newest.name + stage : "", kind);
}

function drawTrends(state) {
  while (trend.length && (trend[0].time < state.time - TREND_SECONDS || trend[0].time > state.time)) trend.shift();
  const times = trend.map((at) => at.time);
  drawTrend("trend-rate", times, [{name: "", colour: "--v0", values: trend.map((at) => at.decisions_per_second)}],
    {show: (value) => value.toLocaleString("en")});
  const lines = [["p50", "--q50"], ["p95", "--q95"], ["p99", "--q99"]].map(([name, colour]) =>
    ({name, colour, values: trend.map((at) => at[`latency_${name}_us`])}));
  drawTrend("trend-latency", times, lines, {logarithmic: true, show: micros});
}

function draw(state) {
  const versions = versionsOf(state);
  setText("scope", `${state.tenant} / ${state.model}`);
  setText("act", state.act);
  byId("act").hidden = !state.act;
  drawFigures(state);
  drawTrends(state);
  drawFleet(state, versions);
  drawRollouts(state, versions);
  drawRounds(state, versions);
  drawReleases(state, versions);
  drawNotes(state, versions);
}

function showLink() {
  const age = performance.now() - heardAt;
  const stale = !shown || age > STALE_AFTER_MS;
  document.body.classList.toggle("stale", Boolean(shown) && stale);
  byId("link").className = stale ? "link bad" : shown.broker_connected ? "link good" : "link warn";
  setText("link", !shown ? "waiting for the coordinator"
    : stale ? `no news for ${span(Math.floor(age / 1000))}, trying again`
      : shown.broker_connected ? "live" : "live, but the coordinator has lost the broker");
}

function connect() {
  const source = new EventSource("v1/events");
  source.onmessage = (event) => {
    shown = JSON.parse(event.data);
    heardAt = performance.now();
    const {time, decisions_per_second, latency_p50_us, latency_p95_us, latency_p99_us} = shown;
    const lost = lostBy(shown.devices);
    trend.push({time, decisions_per_second, latency_p50_us, latency_p95_us, latency_p99_us, lost});
    draw(shown);
    showLink();
  };
  // The browser comes back by itself after a dropped connection, but not after an answer other than 200.
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return;
    source.close();
    setTimeout(connect, RETRY_MS);
  };
}

watchFleet(() => { if (shown) draw(shown); });
new ResizeObserver(() => { if (shown) drawTrends(shown); }).observe(byId("main"));
setInterval(showLink, 500);
connect();
