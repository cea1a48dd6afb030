"""The LoRaWAN link against tabulated air times, and its accounting."""

import numpy as np
import pytest

from device_sim.network import DATA_RATES, DataRate, frame_air_seconds, time_on_air_s, transfer
from model_delta.frames import Reassembly


@pytest.mark.parametrize(("name", "milliseconds"), [("DR5", 369), ("DR3", 677), ("DR2", 698), ("DR0", 2793)])
def test_air_time_of_a_full_frame_is_the_tabulated_one(name: str, milliseconds: int) -> None:
    rate = DATA_RATES[name]
    assert round(frame_air_seconds(rate, rate.payload_bytes_max) * 1000) == milliseconds


@pytest.mark.parametrize(("spreading_factor", "payload", "milliseconds"), [(7, 51, 102.656), (12, 13, 1155.072)])
def test_air_time_of_short_frames(spreading_factor: int, payload: int, milliseconds: float) -> None:
    assert time_on_air_s(spreading_factor, payload) * 1000 == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    ("name", "frames", "hours"), [("DR5", 23, 0.2), ("DR3", 44, 0.8), ("DR2", 99, 1.9), ("DR0", 99, 7.7)]
)
def test_five_kilobytes_at_one_percent_take_the_tabulated_hours(name: str, frames: int, hours: float) -> None:
    rate = DATA_RATES[name]
    assert -(-5_000 // rate.payload_bytes_max) == frames
    seconds = frames * frame_air_seconds(rate, rate.payload_bytes_max) / 0.01
    assert seconds / 3600 == pytest.approx(hours, abs=0.06)


def test_without_loss_exactly_the_needed_frames_are_sent() -> None:
    blob = np.random.default_rng(2).bytes(411)
    done = transfer(blob, DATA_RATES["DR0"], Reassembly().add, np.random.default_rng(0), loss=0.0)
    assert done.blob == blob
    assert (done.frames_needed, done.frames_sent, done.frames_lost) == (9, 9, 0)
    one = done.air_seconds / 9
    assert done.wall_seconds == pytest.approx(8 * one / 0.01 + one)


def test_a_third_of_the_frames_lost_costs_only_as_many_more() -> None:
    blob = np.random.default_rng(2).bytes(411)
    for seed in range(20):
        done = transfer(blob, DATA_RATES["DR0"], Reassembly().add, np.random.default_rng(seed), loss=0.33)
        assert done.blob == blob
        assert done.frames_sent == done.frames_needed + done.frames_lost


def test_the_duty_cycle_is_never_exceeded() -> None:
    done = transfer(bytes(400), DATA_RATES["DR2"], Reassembly().add, np.random.default_rng(1), loss=0.2)
    last = done.air_seconds / done.frames_sent
    assert done.air_seconds <= 0.01 * (done.wall_seconds - last) + last + 1e-9
    faster = transfer(
        bytes(400), DATA_RATES["DR2"], Reassembly().add, np.random.default_rng(1), loss=0.2, duty_cycle=0.1
    )
    assert faster.air_seconds == done.air_seconds
    assert faster.wall_seconds < 0.15 * done.wall_seconds


def test_a_dead_link_gives_up() -> None:
    done = transfer(bytes(400), DATA_RATES["DR0"], Reassembly().add, np.random.default_rng(1), loss=1.0, frames_max=30)
    assert done.blob is None
    assert (done.frames_sent, done.frames_lost) == (30, 30)


def test_one_seed_one_transfer() -> None:
    runs = [
        transfer(bytes(400), DATA_RATES["DR1"], Reassembly().add, np.random.default_rng(5), loss=0.4) for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_impossible_links_are_refused() -> None:
    with pytest.raises(ValueError, match="duty cycle"):
        transfer(b"x", DATA_RATES["DR0"], Reassembly().add, np.random.default_rng(0), duty_cycle=0.0)
    with pytest.raises(ValueError, match="at most 51 bytes"):
        frame_air_seconds(DataRate(12, 51), 52)
