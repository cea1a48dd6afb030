import json
from pathlib import Path

from atoll.report import TITLES, ActResult, render_html, render_table, write_report
from tests.fakes.report_figures import HOSTILE, sample_report


def test_the_json_report_has_the_promised_keys(tmp_path: Path) -> None:
    data, page = write_report(sample_report(), tmp_path / "out")
    found = json.loads(data.read_text())
    assert {"seed", "commit", "machine", "acts"} <= found.keys()
    assert [act["name"] for act in found["acts"]] == list(TITLES)
    assert {"name", "ok", "seconds", "figures"} <= found["acts"][0].keys()
    assert found["acts"][1]["figures"]["latency_p95_us"] == 84.1
    assert page.read_text().startswith("<!doctype html>")


def test_one_failed_act_fails_the_report_and_says_why() -> None:
    acts = list(sample_report().acts)
    acts[3] = ActResult("canary", False, 2.0, {}, "no device adopted <b>it</b>")
    failed = sample_report(acts=tuple(acts))
    assert sample_report().ok
    assert not failed.ok
    assert "no device adopted <b>it</b>" in render_table(failed)
    assert "no device adopted &lt;b&gt;it&lt;/b&gt;" in render_html(failed)
    assert "Not everything worked" in render_html(failed)


def test_a_missing_act_fails_the_report() -> None:
    assert not sample_report(acts=sample_report().acts[:-1]).ok


def test_the_table_fits_a_terminal_of_100_columns_and_any_character_set() -> None:
    acts = list(sample_report().acts)
    acts[2] = ActResult("learn", False, 80.0, {}, "round 3 failed twice: " + "every attempt failed, " * 12)
    for report in (sample_report(), sample_report(acts=tuple(acts))):
        told = render_table(report)
        assert max(map(len, told.splitlines())) <= 100
        assert told.isascii()


def test_the_table_picks_the_figures_that_matter() -> None:
    lines = render_table(sample_report()).splitlines()
    assert "p95 84.1 us, download 45.3 kB" in lines[2]
    assert "average precision 0.312 to 0.541, plain FedAvg 0.120" in lines[3]
    assert "316 requests, 0 lost, slowest answer 176 ms" in lines[6]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = render_html(sample_report())
    for word in ("http://", "https://", "<script", "<img", "@import", "url("):
        assert word not in page
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 9


def test_names_and_units_are_for_people() -> None:
    page = render_html(sample_report())
    assert "<th scope=row>latency p95</th><td>84.1 µs</td>" in page
    assert "<th scope=row>sent to all devices</th><td>574 kB</td>" in page
    assert "<th scope=row>false positives, bad version</th><td>41.8 %</td>" in page
    assert "plot_" not in page
    assert "eu-west:6 (learned)" in page
    assert "eu-west:7 (bad)" in page
    assert "9f86d081884c7d65" not in page


def test_who_was_left_out_is_listed_once_with_reason_and_truth() -> None:
    page = render_html(sample_report())
    listed = page[page.index("7 devices were left out") : page.index("</details>")]
    assert listed.count("hostile</span>") == len(HOSTILE)
    assert "<td>pos-0001</td><td>honest</td><td>1, 2, 3, 4</td><td>Krum score 1.4x the median" in listed


def test_hostile_text_in_figures_stays_text() -> None:
    acts = list(sample_report().acts)
    bad = "<img src=x onerror=alert(1)>"
    timeline = [{"seconds": 0.0, "devices": {bad: 3}}, {"seconds": 1.0, "devices": {bad: 3}}]
    rounds = [{"round": 1, "average_precision": 0.5, "rejected": [f"{bad}: {bad}"]}]
    acts[2] = ActResult("learn", True, 1.0, {"hostile": [bad], "rounds": rounds})
    acts[3] = ActResult("canary", True, 1.0, {"stages": [bad * 3], "unheard_of": {bad: 1}, "plot_timeline": timeline})
    assert "<img" not in render_html(sample_report(acts=tuple(acts)))


def test_an_act_that_broke_off_shows_what_it_had() -> None:
    full = sample_report()
    for cut in range(4):
        acts = tuple(
            ActResult(act.name, False, 1.0, dict(list(act.figures.items())[:cut]), "broke off") for act in full.acts
        )
        broken = sample_report(acts=acts)
        assert render_html(broken).count('class="problem"') == len(TITLES)
        assert render_table(broken).count("broke off") == len(TITLES)
