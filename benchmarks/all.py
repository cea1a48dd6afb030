"""Run every benchmark and draw `docs/benchmarks.md` from what they print.

`python -m benchmarks.all [SUBJECT ...]`: with subjects named, the page keeps the sections of the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks.claims import ROOT, Claim, table

PAGE = ROOT / "docs" / "benchmarks.md"
NOT_SUBJECTS = {"__init__", "all", "attacks", "claims", "cost", "encoder", "fraud_rounds", "models", "patching"}
NOT_SUBJECTS |= {"robustness_report", "tasks"}
PICTURES = {
    "secure_aggregation": (
        "growth.svg",
        "`python -m benchmarks.secure_aggregation --growth docs/growth.svg` draws how an aggregator's time grows:\n"
        "what grows with d is linear in d and in n; what does not, the matrix of distances between sketches, is\n"
        "quadratic in n (most of what n = 512 takes at d = 10,000).",
    ),
}
NOT_SUBJECTS |= {"keys", "trust_checkin"}  # `deltas` measures them too


def main(*subjects: str) -> int:
    """Returns 1 when a benchmark failed; the page is written from those that ran."""
    sections = _kept(PAGE.read_text(), subjects) if subjects and PAGE.exists() else []
    failed = []
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.stem in NOT_SUBJECTS or (subjects and script.stem not in subjects):
            continue
        print(f"benchmarks.{script.stem} ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{script.stem}", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            failed.append(script.stem)
            continue
        result = json.loads(done.stdout)
        claims = msgspec.convert(result["claims"], list[Claim])
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        sections.append(
            f"## {script.stem}\n\n`python -m benchmarks.{script.stem}` at commit {result['commit']}; {machine}.\n\n"
            f"{table(claims)}\n{_picture(script.stem)}"
        )
    PAGE.write_text("# Benchmarks\n\nDrawn by `make bench`; do not edit.\n\n" + "\n".join(sorted(sections)))
    print(f"wrote {PAGE.relative_to(ROOT)}" + (f"; failed: {', '.join(failed)}" if failed else ""), file=sys.stderr)
    return 1 if failed else 0


def _picture(subject: str) -> str:
    if subject not in PICTURES:
        return ""
    name, words = PICTURES[subject]
    return f"\n![{subject}]({name})\n\n{words}\n"


def _kept(page: str, subjects: tuple[str, ...]) -> list[str]:
    """The sections of a page, without those of the subjects; a subject's own may have a comma and more behind it."""
    sections = [f"## {part.rstrip()}\n" for part in page.split("\n## ")[1:]]
    return [section for section in sections if section[3:].split("\n")[0].split(",")[0] not in subjects]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
