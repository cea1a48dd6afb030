"""A LoRaWAN EU868 downlink in virtual time: how long a small file takes when frames are short, slow and get lost.

Air time is Semtech's formula (AN1200.13, section 4; SX1276 datasheet 4.1.1.7) at 125 kHz, coding rate 4/5, 8 preamble
symbols, explicit header, CRC on, low-data-rate optimisation at SF11 and SF12. Payload limits are those of the LoRaWAN
regional parameters RP002 for EU868 with a repeater. Each frame carries 13 bytes of LoRaWAN overhead. After a frame of
air time T a sender at duty cycle d stays silent for T / d - T (ETSI EN 300 220).

Lost frames are repaired by parity (model_delta.frames), not by repetition: any `needed` frames complete the file. The
simulated sender sends frame 0, 1, 2, ... and stops when the receiver acknowledges the whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from model_delta.frames import FRAMES_MAX, Fragments

OVERHEAD_BYTES = 13
DUTY_CYCLE = 0.01


@dataclass(frozen=True)
class DataRate:
    """Spreading factor and the largest application payload in bytes."""

    spreading_factor: int
    payload_bytes_max: int


DATA_RATES: Mapping[str, DataRate] = {
    "DR0": DataRate(12, 51),
    "DR1": DataRate(11, 51),
    "DR2": DataRate(10, 51),
    "DR3": DataRate(9, 115),
    "DR4": DataRate(8, 222),
    "DR5": DataRate(7, 222),
}


@dataclass(frozen=True)
class Transfer:
    """How one file went over the air. `wall_seconds` is from the first frame's start to the end of the last one,
    waiting under the duty cycle included; `blob` is what the receiver got (None: it gave up)."""

    frames_needed: int
    frames_sent: int
    frames_lost: int
    air_seconds: float
    wall_seconds: float
    blob: bytes | None


def time_on_air_s(
    spreading_factor: int, payload_bytes: int, bandwidth_hz: int = 125_000, coding_rate: int = 1
) -> float:
    """Seconds on air of a LoRa frame with `payload_bytes` of physical payload; coding rate 4/(4 + coding_rate)."""
    symbol = float(1 << spreading_factor) / bandwidth_hz
    optimised = 2 if symbol > 0.016 else 0
    bits = 8 * payload_bytes - 4 * spreading_factor + 28 + 16
    symbols = 8 + max(ceil(bits / (4 * (spreading_factor - optimised))) * (coding_rate + 4), 0)
    return (8 + 4.25 + symbols) * symbol


def frame_air_seconds(rate: DataRate, application_bytes: int) -> float:
    """Seconds on air of a LoRaWAN frame. Raises ValueError for more than the data rate carries."""
    if application_bytes > rate.payload_bytes_max:
        raise ValueError(
            f"SF{rate.spreading_factor}: expected at most {rate.payload_bytes_max} bytes, found {application_bytes}"
        )
    return time_on_air_s(rate.spreading_factor, application_bytes + OVERHEAD_BYTES)


def transfer(
    blob: bytes,
    rate: DataRate,
    receive: Callable[[bytes], bytes | None],
    rng: np.random.Generator,
    *,
    loss: float = 0.1,
    duty_cycle: float = DUTY_CYCLE,
    frames_max: int = FRAMES_MAX,
) -> Transfer:
    """Send `blob` frame by frame, each lost with probability `loss`, until `receive` returns the file.

    `receive` is the device's end, usually `Reassembly().add`. Raises ValueError for an impossible loss or duty cycle,
    or a file too large for frames of this size.
    """
    if not 0.0 <= loss <= 1.0 or not 0.0 < duty_cycle <= 1.0:
        raise ValueError(f"LoRaWAN: loss must lie in [0, 1] and duty cycle in (0, 1], found {loss} and {duty_cycle}")
    fragments = Fragments(blob, rate.payload_bytes_max)
    sent = lost = 0
    air = now = ended = 0.0
    received = None
    while received is None and sent < min(frames_max, FRAMES_MAX):
        frame = fragments.frame(sent)
        seconds = frame_air_seconds(rate, len(frame))
        sent += 1
        air += seconds
        ended = now + seconds
        now += seconds / duty_cycle
        if rng.random() < loss:
            lost += 1
        else:
            received = receive(frame)
    return Transfer(fragments.needed, sent, lost, air, ended, received)
