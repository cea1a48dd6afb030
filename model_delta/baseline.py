"""The tiny model a device falls back to, small enough for a handful of LoRaWAN frames or SMS.

It is a perceptron F -> H -> 1 with ReLU and a sigmoid, int4 weights (-7 to 7) with one scale per layer, and one byte of
scale per feature. The features' means are folded into the first bias. With 26 features and 16 hidden units it takes
about 420 bytes, signature included.

Wire form: the CBOR array [payload, signature]. `payload` is a CBOR map with small integer keys in deterministic form
(RFC 8949 section 4.2); the signature is over the DSSE pre-authentication encoding of type `baseline`, as everywhere
else. The key's id is not sent: a reader tries the few keys it trusts for the role.

Compatibility promise: keys are never re-used or re-typed; `format` (key 0) is raised when an old reader must refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Malformed
from model_delta.trust.signing import Envelope, PrivateKey, PublicKey, Signature, key_id, sign, verify

BASELINE_TYPE = "baseline"
BASELINE_BYTES_MAX = 717
"""No baseline is larger, signature included: 15 LoRaWAN frames of 51 bytes."""

FORMAT = 1
_LEVEL_MAX = 7
_KEYS_MAX = 16

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class BaselineModel:
    """One baseline. `release` only grows per tenant and model; `created` is in Unix seconds; a score at or above
    `decision_threshold` declines. `hidden` int8[F, H] and `output` int8[H] hold -7..7; `feature_codes` are one byte per
    feature (see `scale_of_codes`)."""

    tenant: str
    model: str
    release: int
    created: int
    feature_set: str
    decision_threshold: float
    feature_codes: bytes
    hidden: Int8
    hidden_scale: float
    hidden_bias: Float32
    output: Int8
    output_scale: float
    output_bias: float

    @property
    def features(self) -> int:
        """How many features it takes."""
        return len(self.feature_codes)

    def score(self, features: npt.ArrayLike) -> float:
        """The fraud score in [0, 1] of float32[F]. Raises ValueError for another length."""
        return float(self.scores(np.asarray(features, dtype=np.float32)[None, :])[0])

    def scores(self, features: Float32) -> Float32:
        """The fraud scores float32[n] of float32[n, F]."""
        if features.ndim != 2 or features.shape[1] != self.features:
            raise ValueError(f"baseline {self.model}: expected {self.features} features, found {features.shape[1:]}")
        hidden = np.maximum(features @ self._folded + self.hidden_bias, np.float32(0))
        logit = hidden @ (self.output * np.float32(self.output_scale)) + np.float32(self.output_bias)
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logit)), dtype=np.float32)

    @cached_property
    def _folded(self) -> Float32:
        scale = scale_of_codes(self.feature_codes)
        return np.asarray(self.hidden * np.float32(self.hidden_scale) / scale[:, None], dtype=np.float32)

    def encode(self) -> bytes:
        """The payload bytes that are signed. Equal models encode equally."""
        return pack(
            {
                0: FORMAT,
                1: self.tenant,
                2: self.model,
                3: self.release,
                4: self.created,
                5: self.feature_set,
                6: self.decision_threshold,
                7: self.feature_codes,
                8: _packed(self.hidden),
                9: self.hidden_scale,
                10: self.hidden_bias.astype("<f2").tobytes(),
                11: _packed(self.output),
                12: self.output_scale,
                13: self.output_bias,
            }
        )

    def seal(self, key: PrivateKey) -> bytes:
        """The bytes that travel, signed by `key` (Ed25519 for the sizes promised here)."""
        return sealed_form(sign(BASELINE_TYPE, self.encode(), [key]))


def sealed_form(envelope: Envelope) -> bytes:
    """The short wire form of a signed baseline: for signers that hand out envelopes.

    Raises Malformed for another type, no signature, or more bytes than BASELINE_BYTES_MAX.
    """
    if envelope.type != BASELINE_TYPE or not envelope.signatures:
        raise Malformed(f"baseline: expected a signed {BASELINE_TYPE!r} envelope, found type {envelope.type!r}")
    data = pack([envelope.payload, envelope.signatures[0].value])
    if len(data) > BASELINE_BYTES_MAX:
        raise Malformed(
            f"baseline: {len(data)} bytes, at most {BASELINE_BYTES_MAX} may travel; use fewer features or hidden units"
        )
    return data


def decode_verified(data: bytes, keys: Mapping[str, PublicKey]) -> BaselineModel:
    """Verify, then parse. `keys` are those of the role `baseline`, by key id; whether it is older than the one at hand
    is for the holder to ask. Raises SignatureInvalid and Malformed."""
    if len(data) > BASELINE_BYTES_MAX:
        raise Malformed(f"baseline: expected at most {BASELINE_BYTES_MAX} bytes, found {len(data)}")
    outer = unpack_plain(data)
    if not (isinstance(outer, list) and len(outer) == 2 and all(isinstance(part, bytes) for part in outer)):
        raise Malformed("baseline: expected the CBOR array [payload, signature]")
    candidates = tuple(Signature(key_id(key), outer[1]) for key in list(keys.values())[:_KEYS_MAX])
    payload = verify(Envelope(BASELINE_TYPE, outer[0], candidates), BASELINE_TYPE, keys)
    return _parse(payload)


def quantized(
    layers: Sequence[tuple[Float32, Float32]],
    mean: Float32,
    feature_codes: bytes,
    *,
    tenant: str,
    model: str,
    release: int,
    created: int,
    feature_set: str,
    decision_threshold: float,
) -> BaselineModel:
    """A baseline from trained layers (W float32[F, H], b[H]), (W [H, 1], b[1]) over (x - mean) / scale.

    Each layer's weights are rounded to int4 at the scale of least squared error. Raises ValueError for other shapes.
    """
    (first, first_bias), (second, second_bias) = layers
    if first.shape != (len(feature_codes), len(first_bias)) or second.shape != (first.shape[1], 1):
        raise ValueError(f"baseline: layers {first.shape}, {second.shape} do not fit {len(feature_codes)} features")
    first_scale, second_scale = int4_scale(first), int4_scale(second)
    hidden = to_int4(first, first_scale)
    shift = (mean / scale_of_codes(feature_codes)) @ (hidden * np.float32(first_scale))
    return BaselineModel(
        tenant=tenant,
        model=model,
        release=release,
        created=created,
        feature_set=feature_set,
        decision_threshold=_half(decision_threshold),
        feature_codes=feature_codes,
        hidden=hidden,
        hidden_scale=first_scale,
        hidden_bias=(first_bias - shift).astype(np.float16).astype(np.float32),
        output=to_int4(second[:, 0], second_scale),
        output_scale=second_scale,
        output_bias=_half(float(second_bias[0])),
    )


def int4_scale(weights: Float32) -> float:
    """The step (a float16 value) at which rounding to -7..7 leaves the least squared error; 1.0 for all zeros."""
    largest = float(np.abs(weights).max())
    if largest == 0.0:
        return 1.0
    steps = [_half(largest / _LEVEL_MAX * share) for share in np.linspace(0.3, 1.0, 29)]
    candidates = [step for step in steps if step > 0.0] or [2.0**-24]
    return min(candidates, key=lambda step: float(((to_int4(weights, step) * step - weights) ** 2).sum()))


def to_int4(weights: Float32, scale: float) -> Int8:
    """Weights in steps of `scale`, rounded half to even and cut to -7..7."""
    return np.asarray(np.clip(np.rint(weights / scale), -_LEVEL_MAX, _LEVEL_MAX), dtype=np.int8)


def codes_of_scale(scale: Float32) -> bytes:
    """One byte per feature: the nearest 2^((code - 128) / 8), from 2^-16 to 2^15.9 in steps of 9 %."""
    return bytes(np.clip(np.rint(np.log2(scale) * 8) + 128, 0, 255).astype(np.uint8))


def scale_of_codes(codes: bytes) -> Float32:
    """The features' scales float32[F] that `codes` stand for."""
    return np.exp2((np.frombuffer(codes, dtype=np.uint8).astype(np.float32) - 128) / 8).astype(np.float32)


def _packed(levels: Int8) -> bytes:
    """Two int4 a byte, low half first, each offset by 8; an odd count is filled up with zero weight."""
    offset = (levels.ravel().astype(np.int16) + 8).astype(np.uint8)
    if len(offset) % 2:
        offset = np.append(offset, np.uint8(8))
    return bytes(offset[0::2] | (offset[1::2] << 4))


def _unpacked(data: bytes, count: int, what: str) -> Int8:
    if len(data) != (count + 1) // 2:
        raise Malformed(f"baseline: {what}: expected {(count + 1) // 2} bytes for {count} weights, found {len(data)}")
    both = np.frombuffer(data, dtype=np.uint8)
    levels = np.stack([both & 15, both >> 4], axis=1).ravel().astype(np.int8) - 8
    if (levels < -_LEVEL_MAX).any() or levels[count:].any():
        raise Malformed(f"baseline: {what}: a weight lies outside -7..7, or the filling is not zero")
    return np.asarray(levels[:count], dtype=np.int8)


_FIELDS: Mapping[int, tuple[str, type]] = {
    0: ("format", int),
    1: ("tenant", str),
    2: ("model", str),
    3: ("release", int),
    4: ("created", int),
    5: ("feature_set", str),
    6: ("decision_threshold", float),
    7: ("feature_codes", bytes),
    8: ("hidden", bytes),
    9: ("hidden_scale", float),
    10: ("hidden_bias", bytes),
    11: ("output", bytes),
    12: ("output_scale", float),
    13: ("output_bias", float),
}


def _parse(payload: bytes) -> BaselineModel:
    plain = unpack_plain(payload)
    if not isinstance(plain, dict) or type(plain.get(0)) is not int:
        raise Malformed("baseline: expected a CBOR map with the format number under key 0")
    if plain[0] > FORMAT:
        raise Malformed(f"baseline: format {plain[0]}, this reader knows up to {FORMAT}")
    fields: dict[str, Any] = {}
    for key, (name, kind) in _FIELDS.items():
        found = type(plain.get(key))
        if found is not kind:
            raise Malformed(f"baseline: {name} (key {key}): expected {kind.__name__}, found {found.__name__}")
        fields[name] = plain[key]
    del fields["format"]
    features = len(fields["feature_codes"])
    width = len(fields["hidden_bias"]) // 2
    if not features or not width or len(fields["hidden_bias"]) % 2:
        raise Malformed(f"baseline: {features} features and {len(fields['hidden_bias'])} bytes of bias make no model")
    fields["hidden"] = _unpacked(fields["hidden"], features * width, "hidden").reshape(features, width)
    fields["output"] = _unpacked(fields["output"], width, "output")
    fields["hidden_bias"] = np.frombuffer(fields["hidden_bias"], dtype="<f2").astype(np.float32)
    numbers = [fields["hidden_scale"], fields["output_scale"], fields["output_bias"], fields["decision_threshold"]]
    if not (np.isfinite(numbers).all() and np.isfinite(fields["hidden_bias"]).all()):
        raise Malformed("baseline: a scale, a bias or the threshold is not a finite number")
    return BaselineModel(**fields)


def _half(value: float) -> float:
    """The nearest float16, which CBOR writes in three bytes."""
    return float(np.float16(value))
