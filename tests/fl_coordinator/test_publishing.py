"""What a publisher makes of a float32 model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from fl_coordinator import forms
from fl_coordinator.publishing import Publisher
from model_delta.errors import Malformed
from model_delta.graphs.int8 import form_of, quantize_weights
from model_delta.graphs.mlp import mlp_model
from model_delta.manifest import Manifest
from model_delta.patch.quantization import Measured, Worth
from model_delta.segments import read_tensor, stored_tensors
from tests.fl_coordinator.platform_in_memory import FEATURES, START, Platform, golden_inputs


class WeightModel:
    """Answers one product of the stored (or dequantized) first matrix with each row: its size, made small."""

    def __init__(self, manifest: Manifest, file: bytes) -> None:
        self.digest = manifest.file_digest
        stored = {tensor.name: read_tensor(file, tensor) for tensor in stored_tensors(file)}
        self._weight = stored["layer0.weight"] * stored.get("layer0.weight_scale", np.float32(1))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"score": np.asarray(np.abs(inputs["features"] @ self._weight) / 100, np.float32)}


class RawModel(WeightModel):
    """Answers any numbers."""

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"score": super().run(inputs)["score"] * -100}


def wide_model(size: float, step: float = 0.0) -> bytes:
    """A model whose weights are of that size, the first layer's up to a `step` of themselves smaller."""
    rng, moves = np.random.default_rng(1), np.random.default_rng(2)
    sizes = [FEATURES, 64, 1]
    weights = [
        (rng.normal(0, size, pair).astype(np.float32), np.zeros(pair[1], np.float32)) for pair in pairwise(sizes)
    ]
    first = weights[0][0] * (1 - step * moves.random(weights[0][0].shape))
    weights[0] = (first.astype(np.float32), weights[0][1])
    return mlp_model(weights, np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32))


def tensors(file: bytes) -> dict[str, Any]:
    return {tensor.name: read_tensor(file, tensor) for tensor in stored_tensors(file)}


def platform(folder: Path) -> Platform:
    made = Platform(folder)
    made.publisher._forming._open_model = WeightModel
    return made


def test_a_small_update_keeps_the_scales_and_what_did_not_move(tmp_path: Path) -> None:
    publisher = platform(tmp_path).publisher
    first = publisher.publish(wide_model(1.0), model="fraud", now=START)
    second = publisher.publish(wide_model(1.0, step=0.02), model="fraud", now=START + 1)
    before, after = (tensors(publisher.file(record.manifest)) for record in (first, second))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"layer0.weight"}


def test_a_model_too_small_for_its_parents_scales_is_quantized_afresh(tmp_path: Path) -> None:
    """All weights shrank a hundredfold: on the parent's scales next to nothing would be left of them."""
    publisher = platform(tmp_path).publisher
    publisher.publish(wide_model(1.0), model="fraud", now=START)
    second = publisher.publish(wide_model(0.01), model="fraud", now=START + 1)
    assert publisher.file(second.manifest) == quantize_weights(wide_model(0.01))


def test_growth_that_clipping_would_swallow_is_quantized_afresh(tmp_path: Path) -> None:
    """Channels of six weights that all grow by up to 4 %: the scale still holds by the rule, yet the largest weights,
    which moved most, would stay where they were, and outputs alone would not tell."""
    publisher = platform(tmp_path).publisher
    publisher.publish(wide_model(1.0), model="fraud", now=START)
    grown = wide_model(1.0, step=-0.04)
    second = publisher.publish(grown, model="fraud", now=START + 1)
    assert publisher.file(second.manifest) == quantize_weights(grown)
    assert publisher.file(second.manifest) != quantize_weights(grown, quantize_weights(wide_model(1.0)))


# int8 or float32.


def measuring(made: Platform, slower: float, worth: Mapping[str, Worth] | None = None) -> Publisher:
    """A publisher on a machine where int8 takes `slower` times as long."""

    def latencies_us(models: Sequence[Any], row: Mapping[str, Any]) -> list[float]:
        assert row["features"].shape == (1, FEATURES)
        return [10.0 * (slower if model.int8 else 1.0) for model in models]

    class Timed(WeightModel):
        def __init__(self, manifest: Manifest, file: bytes) -> None:
            super().__init__(manifest, file)
            self.int8 = form_of(file) is not None

    return Publisher(
        tenant="acme",
        region="eu-west",
        ledger=made.ledger,
        store=made.store,
        keyring=made.keyring,
        open_model=Timed,
        golden_inputs=golden_inputs,
        feature_counts={"fraud": FEATURES},
        latencies_us=latencies_us,
        worth=worth,
    )


def wider_model(seed: int = 1) -> bytes:
    """One whose file is mostly weights."""
    rng, sizes = np.random.default_rng(seed), [FEATURES, 256, 64, 1]
    weights = [(rng.normal(0, 1, pair).astype(np.float32), np.zeros(pair[1], np.float32)) for pair in pairwise(sizes)]
    return mlp_model(weights, np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32))


def is_int8(publisher: Publisher, manifest: str) -> bool:
    return form_of(publisher.file(manifest)) is not None


@pytest.mark.parametrize(("slower", "int8"), [(0.5, True), (1.2, True), (1.3, False), (float("nan"), False)])
def test_int8_is_released_where_it_measures_better(tmp_path: Path, slower: float, int8: bool) -> None:
    publisher = measuring(platform(tmp_path), slower)
    record = publisher.publish(wider_model(), model="fraud", now=START)
    assert is_int8(publisher, record.manifest) == int8
    assert record.form is not None
    assert record.form.int8 == int8
    whole, small = record.form.measured["float32"][0], record.form.measured["int8"][0]
    assert (whole, small < 0.4 * whole) == (len(wider_model()), True)
    assert publisher._ledger.release(record.manifest) == record


def test_a_version_keeps_its_parents_form_unless_another_is_asked_for(tmp_path: Path) -> None:
    made = platform(tmp_path)
    first = measuring(made, 2.0).publish(wider_model(1), model="fraud", now=START)
    publisher = measuring(made, 0.5)  # another day, another clock
    second = publisher.publish(wider_model(2), model="fraud", now=START + 1)
    assert [one.form is not None and one.form.int8 for one in (first, second)] == [False, False]
    assert second.form is not None
    assert second.form.reason.startswith("as its parent; int8 is right for")
    assert publisher.file(second.manifest) == wider_model(2)
    third = publisher.publish(wider_model(3), model="fraud", now=START + 2, quantize="auto")
    fourth = publisher.publish(wider_model(4), model="fraud", now=START + 3)
    fifth = publisher.publish(wider_model(5), model="fraud", now=START + 4, quantize="none")
    assert [is_int8(publisher, one.manifest) for one in (third, fourth, fifth)] == [True, True, False]
    sixth = measuring(made, 9.0).publish(wider_model(6), model="fraud", now=START + 5, quantize="int8")
    assert sixth.form is not None
    assert (sixth.form.int8, sixth.form.reason.split(";")[0]) == (True, "asked for")
    candidate = publisher.prepare(wider_model(7), model="fraud", now=START + 6, parent=sixth.manifest)
    assert form_of(candidate.file) is not None


def test_a_version_does_not_change_its_form(tmp_path: Path) -> None:
    publisher = measuring(platform(tmp_path), 0.5)
    first = publisher.publish(wider_model(), model="fraud", now=START)
    assert publisher.publish(wider_model(), model="fraud", now=START, quantize="int8") == first
    with pytest.raises(Malformed, match="are version 1 already, released as int8; leave --quantize out"):
        publisher.publish(wider_model(), model="fraud", now=START, quantize="none")


@pytest.mark.parametrize("other", [{"name": "two"}, {"decision_threshold": 0.9}, {"feature_set": "else"}])
def test_what_is_published_again_must_be_asked_for_as_it_is(tmp_path: Path, other: dict[str, Any]) -> None:
    publisher = platform(tmp_path).publisher
    same = {"name": "one", "decision_threshold": 0.3}
    first = publisher.publish(wide_model(0.5), model="fraud", now=START, **same)
    assert publisher.publish(wide_model(0.5), model="fraud", now=START + 1, **same) == first
    assert publisher.publish(wide_model(0.5), model="fraud", now=START + 1) == first
    with pytest.raises(Malformed, match=f"are version 1 already, with {next(iter(other))} .*; a version does not chan"):
        publisher.publish(wide_model(0.5), model="fraud", now=START + 1, **other)


def test_a_withdrawn_version_is_not_published_again(tmp_path: Path) -> None:
    made = platform(tmp_path)
    first = made.publisher.publish(wide_model(0.5), model="fraud", now=START)
    made.ledger.save_rollout(
        name="r", model="fraud", state="stopped", created=START, record=b"", withdrawn={first.manifest: "too slow"}
    )
    with pytest.raises(Malformed, match=r"were version 1, which was withdrawn \(too slow\)"):
        made.publisher.publish(wide_model(0.5), model="fraud", now=START + 1)


def test_what_cannot_become_int8_is_released_as_it_is(tmp_path: Path) -> None:
    publisher = measuring(platform(tmp_path), 0.5)
    rounded = quantize_weights(wider_model())
    record = publisher.publish(rounded, model="fraud", now=START)
    assert record.form is not None
    assert (record.form.int8, record.form.reason[:8]) == (True, "released")
    assert publisher.file(record.manifest) == rounded
    proto = onnx.ModelProto.FromString(wider_model())
    proto.opset_import[0].version = 12  # before DequantizeLinear knew channels
    old = proto.SerializeToString()
    assert publisher.publish(old, model="other", now=START).form == forms.Form(
        int8=False, reason="released as handed in: nothing in it can become int8"
    )
    with pytest.raises(Malformed, match="expected constant float32 matrices that can become int8, found none"):
        publisher.publish(old, model="third", now=START, quantize="int8")


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("a b/c", "", "model: expected a name of lower-case letters, digits, '-' and '.', found 'a b/c'"),
        ("../x", "", "found '../x'"),
        ("Fraud", "", "found 'Fraud'"),
        ("fraud/#", "", "found 'fraud/#'"),
        ("fraud", "latest", "name: expected a word of your own, found 'latest'"),
        ("fraud", "3", "found '3'"),
    ],
)
def test_a_name_that_no_rollout_could_mean_is_refused(tmp_path: Path, model: str, name: str, message: str) -> None:
    """One model of a name that is no path would keep all others from being vouched for."""
    made = platform(tmp_path)
    with pytest.raises(Malformed, match=re.escape(message)):
        made.publisher.publish(wide_model(0.5), model=model, name=name, now=START)
    assert made.ledger.releases() == []


def test_scores_that_no_device_would_take_are_refused(tmp_path: Path) -> None:
    """A model without its last layer: its inputs fit, its answers are no probabilities."""
    made = Platform(tmp_path)
    made.publisher._forming._open_model = RawModel
    with pytest.raises(Malformed, match=r"expected scores from 0 to 1, found -\S+ to \S+; let the model end in one"):
        made.publisher.publish(wide_model(0.5), model="fraud", now=START)
    assert made.ledger.releases() == []
    assert made.publisher.publish(wide_model(0.5), model="ranking", now=START).release == 1


def test_what_was_lost_by_locked_scales_is_told(tmp_path: Path) -> None:
    publisher = platform(tmp_path).publisher
    publisher.publish(wide_model(1.0), model="fraud", now=START)
    alike = publisher.publish(wide_model(1.0, step=0.02), model="fraud", now=START + 1)
    afresh = publisher.publish(wide_model(1.0, step=-0.04), model="fraud", now=START + 2)
    assert alike.form is not None
    assert afresh.form is not None
    assert alike.form.fresh_because == ()
    assert alike.form.distance is not None
    assert alike.form.carried is not None
    assert alike.form.carried.share == pytest.approx(1.0, abs=0.3)
    assert "carried share" in afresh.form.fresh_because[0]
    assert msgspec.json.decode(msgspec.json.encode(afresh.form), type=forms.Form) == afresh.form


def test_the_form_for_more_devices_is_released_and_every_class_is_told() -> None:
    int8, float32 = Measured(70, 120.0), Measured(100, 100.0)
    worth = {"pos": Worth(), "mcu": Worth(smaller=0.8, slower_max=3.0)}
    few = forms.decide(int8, float32, worth, {"pos": 5, "mcu": 4, "odd": 1, "gone": 0})
    assert few[0] is False
    assert few[1] == "int8 is right for 4 of 10 devices"
    assert {name: (one.devices, one.int8) for name, one in few[2].items()} == {
        "pos": (5, False),
        "mcu": (4, True),
        "odd": (1, False),
    }
    assert forms.decide(int8, float32, worth, {"pos": 4, "mcu": 4})[0] is True  # a tie
    assert forms.decide(int8, float32, worth, {})[:2] == (True, "int8 is right for 1 of 2 device classes")
    assert forms.decide(int8, float32, {}, {})[0] is False
    assert forms.recorded(Measured(3, float("nan"))) == (3, None)
    with pytest.raises(Malformed, match="expected auto, int8 or none"):
        forms.asked("int4")
