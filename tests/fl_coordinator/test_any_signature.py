"""Models that know nothing of payments: published with a golden case where one is found, and rolled out by what any
model can be judged by."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from atoll.coordinator import golden_inputs
from edge_runtime.inference import array_of
from edge_runtime.onnx_model import open_model, run_graph
from edge_runtime.probation import judge_golden
from fl_coordinator.publishing import Publisher
from fl_coordinator.rollout_driver import RolloutDriver
from fl_coordinator.tables.records import ReleaseRecord
from model_delta.errors import Malformed
from model_delta.signature import payment_width, size_of
from tests.fakes.any_signature import digits_model, kinds_model, model_bytes, tokens_model
from tests.fl_coordinator.platform_in_memory import START, Platform


@pytest.fixture
def made(tmp_path: Path) -> Platform:
    return Platform(tmp_path / "platform")


@pytest.fixture
def publisher(made: Platform) -> Publisher:
    """One that opens models as devices do, and makes inputs up as the coordinator does."""
    return Publisher(
        tenant="acme",
        region="eu-west",
        ledger=made.ledger,
        store=made.store,
        keyring=made.keyring,
        open_model=open_model,
        golden_inputs=golden_inputs,
        feature_counts={"fraud": 26},
    )


def publish(publisher: Publisher, source: bytes, **options: Any) -> ReleaseRecord:
    return publisher.publish(source, model="any", now=START, **options)


@pytest.mark.parametrize(
    ("source", "shapes"),
    [
        (digits_model(), {"pixels": (4, 1, 8, 8)}),
        (digits_model(rows_only=1), {"pixels": (1, 1, 8, 8)}),
        (tokens_model(), {"tokens": (4, 4), "mask": (4, 4)}),
        (kinds_model(), {"half": (4, 3), "chosen": (4, 3), "scale": ()}),
    ],
    ids=["digits", "one row only", "tokens", "kinds"],
)
def test_the_golden_case_is_the_first_that_the_model_answers(
    publisher: Publisher, source: bytes, shapes: dict[str, tuple[int, ...]]
) -> None:
    record = publish(publisher, source, quantize="none")
    (case,) = publisher.manifest(record.manifest).golden
    assert {name: tensor.shape for name, tensor in case.inputs.items()} == shapes
    inputs = {name: array_of(tensor, name) for name, tensor in case.inputs.items()}
    assert judge_golden([case], [run_graph(source, inputs)]).outcome == "healthy"
    assert record.form is not None
    assert record.form.untried == ""


def square_root_model(shape: list[int | str], kind: int = TensorProto.FLOAT) -> bytes:
    return model_bytes(
        [helper.make_node("Sqrt" if kind == TensorProto.FLOAT else "Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        {},
    )


@pytest.mark.parametrize(
    ("shape", "reason"),
    [(["n", 50], "a number that is not finite"), ([1, 3, 600, 600], "its inputs are too large to travel with it")],
)
def test_a_model_that_answers_nothing_made_up_comes_without_a_golden_case(
    publisher: Publisher, shape: list[int | str], reason: str
) -> None:
    record = publish(publisher, square_root_model(shape))
    assert publisher.manifest(record.manifest).golden == ()
    assert record.form is not None
    assert reason in record.form.untried
    assert made_again(publisher, record) == record


def made_again(publisher: Publisher, record: ReleaseRecord) -> ReleaseRecord:
    return publish(publisher, publisher.source(record.manifest))


def test_large_numbers_may_be_off_by_a_share_of_themselves(publisher: Publisher) -> None:
    nodes = [helper.make_node("Mul", ["x", "k"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    found = publish(publisher, model_bytes(nodes, [x], [y], {"k": np.array(1e6, np.float32)}))
    (case,) = publisher.manifest(found.manifest).golden
    assert 10 < case.tolerance < 1_000


def test_text_is_refused_when_it_is_published(publisher: Publisher) -> None:
    with pytest.raises(Malformed, match="model any: expected numbers in 'x', found ONNX element type 8"):
        publish(publisher, square_root_model(["n"], TensorProto.STRING))


def test_what_an_answer_may_take_is_inherited_and_does_not_change(publisher: Publisher) -> None:
    first = publish(publisher, digits_model(1), latency_ms_max=700.0)
    second = publish(publisher, digits_model(2))
    assert [publisher.manifest(one.manifest).requirements.latency_ms_max for one in (first, second)] == [700.0, 700.0]
    with pytest.raises(Malformed, match=r"with latency_ms_max 700\.0, found 50\.0; a version does not change"):
        publish(publisher, digits_model(2), latency_ms_max=50.0)


def test_the_signature_alone_says_what_kind_a_version_is(publisher: Publisher) -> None:
    manifest = publisher.manifest(publish(publisher, digits_model()).manifest)
    assert payment_width(manifest.inputs, manifest.outputs) is None
    assert size_of(manifest.inputs, batch=2) == 2 * 64 * 4


ROLLOUT = """
apiVersion: atoll/v1
kind: Rollout
metadata: {name: NAME}
spec:
  model: any
  cohorts: [{name: everyone}]
  strategy: {canary: {stages: [{share: 100%}]}}
  guardrails: [{metric: error_rate, max: 1%}, {metric: METRIC, max: 5%}]
"""


def test_a_guardrail_that_could_never_be_met_is_refused_at_once(made: Platform, publisher: Publisher) -> None:
    async def told() -> None:
        return None

    publish(publisher, digits_model())
    driver = RolloutDriver(
        tenant="acme",
        ledger=made.ledger,
        keyring=made.keyring,
        publisher=publisher,
        clock=made.clock,
        note=lambda kind, text: None,
        publish_soon=told,
    )
    for metric in ("decline_rate", "false_positive_rate", "miss_rate"):
        with pytest.raises(Malformed, match=f"guardrail {metric}: expected a version that decides payments, found one"):
            asyncio.run(driver.start(ROLLOUT.replace("METRIC", metric).replace("NAME", "one")))
    begun = asyncio.run(driver.start(ROLLOUT.replace("METRIC", "fallback_rate").replace("NAME", "one")))
    assert begun.state == "running"
