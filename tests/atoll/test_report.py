import json
from pathlib import Path

from atoll.charts import Series, bar_chart, line_chart, number, ticks
from atoll.report import TITLES, ActResult, Report, headline, render_html, render_table, write_report


def report(**changes: object) -> Report:
    acts = [ActResult(name, True, 1.5, {"devices": 60}) for name in TITLES]
    rounds = [
        {"round": 1, "average_precision": 0.5, "average_precision_fedavg": 0.1, "average_precision_stale": 0.3},
        {"round": 2, "average_precision": 0.6, "average_precision_fedavg": 0.1, "average_precision_stale": 0.3},
    ]
    acts[2] = ActResult("learn", True, 3.0, {"rounds": rounds, "rejected": ["pos-0001"]})
    values: dict[str, object] = {
        "seed": 7,
        "commit": "abc",
        "machine": {"cores": 2},
        "seconds": 99.0,
        "memory_mb_peak": 1234.0,
        "acts": tuple(acts),
        **changes,
    }
    return Report(**values)  # type: ignore[arg-type]


def test_the_json_report_has_the_promised_keys(tmp_path: Path) -> None:
    data, page = write_report(report(), tmp_path / "out")
    found = json.loads(data.read_text())
    assert {"seed", "commit", "machine", "acts"} <= found.keys()
    assert [act["name"] for act in found["acts"]] == list(TITLES)
    assert {"name", "ok", "seconds", "figures"} <= found["acts"][0].keys()
    assert page.read_text().startswith("<!doctype html>")


def test_one_failed_act_fails_the_report_and_says_why() -> None:
    acts = list(report().acts)
    acts[3] = ActResult("canary", False, 2.0, {}, "no device adopted <b>it</b>")
    failed = report(acts=tuple(acts))
    assert report().ok
    assert not failed.ok
    assert "no device adopted <b>it</b>" in render_table(failed)
    assert "no device adopted &lt;b&gt;it&lt;/b&gt;" in render_html(failed)


def test_a_missing_act_fails_the_report() -> None:
    assert not report(acts=report().acts[:-1]).ok


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = render_html(report())
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert page.count("<svg") >= 1


def test_figures_for_plots_stay_out_of_the_table() -> None:
    act = ActResult("publish", True, 1.0, {"devices": 3, "ok": True, "plot_latency": {5: 2}})
    assert headline(act) == "devices 3"


def test_a_line_chart_draws_each_series_inside_its_frame() -> None:
    svg = line_chart("t", [Series("a & b", ((0.0, 0.0), (10.0, 5.0)))], x_label="x", y_label="y")
    assert "a &amp; b" in svg
    assert 'd="M56.0 220.0 L624.0' in svg


def test_a_staircase_holds_its_value_until_the_next_point() -> None:
    svg = line_chart("t", [Series("s", ((0.0, 1.0), (1.0, 2.0)), steps=True)], x_label="x", y_label="y")
    assert " H624.0 V" in svg


def test_an_empty_chart_says_so() -> None:
    assert "nothing was measured" in bar_chart("Latency", [], x_label="", y_label="")


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(3 <= value <= 97 for value in ticks(3, 97))


def test_numbers_are_short() -> None:
    assert [number(v) for v in (1234567, 12345, 123.4, 5, 0.04213)] == ["1.23M", "12.3k", "123", "5", "0.0421"]
