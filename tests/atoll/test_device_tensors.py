"""`atoll device run` for a model of any signature: what it is asked, what is printed, and what ends it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from atoll.device_lines import Teller
from atoll.device_tensors import TensorSource, serve_tensors
from atoll.tensor_rows import Row
from model_delta.errors import Malformed
from tests.edge_runtime.world import World, eventually
from tests.fakes.any_signature import PIXELS, digits_model, model_bytes

ROW: Row = {"pixels": PIXELS["pixels"].tolist()}
RATE = 200.0


def served(
    folder: Path, file: bytes, rows: Sequence[Row] = (), *, count: int = 3, payments: int | None = None, **options: Any
) -> tuple[bool | None, list[str]]:
    """What a device of this version printed until `count` answers, and what serving it came to (None: cut off)."""
    printed: list[str] = []
    folder.mkdir(exist_ok=True)

    async def story() -> bool | None:
        world = World(folder)
        world.start()
        world.plan(world.publish(file, **options))
        teller = Teller(count, as_json=folder.name == "json", write=printed.append)
        teller.done = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve_tensors(
                world.device("pos-0001", folder / "device"),
                TensorSource(rows, "rows.json", 1),
                RATE,
                random.Random(1),
                teller,
                unless_payments_of=payments,
            )
        )
        await eventually(lambda: serving.done() or teller.done.done())
        if serving.done():
            return serving.result()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return None

    return asyncio.run(story()), printed


def test_each_answer_is_a_line_with_a_few_numbers(tmp_path: Path) -> None:
    _, printed = served(tmp_path, digits_model(), golden_inputs=PIXELS)
    assert printed[0].startswith("inputs of ")
    assert printed[0].endswith("made up, like those that the version is known to answer: 'pixels' float32[?, 1, 8, 8]")
    assert len(printed) == 4
    for line in printed[1:]:
        assert " us  " in line
        assert "label int64[2]: " in line
        assert "probabilities float32[2, 10]: " in line
        assert line.endswith(" ...")


def test_each_answer_is_an_event_with_its_outputs(tmp_path: Path) -> None:
    _, printed = served(tmp_path / "json", digits_model(), [ROW], golden_inputs=PIXELS)
    asked, *answers = [json.loads(line) for line in printed]
    assert (asked["event"], asked["made_up"]) == ("inputs", False)
    for told in answers:
        assert (told["event"], told["where"], told["device_id"], told["error"]) == (
            "inference",
            "device",
            "pos-0001",
            "",
        )
        assert np.allclose(np.sum(told["outputs"]["probabilities"], axis=1), 1.0, atol=1e-5)
        assert told["outputs"]["label"] == np.argmax(told["outputs"]["probabilities"], axis=1).tolist()
        assert told["latency_us"] > 0


def test_a_failure_is_a_line_too(tmp_path: Path) -> None:
    _, printed = served(tmp_path / "json", digits_model(rows_only=4), [ROW], count=1, golden_inputs=_rows(4))
    told = json.loads(printed[-1])
    assert (told["event"], told["outputs"], told["inference_id"]) == ("inference", {}, "")
    assert "Reshape" in told["error"]


def test_what_a_model_calls_its_outputs_does_not_steer_the_terminal(tmp_path: Path) -> None:
    name = "y\x1b[2J"
    file = model_bytes(
        [helper.make_node("Identity", ["x"], [name])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1])],
        {},
    )
    _, printed = served(tmp_path, file, [{"x": [[1]]}], golden_inputs={"x": np.ones((1, 1), np.float32)})
    assert printed[-1].endswith("  y?[2J float32[1, 1]: 1")


def test_rows_that_do_not_fit_end_it_with_the_input_named(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match=r"rows.json: input 'pixels': expected .* found shape \[1\]"):
        served(tmp_path, digits_model(), [{"pixels": [1]}], golden_inputs=PIXELS)


def test_a_first_version_of_payments_is_left_to_payments(tmp_path: Path) -> None:
    file = World(tmp_path).model(seed=1)
    assert served(tmp_path / "payments", file, payments=4) == (False, [])
    _, printed = served(tmp_path / "others", file, payments=26)
    assert "'features' float32[?, 4]" in printed[0], "payments of another width are tensors like others"


def _rows(count: int) -> dict[str, Any]:
    return {"pixels": np.zeros((count, 1, 8, 8), np.float32)}
