"""The baseline: small, exact on both sides of the wire, and refused when anything about it is off."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from model_delta.baseline import (
    BASELINE_BYTES_MAX,
    BASELINE_TYPE,
    BaselineModel,
    codes_of_scale,
    decode_verified,
    quantized,
    scale_of_codes,
    sealed_form,
)
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Malformed, SignatureInvalid
from model_delta.trust.signing import PublicKey, key_id, sign

KEY = ed25519.Ed25519PrivateKey.generate()
TRUSTED: dict[str, PublicKey] = {key_id(KEY.public_key()): KEY.public_key()}


def make(features: int = 26, hidden: int = 16, seed: int = 1) -> BaselineModel:
    rng = np.random.default_rng(seed)
    layers = [
        (rng.standard_normal((features, hidden)).astype(np.float32), rng.standard_normal(hidden).astype(np.float32)),
        (rng.standard_normal((hidden, 1)).astype(np.float32), rng.standard_normal(1).astype(np.float32)),
    ]
    scale = np.exp(rng.standard_normal(features)).astype(np.float32)
    mean = rng.standard_normal(features).astype(np.float32)
    return quantized(
        layers,
        mean,
        codes_of_scale(scale),
        tenant="acme",
        model="fraud",
        release=3,
        created=1_767_571_200,
        feature_set="terminal-26-v1",
        decision_threshold=0.37,
    )


def test_it_fits_nine_small_radio_frames() -> None:
    assert len(make().seal(KEY)) <= 450


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_what_was_sealed_is_what_is_read(features: int, hidden: int, seed: int) -> None:
    model = make(features, hidden, seed)
    if len(model.encode()) > BASELINE_BYTES_MAX - 70:
        with pytest.raises(Malformed, match="use fewer features or hidden units"):
            model.seal(KEY)
        return
    back = decode_verified(model.seal(KEY), TRUSTED)
    assert back.encode() == model.encode()
    rows = np.random.default_rng(seed).standard_normal((20, features)).astype(np.float32)
    np.testing.assert_array_equal(back.scores(rows), model.scores(rows))


def test_scores_follow_the_float_model_it_was_rounded_from() -> None:
    rng = np.random.default_rng(3)
    first = rng.integers(-7, 8, (8, 4)).astype(np.float32) / np.float32(8)  # int4 holds these exactly
    second = np.array([[7.0], [-3.0], [2.0], [-6.0]], np.float32) / np.float32(4)
    first[0, 0] = 7 / 8
    codes = codes_of_scale(np.full(8, 2.0, np.float32))
    mean = np.full(8, 0.5, np.float32)
    bias, last = np.zeros(4, np.float32), np.zeros(1, np.float32)
    model = quantized(
        [(first, bias), (second, last)],
        mean,
        codes,
        tenant="t",
        model="m",
        release=1,
        created=1,
        feature_set="f",
        decision_threshold=0.5,
    )
    rows = rng.standard_normal((50, 8)).astype(np.float32)
    logit = np.maximum((rows - mean) / 2.0 @ first, 0) @ second
    np.testing.assert_allclose(model.scores(rows), 1 / (1 + np.exp(-logit[:, 0])), atol=2e-3)
    assert model.score(rows[0]) == pytest.approx(float(model.scores(rows)[0]), abs=1e-6)


def test_feature_scales_survive_their_byte_within_nine_percent() -> None:
    scale = np.geomspace(1e-4, 5e4, 200).astype(np.float32)
    back = scale_of_codes(codes_of_scale(scale))
    assert (np.abs(np.log2(back / scale)) <= 1 / 16 + 1e-5).all()


def test_an_envelope_from_a_keyring_takes_the_same_short_form() -> None:
    model = make()
    assert sealed_form(sign(BASELINE_TYPE, model.encode(), [KEY])) == model.seal(KEY)
    with pytest.raises(Malformed, match="found type 'plan'"):
        sealed_form(sign("plan", model.encode(), [KEY]))


def test_every_flipped_byte_is_refused() -> None:
    data = make(6, 3).seal(KEY)
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0x20
        with pytest.raises((SignatureInvalid, Malformed)):
            decode_verified(bytes(broken), TRUSTED)


def test_a_strange_key_is_refused() -> None:
    with pytest.raises(SignatureInvalid, match="found 0"):
        decode_verified(make().seal(ed25519.Ed25519PrivateKey.generate()), TRUSTED)


def test_a_format_from_the_future_is_named() -> None:
    plain = unpack_plain(make().encode())
    plain[0] = 2
    with pytest.raises(Malformed, match="format 2, this reader knows up to 1"):
        decode_verified(sealed_form(sign(BASELINE_TYPE, pack(plain), [KEY])), TRUSTED)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (3, "three", "release .* expected int, found str"),
        (8, b"\x88", "hidden: expected 208 bytes"),
        (8, b"\x00" * 208, "outside -7..7"),
        (9, float("nan"), "not a finite number"),
        (10, b"", "make no model"),
        (7, b"", "make no model"),
    ],
)
def test_signed_nonsense_is_malformed(key: int, value: object, said: str) -> None:
    plain = unpack_plain(make().encode())
    plain[key] = value
    with pytest.raises(Malformed, match=said):
        decode_verified(sealed_form(sign(BASELINE_TYPE, pack(plain), [KEY])), TRUSTED)


def test_too_many_bytes_are_not_even_parsed() -> None:
    with pytest.raises(Malformed, match="at most 717 bytes, found 5000"):
        decode_verified(b"\x00" * 5000, TRUSTED)


def test_a_wrong_number_of_features_is_named() -> None:
    with pytest.raises(ValueError, match="expected 26 features"):
        make().score(np.zeros(25, np.float32))


def test_models_that_differ_encode_differently() -> None:
    assert make().encode() != replace(make(), release=4).encode()
