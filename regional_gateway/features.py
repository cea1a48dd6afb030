"""From named features to the vector that a model reads.

The order of a feature set's names is the order of the model's columns. A name too many is refused like a name too few:
a misspelt feature must not silently become a default.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from model_delta.errors import Malformed

NAMES_SHOWN_MAX = 8


def vector_of(features: Mapping[str, float], names: tuple[str, ...]) -> NDArray[np.float32]:
    """`features` as float32[1, len(names)] in the order of `names`.

    Raises Malformed, naming what is missing, unknown or not finite as float32. The message never holds a value.
    """
    if len(features) != len(names) or any(name not in features for name in names):
        missing = [name for name in names if name not in features]
        known = set(names)
        unknown = [name for name in features if name not in known]
        raise Malformed(f"features: expected {len(names)} names, found {_differences(missing, unknown)}")
    with np.errstate(over="ignore"):
        vector = np.array([[features[name] for name in names]], dtype=np.float32)
    finite = np.isfinite(vector[0])
    if not finite.all():
        bad = [name for name, good in zip(names, finite, strict=True) if not good]
        raise Malformed(f"features: expected finite float32 numbers, found another kind in {_listed(bad)}")
    return vector


def _differences(missing: list[str], unknown: list[str]) -> str:
    parts = [f"missing {_listed(missing)}"] if missing else []
    if unknown:
        parts.append(f"unknown {_listed(unknown)}")
    return "; ".join(parts)


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:64] for name in names[:NAMES_SHOWN_MAX])
    more = len(names) - NAMES_SHOWN_MAX
    return f"{shown} and {more} more" if more > 0 else shown
