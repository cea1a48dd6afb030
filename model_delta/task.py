"""What a device is asked to train: the announcement of one federated round.

It is signed like a plan (`Envelope` of type `round`) and published retained, so that a device that was away hears of an
open round when it returns. Weights do not travel with it: the task names the base version by digest, and a device that
runs another version fetches the base as it would fetch an update, by a patch as a rule. The training step travels as
data (an ONNX graph named by digest), never as code.
"""

from __future__ import annotations

import enum

import msgspec

from model_delta.digest import digest_of
from model_delta.encoding import pack

TASK_TYPE = "round"


class AggregatorKey(msgspec.Struct, frozen=True):
    """An aggregator's public keys: X25519 raw bytes to seal to, SubjectPublicKeyInfo to verify its signatures."""

    name: str
    sealing: bytes
    verifying: bytes


class Parameter(msgspec.Struct, frozen=True):
    """One trainable tensor, in the order of the flat vector. It is read from the base file's stored tensors: `tensor`
    as float32, or int8 times the float32 tensor `scale` (one per last-axis channel) when `scale` is set."""

    tensor: str
    shape: tuple[int, ...]
    scale: str = ""


class SatOut(enum.StrEnum):
    """Why a device takes no part in a round, as it tells the coordinator; nothing else is told with it. New reasons may
    join these; a reader takes one that it does not know for `OTHER`."""

    NO_TRAINING = "does not train"
    NO_VERSION = "no version may answer"
    TERMS = "terms refused"
    UNREACHABLE = "base or training graph not reachable"
    GRAPH = "training graph refused"
    BASE = "base refused"
    NO_DATA = "no data"
    TRAINING = "training failed"
    DIVERGED = "training diverged"
    CONTRIBUTION = "contribution not made"
    TOO_LARGE = "contribution too large"
    NO_ROOM = "disk full"
    FORGOTTEN = "own record lost"
    OTHER = "another reason"


PASSING = frozenset({SatOut.NO_VERSION, SatOut.UNREACHABLE, SatOut.NO_ROOM})
"""Reasons that may pass before the round closes; a round waits for such a device as for any other."""


class RoundTask(msgspec.Struct, frozen=True, kw_only=True):
    """Round `round_id` on the base version `base`.

    `training_graph` is the digest of an ONNX file with inputs `parameters` float32[d], `features` float32[n, f],
    `labels` float32[n], `learning_rate` float32[] and outputs `updated` float32[d], `loss` float32[] (before the step).
    With `momentum` above 0 it has the inputs `velocity` float32[d], `momentum` float32[] and the output
    `updated_velocity` float32[d] as well: v' = momentum v + gradient, w' = w - learning_rate v'. A device keeps its
    velocity from one round of the model to the next; the first begins with zeros. A device that does not know
    `momentum` cannot run that graph, and sits the round out.
    A device runs `steps` mini-batches of `batch_size`, clips the difference to `clip_norm_l2`, encodes it with
    `fraction_bits` and shares it in Z_2^32. At most `contributions_max` are taken (0: the most that a round may take);
    `policy` says which verdicts choose among them, `reveal` what the aggregators open for it (`distances`, `graph`,
    `selection`), `eps_l2` the distance up to which two updates are close in a graph (0: found on shares). The opened
    sum carries noise of `noise_multiplier` times the clip norm times the largest weight (0: none), within a budget of
    `epsilon` for the model's releases and `epsilon_device` for each device, both at `delta`. A policy that
    remembers begins with `memory`, which round `memory_round` left: the digest of a packed `RoundMemory`, "" for none.
    `deadline` and `issued` are Unix seconds.
    """

    format: int = 1
    tenant: str
    model: str
    round_id: str
    base: str
    training_graph: str
    parameters: tuple[Parameter, ...]
    length: int
    steps: int = 40
    batch_size: int = 64
    learning_rate: float = 0.05
    clip_norm_l2: float = 4.0
    fraction_bits: int = 16
    hostile_max: int = 0
    selected_min: int = 8
    aggregators: tuple[AggregatorKey, ...] = ()
    issued: int
    deadline: int
    open: bool = True
    contributions_max: int = 0
    policy: str = "krum"
    reveal: str = "distances"
    noise_multiplier: float = 0.0
    epsilon: float = 0.0
    epsilon_device: float = 0.0
    delta: float = 0.0
    memory: str = ""
    memory_round: str = ""
    momentum: float = 0.0
    eps_l2: float = 0.0


def terms_of(task: RoundTask) -> str:
    """Digest of what a device agrees to when it takes part: how many are the least to hide among, who chooses by what,
    what is opened, with how much noise, until when. Devices sign it, and aggregators hold the round to it.

    The same in every version of the program, since it names each value instead of packing the record.
    """
    values: list[object] = [
        *(task.tenant, task.model, task.round_id, task.base, task.deadline),
        *(task.clip_norm_l2, task.hostile_max, task.selected_min, task.contributions_max),
        *(task.policy, task.reveal, task.eps_l2, task.memory, task.memory_round),
        *(task.noise_multiplier, task.epsilon, task.epsilon_device, task.delta),
        [[key.name, key.sealing, key.verifying] for key in task.aggregators],
    ]
    return digest_of(pack(["atoll terms", *values]))
