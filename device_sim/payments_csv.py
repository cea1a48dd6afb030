"""A user's own labelled payments, in the layout of the public ULB credit-card set: `Time,V1..V28,Amount,Class`.

Time is in seconds from the first row, V1..V28 are anonymous components, Amount is in currency units, Class is 1 for
fraud. Such rows have no terminal, so they are dealt to devices: non-IID, by a seeded Dirichlet distribution.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model_delta.errors import Malformed

COLUMNS: tuple[str, ...] = ("Time", *(f"V{number}" for number in range(1, 29)), "Amount", "Class")
CSV_FEATURES: tuple[str, ...] = (*COLUMNS[1:29], "amount", "amount_log")
CSV_FEATURE_SET = "ulb-30-v1"
ROWS_MAX = 5_000_000

_AMOUNT_MAX = 2_000.0
_TIME_MAX = 2.0**53
_AMOUNT_GROUPS = 4

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LabelledRows:
    """Payments that come with their features: `features` float32[n, len(names)], `fraud` bool[n], `time` int64[n] in
    seconds, in order of time."""

    names: tuple[str, ...]
    feature_set: str
    features: Float32
    fraud: npt.NDArray[np.bool_]
    time: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.fraud)


def read_csv(path: Path) -> LabelledRows:
    """Read a CSV file with a header line that names at least COLUMNS, in any order; further columns are ignored.

    Raises Malformed with one line that names the file, what was found, what was expected and what to do.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = [name.strip() for name in next(csv.reader([lines.readline()]), [])]
            _require_columns(path, header)
            where = [header.index(name) for name in COLUMNS]
            first = lines.readline()
            if not first.strip():
                raise Malformed(f"{path}: no rows after the header; expected one labelled payment a line")
            values = np.loadtxt(
                chain([first], lines),
                delimiter=",",
                quotechar='"',
                usecols=where,
                ndmin=2,
                max_rows=ROWS_MAX,
                comments=None,
            )
            if next(lines, "").strip():
                raise Malformed(f"{path}: more than {ROWS_MAX:,} rows; split the file")
    except OSError as error:
        raise Malformed(f"{path}: cannot be read ({error.strerror}); give the path of a labelled CSV file") from None
    except (ValueError, UnicodeDecodeError):
        raise Malformed(_first_bad_value(path)) from None
    _require_sense(path, values)
    values = values[np.argsort(values[:, 0], kind="stable")]
    amount = np.minimum(values[:, 29], _AMOUNT_MAX)
    features = np.column_stack([values[:, 1:29], amount, np.log1p(values[:, 29])]).astype(np.float32)
    return LabelledRows(CSV_FEATURES, CSV_FEATURE_SET, features, values[:, 30] == 1, values[:, 0].astype(np.int64))


def deal(rows: LabelledRows, devices: int, seed: int, alpha: float = 0.5) -> npt.NDArray[np.int64]:
    """The device of each row, int64[n] in [0, devices).

    Rows fall into groups by label and amount quartile; each group is spread over the devices by shares drawn from a
    symmetric Dirichlet distribution (Hsu, Qi and Brown, 2019): the smaller `alpha`, the less alike the devices. Every
    device gets at least one row. Raises Malformed for fewer rows than devices.
    """
    if len(rows) < devices or devices < 1:
        raise Malformed(f"payments: {len(rows)} rows cannot be dealt to {devices} devices; use fewer devices")
    rng = np.random.default_rng(seed)
    amount = rows.features[:, -1]
    edges = np.quantile(amount, np.linspace(0, 1, _AMOUNT_GROUPS + 1)[1:-1])
    group = np.searchsorted(edges, amount) + _AMOUNT_GROUPS * rows.fraud
    owner = np.empty(len(rows), dtype=np.int64)
    for number in range(2 * _AMOUNT_GROUPS):
        members = np.flatnonzero(group == number)
        owner[members] = rng.choice(devices, len(members), p=rng.dirichlet(np.full(devices, alpha)))
    counts = np.bincount(owner, minlength=devices)
    for empty in np.flatnonzero(counts == 0):
        richest = int(counts.argmax())
        given = rng.choice(np.flatnonzero(owner == richest))
        owner[given] = empty
        counts[richest] -= 1
        counts[empty] += 1
    return owner


def _require_columns(path: Path, header: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        found = ", ".join(header[:40]) if any(header) else "nothing"
        raise Malformed(
            f"{path}: missing columns {', '.join(missing)}; found {found[:200]}; expected Time, V1..V28, Amount, Class"
        )


def _require_sense(path: Path, values: npt.NDArray[np.float64]) -> None:
    """Every value finite, also as float32, Amount and Time not negative, Class 0 or 1; the first offence is named by
    its line."""
    bad = ~(np.abs(values) <= np.finfo(np.float32).max)
    bad[:, 0] |= (values[:, 0] < 0) | (values[:, 0] > _TIME_MAX)
    bad[:, 29] |= values[:, 29] < 0
    bad[:, 30] |= (values[:, 30] != 0) & (values[:, 30] != 1)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        found = values[row, column]
        large = ", which is too large" if _TIME_MAX < abs(found) < np.inf else ""
        raise Malformed(_complaint(path, int(row) + 2, COLUMNS[column], f"{found:g}{large}"))


def _first_bad_value(path: Path) -> str:
    """Read again, slowly, to say which value could not be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines)
            header = [name.strip() for name in next(reader)]
            for row in reader:
                if row and len(row) < len(header):
                    return f"{path}: line {reader.line_num}: expected {len(header)} values, found {len(row)}"
                for name, text in zip(header, row, strict=False):
                    if name in COLUMNS and not _is_number(text):
                        return _complaint(path, reader.line_num, name, repr(text[:40]))
    except (UnicodeDecodeError, csv.Error) as error:
        return f"{path}: not a UTF-8 CSV file ({type(error).__name__}); expected comma-separated text"
    return f"{path}: not a CSV file of numbers; expected Time, V1 to V28, Amount, Class"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _complaint(path: Path, line: int, column: str, found: str) -> str:
    expected = {"Class": "0 or 1", "Amount": "a number, 0 or more", "Time": "a number, 0 or more"}
    return (
        f"{path}: line {line}, column {column}: expected {expected.get(column, 'a number')}, found {found}; correct it"
    )
