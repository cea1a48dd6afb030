import re
from xml.etree import ElementTree

from atoll.charts import Bar, Mark, Series, histogram, line_chart, row_chart, stack_chart, ticks
from atoll.figures import duration
from atoll.report_charts import act_charts, precision_by_round
from tests.fakes.report_figures import sample_report

STAIRS = (
    Series("new", ((0.0, 0.0), (1.0, 4.0), (2.0, 10.0))),
    Series("old & gone", ((0.0, 10.0), (1.0, 6.0), (2.0, 0.0))),
)


def wide(figure: str) -> str:
    """The wide drawing of a figure; the narrow one behind it shows the same."""
    drawn, _, narrow = figure.partition('<svg class="narrow"')
    assert narrow
    return drawn


def test_a_line_chart_draws_each_series_inside_its_frame() -> None:
    svg = wide(line_chart("t", [Series("a & b", ((0.0, 0.0), (10.0, 5.0)))], x_label="x", y_label="y", y_range=(0, 5)))
    assert "a &amp; b" in svg
    assert 'd="M60.0 218.0L624.0 34.0"' in svg


def test_rounds_are_whole_numbers_on_the_axis() -> None:
    svg = wide(line_chart("t", [Series("s", ((0.0, 1.0), (1.0, 2.0), (2.0, 2.0)))], x_label="round", y_label="y"))
    assert re.findall(r'y="234\.0" text-anchor="middle">([^<]*)<', svg) == ["0", "1", "2"]


def test_last_values_that_are_close_stand_apart() -> None:
    lines = [Series("a", ((0.0, 0.4), (1.0, 0.404))), Series("b", ((0.0, 0.4), (1.0, 0.407)))]
    svg = wide(line_chart("t", lines, x_label="x", y_label="y", y_range=(0.0, 1.0)))
    first, second = (float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="end" class="value"', svg))
    assert abs(first - second) >= 13


def test_stacked_counts_fill_the_frame_and_hold_until_the_next_point() -> None:
    svg = wide(stack_chart("t", STAIRS, x_label="x", y_label="y", marks=[Mark(1.5, "stopped")]))
    lower, upper = re.findall(r'<path d="([^"]*)"', svg)
    assert lower.startswith("M60.0 218.0 L342.0 218.0 L342.0 144.4 L624.0 144.4 L624.0 34.0")
    assert upper.startswith("M60.0 34.0 L342.0 34.0 L342.0 34.0")
    assert "stopped" in svg


def test_names_of_marks_that_are_close_do_not_overlap() -> None:
    svg = wide(
        stack_chart("t", STAIRS, x_label="x", y_label="y", marks=[Mark(1.9, "stopped 5 s"), Mark(2.0, "undone 6 s")])
    )
    heights = re.findall(r'y="([\d.]+)" text-anchor="middle" class="value"', svg)
    assert len(set(heights)) == 2


def test_a_histogram_has_a_bar_for_each_bucket_and_a_line_for_each_quantile() -> None:
    bars = [(10.0, 20.0, 5.0), (20.0, 40.0, 9.0), (40.0, 80.0, 0.0)]
    svg = wide(
        histogram("t", bars, x_label="x", y_label="y", show=lambda us: duration(us / 1e6), marks=[Mark(30.0, "p95")])
    )
    assert svg.count("<rect") == 3
    assert "20 µs to 40 µs: 9" in svg
    assert "p95" in svg


def test_the_longest_bar_fills_its_room() -> None:
    svg = wide(row_chart("t", [Bar("full", 200.0, "200 B"), Bar("sent", 50.0, "50 B", 3)]))
    assert re.findall(r'width="([\d.]+)"', svg) == ["364.0", "91.0"]


def test_an_empty_chart_says_so() -> None:
    for made in (
        row_chart("T", []),
        stack_chart("T", [], x_label="", y_label=""),
        line_chart("T", [], x_label="", y_label=""),
        histogram("T", [], x_label="", y_label="", show=str),
    ):
        assert "T: nothing was measured" in made


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert all(3 <= value <= 97 for value in ticks(3, 97))


def test_learning_begins_at_the_model_that_stays() -> None:
    svg = wide(precision_by_round(sample_report().acts[2].figures))
    assert svg.count("<circle") == 15
    assert "plain FedAvg of each round" in svg


def test_every_chart_is_well_formed_and_has_a_name() -> None:
    for act in sample_report().acts:
        for chart in act_charts(act.name, act.figures):
            figure = ElementTree.fromstring(chart)
            drawings = figure.findall("svg")
            assert [svg.get("class") for svg in drawings] == ["wide", "narrow"]
            assert all(svg.get("aria-label") for svg in drawings)


def test_a_fleet_that_never_changes_and_one_sample_are_drawn() -> None:
    for samples in ([{"seconds": 0.0, "devices": {"eu-west:1": 3}}], [{"seconds": 0.0, "devices": {}}] * 2):
        assert len(act_charts("canary", {"plot_timeline": samples})) == 2
