"""What the demo makes of deaths in the middle of an act, and of a machine that measures what it likes."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from atoll.control_client import ControlClient
from atoll.demo import hand_over
from atoll.demo_absence import AbsentDevice
from atoll.demo_acts import _fleet_program, scenario_of
from atoll.demo_regions import increase
from atoll.demo_stage import ActFailed, Deaths, Stage
from atoll.processes import ProcessEvent
from atoll.report import ActResult
from atoll.settings import DataFolder, Endpoints
from device_sim.scenario import Scenario
from device_sim.terminal_features import FEATURES
from model_delta.errors import Malformed
from tests.fakes.report_figures import sample_report


def test_calm_begins_when_the_last_missing_process_is_back() -> None:
    now = [100.0]
    deaths = Deaths(clock=lambda: now[0])
    now[0] = 130.0
    assert deaths.calm_s() == 30.0
    deaths.hear(ProcessEvent("died", "fleet-0", 1, -9, "signal SIGKILL"))
    now[0] = 135.0
    assert deaths.calm_s() == 0.0
    deaths.hear(ProcessEvent("restarted", "fleet-0", 2))
    assert deaths.calm_s() == 0.0
    deaths.hear(ProcessEvent("ready", "fleet-0", 2))
    now[0] = 141.0
    assert deaths.calm_s() == 6.0


def test_deaths_are_named_until_they_are_long_ago() -> None:
    now = [0.0]
    deaths = Deaths(clock=lambda: now[0])
    assert deaths.told() == ""
    deaths.hear(ProcessEvent("died", "broker", 1, -9, "signal SIGKILL"))
    now[0] = 12.0
    assert deaths.told() == "broker died 12 s before: signal SIGKILL"
    now[0] = 91.0
    assert deaths.told() == ""


def _counts(started: float, requests: float, lost: float = 0, failovers: float = 0, cut: float = 0) -> dict[str, float]:
    return {
        "process_start_time_seconds": started,
        "atoll_region_requests": requests,
        "atoll_region_requests_lost": lost,
        "atoll_region_requests_cut_short": cut,
        "atoll_region_failovers": failovers,
    }


def _grown(requests: int, lost: int = 0, failovers: int = 0, cut: int = 0) -> dict[str, int]:
    return {"requests": requests, "requests_lost": lost, "requests_cut_short": cut, "failovers": failovers}


def test_the_report_is_printed_as_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hand_over(sample_report(), tmp_path, as_json=True) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed) == json.loads((tmp_path / "report.json").read_text())
    assert list(json.loads(printed))[:3] == ["seed", "commit", "machine"]
    assert said == ""
    acts = (*sample_report().acts[:-1], ActResult("long_absence", False, 1.0, {}, "the device did not come back"))
    assert hand_over(sample_report(acts=acts), tmp_path, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["acts"][-1]["ok"] is False


def test_the_seed_is_the_worlds_and_each_fleets(tmp_path: Path) -> None:
    def stage(seed: int) -> Stage:
        data = DataFolder.open(tmp_path / str(seed), create=True)
        endpoints = SimpleNamespace(gateways={"eu-west": "", "ap-south": ""})
        made = Stage(
            data=data,
            endpoints=cast(Endpoints, endpoints),
            client=cast(ControlClient, None),
            devices=20,
            rounds=1,
            seed=seed,
            shards=2,
            metrics_ports=(1, 2),
            tell=lambda text: None,
        )
        made.absent = cast(AbsentDevice, SimpleNamespace(device_id="pos-0009"))
        return made

    for seed in (3, 4):
        assert scenario_of(stage(seed)) == Scenario(seed=seed, devices=20, hostile_share=0.1)
        argv = _fleet_program(stage(seed), 1).argv
        assert argv[argv.index("--seed") + 1] == str(seed)
        assert (argv[argv.index("--devices") + 1], argv[argv.index("--hostile") + 1]) == ("20", "0.1")


def test_requests_are_summed_over_processes() -> None:
    before = [_counts(1, 100), _counts(2, 50, 1)]
    after = [_counts(1, 110, 0, 2), _counts(2, 55, 1, 1)]
    assert increase(before, after) == (_grown(15, failovers=3), 0)


def test_a_process_that_was_started_anew_goes_on_counting_and_is_told() -> None:
    before = [_counts(1, 100, 3), _counts(2, 50)]
    after = [_counts(9, 107, 4, cut=1), _counts(2, 55)]
    assert increase(before, after) == (_grown(12, lost=1, cut=1), 1)


def test_counts_that_were_lost_are_no_figure() -> None:
    with pytest.raises(ActFailed, match="requests of fleet-1 are not known"):
        increase([_counts(1, 100), _counts(2, 50)], [_counts(1, 110), _counts(9, 7)])


def test_the_factory_version_is_the_file_that_the_device_has_whatever_the_coordinator_measures(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    history = rng.normal(size=(200, len(FEATURES))).astype(np.float32), rng.random(200) < 0.3
    world = SimpleNamespace(live=lambda index: iter(()), history=lambda: history)
    asked: dict[str, str] = {}

    class Coordinator:
        def post(self, path: str, body: bytes, **options: str) -> None:
            asked.update(options, path=path)
            raise Malformed("that is all for now")

    device: Any = SimpleNamespace(index=0, device_id="pos-0")
    data = DataFolder.open(tmp_path / "data", create=True)
    absent = AbsentDevice(data, cast(Endpoints, None), cast(Any, world), device)
    with pytest.raises(Malformed, match="that is all"):
        asyncio.run(absent.leave(cast(Any, Coordinator())))
    assert (asked["path"], asked["quantize"]) == ("/v1/models", "int8")
