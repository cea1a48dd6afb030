// Rollouts, rounds, versions and notes.
import {bytes, chip, clock, count, element, empty, fold, micros, percent, redraw, span, table} from "./dom.js";
import {isLive, roleChip, versionName} from "./versions.js";

const ROLLOUT_KINDS = {running: "busy", paused: "bad", completed: "good", stopped: "bad", aborted: "bad"};
const ROUND_KINDS = {published: "good", refused: "bad", failed: "bad"};
const PHASES = ["announced", "collecting", "frozen", "aggregating", "opened", "applied", "published"];
const OLD_ROLLOUTS = 4, OLD_ROUNDS = 8;

function progress(value, whole, words) {
  const made = element("div", "progress", element("i"), element("span", "", words));
  made.firstChild.style.width = `${whole ? Math.min(100, 100 * value / whole) : 0}%`;
  return made;
}

// Steps one after the other; `at` is the current one, `kind` how that one stands.
function steps(names, at, kind) {
  return element("ol", "steps", ...names.map((name, index) => {
    const made = element("li", index < at ? "done" : index === at ? `now ${kind}` : "", name);
    if (index === at) made.ariaCurrent = "step";
    return made;
  }));
}

function card(title, chips, ...children) {
  return element("article", "card", element("div", "bar", element("h3", "", title), ...chips), ...children);
}

export function drawRollouts(state, versions) {
  const newest = [...state.rollouts].reverse();
  redraw("rollouts", [newest, [...versions]], () => newest.length === 0
    ? empty("No rollout yet. `atoll rollout apply FILE` begins one.")
    : [...newest.slice(0, OLD_ROLLOUTS).map((rollout) => rolloutCard(rollout, versions)), ...older(newest, OLD_ROLLOUTS)]);
}

const older = (all, shown) => all.length > shown ? [empty(`and ${count(all.length - shown, "older one")}`)] : [];

function rolloutCard(rollout, versions) {
  const kind = ROLLOUT_KINDS[rollout.state] ?? "";
  const first = rollout.target === rollout.stable;
  const last = rollout.history[rollout.history.length - 1];
  const route = element("p", "route");
  if (!first) route.append(versionName(versions, rollout.stable), " → ");
  route.append(versionName(versions, rollout.target), first ? " (first version)" : "");
  const parts = [route];
  if (rollout.state === "completed") {
    parts.push(element("p", "soft", `Now on ${rollout.adopted} of ${count(rollout.in_stage, "device")}.`));
  } else {
    const names = rollout.stages.map((stage) => stage === "1 devices" ? "1 device" : stage.replace(/^(\d+)%$/, "$1 %"));
    parts.push(steps(names, rollout.stage, kind));
  }
  if (isLive(rollout)) {
    const words = `${rollout.adopted} of ${count(rollout.in_stage, "device")} in this stage run it`;
    parts.push(progress(rollout.adopted, rollout.in_stage, words));
    if (rollout.health.target) parts.push(arms(rollout.health, first));
  }
  if (isLive(rollout) && !rollout.in_stage && rollout.reason) parts.push(element("p", "soft", rollout.reason));
  if (last?.reason && kind === "bad") parts.push(element("p", "reason", last.reason));
  if (rollout.history.length) parts.push(history(rollout));
  return card(rollout.name, [chip(rollout.standing || rollout.state, kind)], ...parts);
}

function arms(health, first) {
  const arm = (name, of) => [name, `${of.adopted} of ${of.devices}`, of.decisions, micros(of.latency_p95_ms * 1000),
    percent(of.false_positive_rate), of.errors, of.rolled_back, of.silent].map((cell) =>
    typeof cell === "number" ? cell.toLocaleString("en") : cell);
  const rows = [arm("target", health.target)];
  if (health.control && !first) rows.push(arm("control", health.control));
  return table([["arm"], ["on it", true], ["decisions", true], ["p95", true], ["false positives", true],
    ["errors", true], ["rolled back", true], ["silent", true]], rows);
}

function history(rollout) {
  return fold(`rollout ${rollout.name}`, count(rollout.history.length, "decision"),
    table([["time"], ["decision"], ["why"]],
      rollout.history.map((event) => [clock(event.time), event.event, event.reason || "–"])));
}

export function drawRounds(state, versions) {
  const newest = [...state.rounds].reverse();
  redraw("rounds", [newest, [...versions]], () => newest.length === 0
    ? empty("No federated round yet. `atoll round run` opens one.")
    : [...newest.slice(0, OLD_ROUNDS).map((round) => roundCard(round, versions)), ...older(newest, OLD_ROUNDS)]);
}

function roundCard(round, versions) {
  const phase = round.state.toLowerCase();
  const kind = ROUND_KINDS[phase] ?? "busy";
  const figures = round.figures;
  const parts = [];
  const route = element("p", "route", versionName(versions, round.base));
  if (round.candidate) route.append(" → ", versionName(versions, round.candidate));
  parts.push(route);
  if (kind === "busy") parts.push(steps(PHASES, PHASES.indexOf(phase), "busy"));
  if (phase === "collecting" || phase === "announced") {
    parts.push(progress(round.admitted, round.quorum, `${count(round.admitted, "contribution")}, quorum ${round.quorum}`));
  } else {
    parts.push(element("p", "soft", told(round)));
  }
  const before = figures.average_precision_base, after = figures.average_precision_candidate;
  if (after !== undefined) {
    const better = after >= before;
    parts.push(element("p", "", "Average precision ", element("b", "", `${before.toFixed(3)} → ${after.toFixed(3)} `),
      chip(`${better ? "+" : "−"}${Math.abs(after - before).toFixed(3)}`, better ? "good" : "bad")));
  }
  if (round.reason) parts.push(element("p", kind === "bad" ? "reason" : "soft", round.reason));
  if (round.rejected.length) {
    parts.push(fold(`round ${round.round_id}`, `${count(round.rejected.length, "device")} not used, and why`,
      table([["device"], ["why"]], round.rejected.map((device) => [device.device_id, device.reason]))));
  }
  return card(round.round_id, [chip(phase, kind)], ...parts);
}

function told(round) {
  const seconds = Object.values(round.figures.seconds ?? {}).reduce((sum, value) => sum + value, 0);
  const refused = Object.entries(round.refused).map(([reason, number]) => `${number} × ${reason}`).join(", ");
  const sat = Object.entries(round.sat_out ?? {}).map(([reason, number]) => `${number} × ${reason}`).join(", ");
  const hidden = (round.reveal ?? "distances") === "distances" ? "" : `${round.reveal} only: distances not revealed`;
  return [count(round.admitted, "contribution"), `${round.chosen.length} chosen`, hidden,
    round.figures.bytes_uploaded ? `${bytes(round.figures.bytes_uploaded)} uploaded` : "",
    seconds ? `${seconds.toFixed(1)} s` : "", round.attempt > 1 ? `attempt ${round.attempt}` : "",
    refused ? `refused at admission: ${refused}` : "", sat ? `sat out: ${sat}` : ""].filter(Boolean).join(" · ");
}

export function drawReleases(state, versions) {
  const newest = [...state.releases].sort((a, b) => b.release - a.release);
  redraw("releases", [newest, [...versions], Math.floor(state.time / 60)], () => newest.length === 0
    ? empty("No version yet. `atoll publish MODEL.onnx` makes one.")
    : table([["version"], ["age", true], ["download", true], ["smallest patch", true], ["devices", true]],
      newest.map((release) => {
        const name = element("span", "", versionName(versions, release.manifest));
        const role = versions.get(release.manifest).role;
        if (role) name.append(" ", roleChip(role));
        if (release.round_id) name.append(" ", chip("learned"));
        const patches = Object.values(release.patch_bytes);
        const smallest = Math.min(...patches);
        return [name, span(state.time - release.created), bytes(release.whole_bytes),
          patches.length ? `${bytes(smallest)} (${percent(smallest / release.whole_bytes)})` : "–", release.devices];
      })));
}

const MARKS = {act: "▸", alert: "!"};

export function drawNotes(state, versions) {
  redraw("notes", [state.notes, [...versions]], () => state.notes.length === 0 ? empty("Nothing yet.")
    : element("ol", "", ...[...state.notes].reverse().map((note) => element("li", note.kind,
      element("time", "", clock(note.time)), element("i", "mark", MARKS[note.kind] ?? ""),
      element("span", "", named(note.text, versions))))));
}

// The first sixteen characters of a digest, as logs write them, become the version's name.
function named(text, versions) {
  return text.replace(/\b([0-9a-f]{16})…/g, (found, start) => {
    const version = [...versions].find(([manifest]) => manifest.startsWith(start));
    return version ? version[1].label : found;
  });
}
