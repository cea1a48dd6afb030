"""The report's page in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.report import ActResult, Report, write_report
from tests.fakes.browser import Browser, chromium
from tests.fakes.report_figures import sample_report

pytestmark = pytest.mark.slow

SMALLEST_LETTERS = """Math.min(...[...document.querySelectorAll("svg")].filter((svg) => svg.clientWidth)
    .map((svg) => 12 * svg.clientWidth / svg.viewBox.baseVal.width))"""
"""How high the text of the charts is on the screen, in pixels."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def failed_report() -> Report:
    acts = list(sample_report().acts)
    acts[3] = ActResult("canary", False, 90.0, {"canary_devices": 1}, f"rollout {'learned' * 30}: not completed")
    return sample_report(acts=tuple(acts))


@pytest.mark.parametrize("report", [sample_report(), failed_report()], ids=["ok", "failed"])
@pytest.mark.parametrize(("width", "dark"), [(1240, False), (1240, True), (900, False), (390, False)])
def test_the_report_can_be_read(browser: Browser, tmp_path: Path, report: Report, width: int, dark: bool) -> None:
    _, written = write_report(report, tmp_path)
    with browser.page() as page:
        page.show(written.as_uri(), width=width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width
        assert page.overflowing() == []
        assert page.low_contrast() == []
        assert page.run(SMALLEST_LETTERS) >= 10.0
        assert page.requests == [written.as_uri()]
        assert page.problems == []
