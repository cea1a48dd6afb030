"""A model to publish for whoever has none at hand: trained on a few weeks of simulated payments, in seconds.

    python -m atoll.examples.fraud_model my_model.onnx
    atoll publish my_model.onnx

It has the layout of the platform's own models, so that federated rounds can go on from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from device_sim.fraud_model import train
from device_sim.payments import CATEGORY_NAMES, PaymentSpec, generate
from device_sim.terminal_features import table_features
from model_delta.graphs.mlp import mlp_model
from monitoring.quality import average_precision

TERMINALS, DAYS, HELD_OUT_DAYS = 48, 21, 5


def make_model(path: Path, *, seed: int = 7, days: int = DAYS, steps: int = 700) -> float:
    """Write the model to `path`; its average precision on the last days, which it was not trained on."""
    categories = tuple(CATEGORY_NAMES[number % len(CATEGORY_NAMES)] for number in range(TERMINALS))
    payments = generate(PaymentSpec(categories, days, seed))
    features = table_features(payments)
    earlier = payments.days(0, days - HELD_OUT_DAYS)
    model = train(features[earlier], payments.fraud[earlier], seed=seed, steps=steps)
    path.write_bytes(mlp_model(model.weights, model.mean, model.scale))
    return average_precision(model.score(features[~earlier]), payments.fraud[~earlier])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m atoll.examples.fraud_model OUT.onnx")
    precision = make_model(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: average precision {precision:.3f} on the {HELD_OUT_DAYS} days after its training")
