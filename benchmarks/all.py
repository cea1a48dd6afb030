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
FOLDER = Path(__file__).parent
NOT_SUBJECTS = {"all", "cost", "keys", "trust_checkin"}
"""Programs that are no subjects of their own: `deltas` measures with the last three."""
PICTURES = {
    "secure_aggregation": (
        "growth.svg",
        "`python -m benchmarks.secure_aggregation --growth docs/growth.svg` draws how an aggregator's time grows:\n"
        "what grows with d is linear in d and in n; what does not, the matrix of distances between sketches, is\n"
        "quadratic in n (most of what n = 512 takes at d = 10,000).",
    ),
}


def main(*subjects: str) -> int:
    """Returns 1 when a benchmark failed, the page being written from those that ran; 2 for a subject that is none."""
    sections = _kept(PAGE.read_text(), subjects) if subjects and PAGE.exists() else []
    failed = []
    known = every_subject()
    unknown = sorted(set(subjects) - set(known))
    if unknown:
        print(f"benchmarks: expected subjects among {', '.join(known)}, found {', '.join(unknown)}", file=sys.stderr)
        return 2
    for subject in subjects or known:
        print(f"benchmarks.{subject} ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{subject}", "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            failed.append(subject)
            continue
        result = json.loads(done.stdout)
        claims = msgspec.convert(result["claims"], list[Claim])
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        sections.append(
            f"## {subject}\n\n`python -m benchmarks.{subject}` at commit {result['commit']}; {machine}.\n\n"
            f"{table(claims)}\n{_picture(subject)}"
        )
    PAGE.write_text("# Benchmarks\n\nDrawn by `make bench`; do not edit.\n\n" + "\n".join(sorted(sections)))
    print(f"wrote {PAGE.relative_to(ROOT)}" + (f"; failed: {', '.join(failed)}" if failed else ""), file=sys.stderr)
    return 1 if failed else 0


def every_subject() -> list[str]:
    """The scripts that print claims, by name."""
    programs = (path for path in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in path.read_text())
    return [path.stem for path in programs if path.stem not in NOT_SUBJECTS]


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
