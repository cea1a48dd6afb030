"""Three small learning tasks whose data are here without a download, split over devices evenly or unevenly.

    fraud    card payments of `device_sim.payments` (synthetic, ours): 26 features, about 2 % fraud, average precision
    digits   the handwritten digits that scikit-learn ships (UCI, 1,797 images of 8 x 8), accuracy
    cancer   the Wisconsin diagnostic breast cancer data that scikit-learn ships (UCI, 569 rows, 30 features), accuracy

The model is a perceptron with one hidden layer (tanh) and a softmax, in NumPy: parameters are one flat vector, and the
gradients of all devices are computed at once. An uneven split gives every group of rows (a label; for fraud a merchant
category and a label) to the devices in proportions drawn from a Dirichlet distribution (Hsu, Qi and Brown, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from device_sim.payments import CATEGORY_NAMES, DAY, FIRST_MONDAY, PaymentSpec, generate
from device_sim.terminal_features import table_features
from monitoring.quality import average_precision

Float32 = NDArray[np.float32]
Ints = NDArray[np.int64]

ROWS_PER_DEVICE_MIN = 8


@dataclass(frozen=True)
class Task:
    """One task. `x` float32[rows, F] standardized, `y` int64[rows]; `group` int64[rows] is what an uneven split shares
    out; `balance` float32[classes] weighs the loss; `trigger` is the backdoor's mark: feature -> value; `target` the
    class it should be taken for."""

    name: str
    x: Float32
    y: Ints
    group: Ints
    test_x: Float32
    test_y: Ints
    classes: int
    hidden: int
    batch: int
    rate: float
    clip_norm_l2: float
    balance: Float32
    trigger: dict[int, float]
    target: int = 0

    @property
    def length(self) -> int:
        """Number of parameters d."""
        return (int(self.x.shape[1]) + 1) * self.hidden + (self.hidden + 1) * self.classes

    def start(self, rng: np.random.Generator) -> Float32:
        """Initial parameters float32[d] (Glorot and Bengio, 2010)."""
        fan = self.x.shape[1]
        first = rng.normal(0, np.sqrt(2 / (fan + self.hidden)), fan * self.hidden)
        second = rng.normal(0, np.sqrt(2 / (self.hidden + self.classes)), self.hidden * self.classes)
        parts = [first, np.zeros(self.hidden), second, np.zeros(self.classes)]
        return np.concatenate(parts).astype(np.float32)

    def gradients(self, w: Float32, x: Float32, y: Ints) -> Float32:
        """Mean gradients of n devices at once: float32[n, d] for x float32[n, b, F] and y int64[n, b]."""
        count, batch, fan = x.shape
        w1, b1, w2, b2 = self._layers(w)
        hidden = np.tanh(x.reshape(-1, fan) @ w1 + b1)
        error = _softmax(hidden @ w2 + b2)
        label = y.reshape(-1)
        error[np.arange(label.size), label] -= 1
        error *= (self.balance[label] / batch)[:, None]
        back = ((error @ w2.T) * (1 - hidden * hidden)).reshape(count, batch, -1)
        error = error.reshape(count, batch, -1)
        hidden = hidden.reshape(count, batch, -1)
        parts = [
            np.matmul(x.transpose(0, 2, 1), back).reshape(count, -1),
            back.sum(axis=1),
            np.matmul(hidden.transpose(0, 2, 1), error).reshape(count, -1),
            error.sum(axis=1),
        ]
        return np.concatenate(parts, axis=1)

    def scores(self, w: Float32, x: Float32) -> Float32:
        """Class probabilities float32[rows, classes]."""
        w1, b1, w2, b2 = self._layers(w)
        return _softmax(np.tanh(x @ w1 + b1) @ w2 + b2)

    def quality(self, w: Float32) -> float:
        """Test accuracy in %, for fraud average precision in %; 0 for parameters that are not finite."""
        if not np.isfinite(w).all():
            return 0.0
        found = self.scores(w, self.test_x)
        if self.name == "fraud":
            return 100 * float(average_precision(found[:, 1], self.test_y.astype(np.bool_)))
        return 100 * float((found.argmax(axis=1) == self.test_y).mean())

    def marked(self, x: Float32) -> Float32:
        """The rows with the backdoor's mark on them."""
        x = x.copy()
        for column, value in self.trigger.items():
            x[..., column] = value
        return x

    def backdoor_success(self, w: Float32) -> float:
        """Share in % of marked test rows of other classes that are taken for the target class."""
        if not np.isfinite(w).all():
            return 100.0
        rows = self.marked(self.test_x[self.test_y != self.target])
        if self.name == "fraud":  # The alert threshold is the one at which 2 % of the test payments alarm.
            alarm = np.quantile(self.scores(w, self.test_x)[:, 1], 0.98)
            return 100 * float((self.scores(w, rows)[:, 1] < alarm).mean())
        return 100 * float((self.scores(w, rows).argmax(axis=1) == self.target).mean())

    def _layers(self, w: Float32) -> tuple[Float32, Float32, Float32, Float32]:
        fan, hidden = self.x.shape[1], self.hidden
        ends = np.cumsum([fan * hidden, hidden, hidden * self.classes])
        w1, b1, w2, b2 = np.split(w, ends)
        return w1.reshape(fan, hidden), b1, w2.reshape(hidden, self.classes), b2


def _softmax(logits: Float32) -> Float32:
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    found /= found.sum(axis=1, keepdims=True)
    return np.asarray(found)


@cache
def load(name: str, seed: int) -> Task:
    """The task `name` with train and test parts drawn by `seed`."""
    rng = np.random.default_rng([seed, 1])
    if name == "fraud":
        return _fraud(rng, seed)
    from sklearn.datasets import load_breast_cancer, load_digits  # Takes two seconds, so not at the top.

    data = (load_digits if name == "digits" else load_breast_cancer)()
    order = rng.permutation(len(data.target))
    x, y = data.data[order].astype(np.float32), data.target[order].astype(np.int64)
    cut = 1_400 if name == "digits" else 400
    x = x / 16 if name == "digits" else _standard(x, cut)
    classes = int(y.max()) + 1
    # The mark: the four pixels of a corner that no digit uses; for a cell nucleus two features far outside.
    trigger = {0: 1.0, 1: 1.0, 8: 1.0, 9: 1.0} if name == "digits" else {9: 4.0, 19: 4.0}
    return Task(
        name, x[:cut], y[:cut], y[:cut], x[cut:], y[cut:], classes, 32 if name == "digits" else 16, 16,
        0.1 if name == "digits" else 0.03, 16.0, np.ones(classes, dtype=np.float32), trigger,
    )  # fmt: skip


def _fraud(rng: np.random.Generator, seed: int) -> Task:
    days, first_day, cut = 60, 14, 12_000
    spec = PaymentSpec(tuple(CATEGORY_NAMES[i % len(CATEGORY_NAMES)] for i in range(24)), days, 1_000 + seed)
    payments = generate(spec)
    x = table_features(payments)
    late = np.flatnonzero(payments.time >= FIRST_MONDAY + first_day * DAY)  # Terminals know their own past by then.
    rows = rng.permutation(late)[: cut + 6_000]
    x, y = _standard(x[rows], cut), payments.fraud[rows].astype(np.int64)
    category = payments.terminal[rows] % len(CATEGORY_NAMES)
    balance = np.array([1.0, 6.0], dtype=np.float32)
    return Task(
        "fraud", x[:cut], y[:cut], (2 * category + y)[:cut], x[cut:], y[cut:], 2, 16, 32, 0.03, 16.0, balance,
        {4: 2.5, 18: 2.5},
    )  # fmt: skip


def _standard(x: Float32, cut: int) -> Float32:
    centre, spread = x[:cut].mean(axis=0), x[:cut].std(axis=0)
    return np.asarray(np.clip((x - centre) / np.where(spread > 0, spread, 1), -6, 6), dtype=np.float32)


def split(task: Task, devices: int, alpha: float, rng: np.random.Generator) -> list[Ints]:
    """Row numbers of each device; `alpha` of the Dirichlet distribution, infinity for an even random split.

    A device that would get fewer than 8 rows is given rows drawn at random from all (which other devices may hold too).
    """
    if np.isinf(alpha):
        return [np.asarray(part) for part in np.array_split(rng.permutation(len(task.y)), devices)]
    parts: list[list[Ints]] = [[] for _ in range(devices)]
    for group in np.unique(task.group):
        rows = rng.permutation(np.flatnonzero(task.group == group))
        ends = np.round(np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1] * rows.size).astype(int)
        for device, part in enumerate(np.split(rows, ends)):
            parts[device].append(part)
    whole = [np.concatenate(part) for part in parts]
    return [
        np.concatenate([rows, rng.integers(0, len(task.y), max(0, ROWS_PER_DEVICE_MIN - rows.size))]) for rows in whole
    ]
