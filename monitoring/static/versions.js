// What a version is called (with its model where there are several), which colour it has everywhere on the page, and
// what it is to the fleet.
import {chip, element, swatch} from "./dom.js";

const PALETTE = ["--v0", "--v1", "--v2", "--v3", "--v4", "--v5", "--v6", "--v7"];

// Versions by manifest digest: {label, colour, role}. A role is stable, canary, target or withdrawn; or "".
export function versionsOf(state) {
  const found = new Map();
  const several = new Set(state.releases.map((release) => release.model)).size > 1;
  const label = (release) => several ? `${release.model} ${release.version}` : release.version;
  [...state.releases].sort((a, b) => a.release - b.release).forEach((release, index) => found.set(release.manifest,
    {label: label(release), colour: PALETTE[index % PALETTE.length], role: release.withdrawn ? "withdrawn" : ""}));
  const give = (manifest, role) => {
    const version = found.get(manifest);
    if (version && version.role === "") version.role = role;
  };
  for (const newest of new Map(state.rollouts.map((rollout) => [rollout.model, rollout])).values()) giveRoles(newest, give);
  return found;
}

function giveRoles(newest, give) {
  if (newest.state === "completed") give(newest.target, "stable");
  else if (isLive(newest) && newest.target !== newest.stable) give(newest.target, newest.stage === 0 ? "canary" : "target");
  give(newest.stable, isLive(newest) || newest.state !== "completed" ? "stable" : "");
}

export const isLive = (rollout) => rollout.state === "running" || rollout.state === "paused";

const ROLES = {stable: "good", canary: "busy", target: "busy", withdrawn: "bad"};
const WORDS = {stable: "stable", canary: "canary", target: "rolling out", withdrawn: "withdrawn"};

export const roleChip = (role) => chip(WORDS[role], ROLES[role]);

// A version's colour and name; its digest where the pointer rests.
export function versionName(versions, manifest) {
  const version = versions.get(manifest);
  const made = element("span", "version", swatch(version?.colour ?? "--none"), version?.label || "none");
  made.title = manifest;
  return made;
}
