"""A user's CSV: read as labelled features, dealt non-IID, and every defect named in one line."""

from pathlib import Path

import numpy as np
import pytest

from device_sim.payments_csv import COLUMNS, CSV_FEATURES, LabelledRows, deal, read_csv
from model_delta.errors import Malformed


def lines(count: int = 200, seed: int = 1) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        values = rng.standard_normal(28).round(4)
        fraud = int(rng.random() < 0.1)
        rows.append([str(number * 7), *map(str, values), f"{rng.lognormal(3, 1):.2f}", f'"{fraud}"'])
    return rows


def write(path: Path, rows: list[list[str]], header: tuple[str, ...] = COLUMNS) -> Path:
    path.write_text("\n".join([",".join(f'"{name}"' for name in header), *(",".join(row) for row in rows)]) + "\n")
    return path


def test_the_public_layout_is_read(tmp_path: Path) -> None:
    rows = lines()
    table = read_csv(write(tmp_path / "cards.csv", rows))
    assert table.features.shape == (200, len(CSV_FEATURES))
    assert table.features[3, 0] == np.float32(rows[3][1])
    assert table.features[3, 29] == pytest.approx(np.log1p(float(rows[3][29])), rel=1e-6)
    assert table.fraud.sum() == sum(row[30] == '"1"' for row in rows)


def test_columns_may_stand_in_another_order_with_others_between(tmp_path: Path) -> None:
    rows = lines(20)
    expected = read_csv(write(tmp_path / "a.csv", rows))
    turned = [[*row[::-1], "note"] for row in rows]
    found = read_csv(write(tmp_path / "b.csv", turned, (*COLUMNS[::-1], "Remark")))
    np.testing.assert_array_equal(found.features, expected.features)
    np.testing.assert_array_equal(found.fraud, expected.fraud)


def test_rows_come_out_in_order_of_time(tmp_path: Path) -> None:
    table = read_csv(write(tmp_path / "cards.csv", lines()[::-1]))
    assert (np.diff(table.time) > 0).all()


def test_missing_columns_are_named_with_those_found(tmp_path: Path) -> None:
    path = tmp_path / "cards.csv"
    path.write_text("Time,V1,V2,Amount\n1,2,3,4\n")
    with pytest.raises(Malformed) as caught:
        read_csv(path)
    message = str(caught.value)
    assert str(path) in message
    assert "missing columns V3, V4" in message
    assert "Class" in message
    assert "found Time, V1, V2, Amount" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("V7", "abc", "line 5, column V7: expected a number, found 'abc'"),
        ("V7", "", "line 5, column V7: expected a number, found ''"),
        ("V7", "nan", "line 5, column V7: expected a number, found nan"),
        ("V7", "-1e39", r"line 5, column V7: expected a number, found -1e\+39, which is too large"),
        ("Time", "1e19", r"line 5, column Time: expected a number, 0 or more, found 1e\+19, which is too large"),
        ("Amount", "-3", "line 5, column Amount: expected a number, 0 or more, found -3"),
        ("Class", "2", "line 5, column Class: expected 0 or 1, found 2"),
        ("Time", "inf", "line 5, column Time: expected a number, 0 or more, found inf"),
    ],
)
def test_a_bad_value_is_named_by_line_and_column(tmp_path: Path, column: str, value: str, said: str) -> None:
    rows = lines(10)
    rows[3][COLUMNS.index(column)] = value
    with pytest.raises(Malformed, match=said):
        read_csv(write(tmp_path / "cards.csv", rows))


def test_a_short_line_is_named(tmp_path: Path) -> None:
    rows = lines(10)
    rows[6] = rows[6][:12]
    with pytest.raises(Malformed, match="line 8: expected 31 values, found 12"):
        read_csv(write(tmp_path / "cards.csv", rows))


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00\xff\xfe\x80" * 30])
def test_no_csv_at_all_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cards.csv"
    path.write_bytes(content)
    with pytest.raises(Malformed, match=r"cards\.csv: (missing columns|not a UTF-8)"):
        read_csv(path)


def test_a_header_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="no rows after the header"):
        read_csv(write(tmp_path / "cards.csv", []))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match=r"cannot be read \(No such file"):
        read_csv(tmp_path / "nowhere.csv")


def table(count: int = 4_000) -> LabelledRows:
    rng = np.random.default_rng(3)
    features = rng.standard_normal((count, len(CSV_FEATURES))).astype(np.float32)
    return LabelledRows(CSV_FEATURES, "x", features, rng.random(count) < 0.05, np.arange(count))


def spread(rows: LabelledRows, owner: np.ndarray, devices: int) -> float:
    quartile = np.searchsorted(np.quantile(rows.features[:, -1], [0.25, 0.5, 0.75]), rows.features[:, -1])
    pooled = np.bincount(quartile, minlength=4) / len(rows)
    parts = [np.bincount(quartile[owner == d], minlength=4) / max((owner == d).sum(), 1) for d in range(devices)]
    return float(np.mean([0.5 * np.abs(part - pooled).sum() for part in parts]))


def test_dealing_is_seeded_complete_and_less_alike_for_a_smaller_alpha() -> None:
    rows = table()
    owner = deal(rows, 12, seed=1, alpha=0.3)
    assert np.array_equal(owner, deal(rows, 12, seed=1, alpha=0.3))
    assert not np.array_equal(owner, deal(rows, 12, seed=2, alpha=0.3))
    assert set(owner) == set(range(12))
    assert spread(rows, owner, 12) > 2 * spread(rows, deal(rows, 12, seed=1, alpha=100.0), 12)


def test_every_device_gets_a_row_even_when_shares_are_extreme() -> None:
    rows = table(60)
    assert (np.bincount(deal(rows, 50, seed=1, alpha=0.01), minlength=50) > 0).all()


def test_more_devices_than_rows_is_refused() -> None:
    with pytest.raises(Malformed, match="3 rows cannot be dealt to 5 devices"):
        deal(table(3), 5, seed=1)
