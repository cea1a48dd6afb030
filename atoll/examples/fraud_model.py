"""A model to publish for whoever has none at hand: trained in seconds, on simulated payments or on a file of one's own.

    python -m atoll.examples.fraud_model my_model.onnx
    atoll publish my_model.onnx

    python -m atoll.examples.fraud_model cards.onnx --payments cards.csv
    atoll publish cards.onnx --model fraud-csv

It has the layout of the platform's own models, so that federated rounds can go on from it. Of a file's rows, in order
of time, it learns from the first 40 %; the devices of `atoll fleet run --payments` hold the rest, but for the 15 % that
`--held-out` writes for the gates of rounds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from atoll.held_out import write_rows
from device_sim.fraud_model import TrainedModel, train
from device_sim.payments import CATEGORY_NAMES, PaymentSpec, generate
from device_sim.payments_csv import CSV_FEATURES, LabelledRows, read_csv
from device_sim.scenario import Scenario, world_of_rows
from device_sim.terminal_features import table_features
from model_delta.errors import Malformed
from model_delta.graphs.mlp import mlp_model
from monitoring.quality import average_precision

TERMINALS, DAYS, HELD_OUT_DAYS = 48, 21, 5
EPOCHS, BATCH = 8, 256
AMOUNTS = (10.0, 50.0, 200.0)
"""Where the slices of a file's held-out payments end, in currency units."""


@dataclass(frozen=True)
class Made:
    """What became of the training: `average_precision` on later payments that it did not see, and the score from which
    about one in a hundred legitimate ones is declined."""

    average_precision: float
    threshold: float


def make_model(path: Path, *, seed: int = 7, days: int = DAYS, steps: int = 700) -> Made:
    """Train on simulated payments and write the model to `path`; measured on their last days."""
    categories = tuple(CATEGORY_NAMES[number % len(CATEGORY_NAMES)] for number in range(TERMINALS))
    payments = generate(PaymentSpec(categories, days, seed))
    features = table_features(payments)
    earlier = payments.days(0, days - HELD_OUT_DAYS)
    model = train(features[earlier], payments.fraud[earlier], seed=seed, steps=steps)
    return _written(path, model, features[~earlier], payments.fraud[~earlier])


def make_model_of_rows(
    path: Path, rows: LabelledRows, *, held_out: Path | None = None, seed: int = 7, steps_max: int = 1_200
) -> Made:
    """Train on the first 40 % of the rows and write the model to `path`; measured on the 15 % that no device holds,
    which also go to `held_out`. Raises Malformed for rows with too little fraud."""
    world = world_of_rows(Scenario(seed=seed, devices=1, hostile_share=0.0), rows)
    features, fraud = world.history()
    steps = min(max(EPOCHS * len(fraud) // BATCH, 200), steps_max)
    try:
        model = train(features, fraud, seed=seed, steps=steps, batch_size=BATCH)
    except ValueError as error:
        raise Malformed(f"payments: {error}; use more rows") from None
    features, fraud = world.held_out()
    made = _written(path, model, features, fraud)
    if held_out is not None:
        write_rows(held_out, features, fraud, _amount_slices(features))
    return made


def _written(path: Path, model: TrainedModel, features: npt.NDArray[np.float32], fraud: npt.NDArray[np.bool_]) -> Made:
    path.write_bytes(mlp_model(model.weights, model.mean, model.scale))
    return Made(average_precision(model.score(features), fraud), model.decision_threshold)


def _amount_slices(features: npt.NDArray[np.float32]) -> npt.NDArray[np.str_]:
    names = np.array([*(f"amount below {end:g}" for end in AMOUNTS), f"amount {AMOUNTS[-1]:g} and more"])
    return np.asarray(names[np.searchsorted(AMOUNTS, features[:, CSV_FEATURES.index("amount")], side="right")])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m atoll.examples.fraud_model", description="Make a fraud model.")
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--payments", type=Path, metavar="CSV", help="labelled payments: Time,V1..V28,Amount,Class")
    parser.add_argument("--held-out", type=Path, metavar="NPZ", help="with --payments: rows for the gates of rounds")
    parser.add_argument("--seed", type=int, default=7)
    asked = parser.parse_args()
    if asked.held_out is not None and asked.payments is None:
        parser.error("--held-out: expected --payments too")
    try:
        if asked.payments is None:
            made = make_model(asked.out, seed=asked.seed)
        else:
            made = make_model_of_rows(asked.out, read_csv(asked.payments), held_out=asked.held_out, seed=asked.seed)
    except Malformed as error:
        parser.exit(2, f"fraud_model: {error}\n")
    except OSError as error:
        parser.exit(2, f"fraud_model: {error.filename}: cannot be written ({error.strerror}); choose another path\n")
    model = " --model fraud-csv" if asked.payments is not None else ""
    print(f"{asked.out}: average precision {made.average_precision:.3f} on later payments")
    print(f"atoll publish {asked.out}{model} --threshold {made.threshold:.4g}   # declines about 1 % of the legitimate")


if __name__ == "__main__":
    main()
