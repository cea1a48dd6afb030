"""A user without the demo: start a platform, publish a model, run a device, stop, come back, lose processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from device_sim.payments_csv import COLUMNS
from tests.atoll.platform_process import (
    answer,
    atoll,
    free_run,
    http,
    lines,
    listens,
    platform,
    processes_of,
    until,
    write_gemm,
    write_mlp,
    write_rollout,
)

FINDABLE = shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
BROKERS = [
    "embedded",
    pytest.param("mosquitto", marks=pytest.mark.skipif(FINDABLE is None, reason="mosquitto is not installed")),
]


def decisions(printed: str) -> list[dict[str, object]]:
    return [line for line in lines(printed) if line["event"] == "decision"]


@pytest.mark.slow
@pytest.mark.parametrize("broker", BROKERS)
def test_publish_run_stop_and_come_back(tmp_path: Path, broker: str) -> None:
    data = tmp_path / "data"
    with platform(data, broker, port=free_run(4)) as first:
        version = answer(data, "publish", str(write_mlp(tmp_path / "m.onnx", 1)), "--name", "first")["manifest"]
        begun = answer(data, "rollout", "apply", str(write_rollout(tmp_path / "one.yaml", "one")))
        assert begun["target"] == version

        ran = atoll(data, "device", "run", "--count", "5", "--rate", "4", "--json")
        assert ran.returncode == 0, ran.stderr
        decided = decisions(ran.stdout)
        assert len(decided) == 5
        assert [line["version"] for line in decided[1:]] == [version] * 4

        region = first.endpoints["gateways"]["eu-west"]
        features = dict.fromkeys(_feature_names(), 0.5)
        status, body = http(f"{region}/predict", {"features": features}, first.token("tenant"))
        assert (status, json.loads(body).get("manifest")) == (200, version), body
        assert 0.0 <= json.loads(body)["score"] <= 1.0
        status, body = http(f"{region}/v2/models/fraud", None, first.token("tenant"))
        assert (status, json.loads(body)["inputs"][0]["name"]) == (200, "features"), body
        assert bool(first.endpoints["broker_metrics"]) == (broker == "embedded")
        for url in filter(None, (first.endpoints["coordinator"], region, first.endpoints["broker_metrics"])):
            status, body = http(f"{url}/metrics")
            assert status == 200
            assert b"# TYPE " in body

        _, body = http(f"{first.endpoints['coordinator']}/metrics")
        assert b'atoll_version_reports_total{verdict="planned"} 1.0' in body, "the device asked its director"

        twin = atoll(data, "up")
        assert twin.returncode == 2
        assert "another atoll is running on this data folder" in twin.stderr
        ports, certificate = first.ports, (data / "identities/pos-0001/certificate.pem").read_bytes()
        assert first.stop() == 0
        until(lambda: not processes_of(data), 5, "no process is left")
        assert not any(listens(port) for port in ports)

    with platform(data, broker) as second:
        assert second.ports == ports
        assert answer(data, "rollout", "status", "one")["target"] == version
        again = atoll(data, "device", "run", "--count", "2", "--rate", "5", "--json")
        assert [line["version"] for line in decisions(again.stdout)] == [version] * 2, again.stderr
        assert (data / "identities/pos-0001/certificate.pem").read_bytes() == certificate
        first_numbers = {str(line["decision_id"]) for line in decided}
        assert not first_numbers & {str(line["decision_id"]) for line in decisions(again.stdout)}
        _decide_own_payments(data, tmp_path)
        assert second.stop(signal.SIGINT) == 0
    until(lambda: not processes_of(data), 5, "no process is left")
    assert not any(listens(port) for port in ports)


@pytest.mark.slow
def test_any_process_may_die_while_a_device_decides(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with platform(data, "embedded", port=free_run(4)) as running:
        version = answer(data, "publish", str(write_gemm(tmp_path / "own.onnx")))["manifest"]
        answer(data, "rollout", "apply", str(write_rollout(tmp_path / "one.yaml", "one")))
        device = subprocess.Popen(
            [sys.executable, "-m", "atoll", "device", "run", "--data", str(data), "--rate", "10", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert device.stdout is not None
        seen = []
        while len([line for line in seen if line.get("version") == version and line["event"] == "decision"]) < 3:
            seen.append(json.loads(device.stdout.readline()))
        port_of = {"coordinator run": 1, "gateway run": 2, "broker run": 0}
        for words, place in port_of.items():
            before = running.pid_of(words)
            os.kill(before, signal.SIGKILL)
            until(
                lambda old=before, at=place: not Path(f"/proc/{old}").exists() and listens(running.ports[at]),
                20,
                f"{words} comes back",
            )
            assert running.pid_of(words) != before
        assert answer(data, "rollout", "status", "one")["target"] == version
        device.send_signal(signal.SIGINT)
        printed, complaints = device.communicate(timeout=15)
        assert device.returncode == 0, complaints
        assert "Traceback" not in complaints
        later = lines(printed)
        assert {line["version"] for line in later if line["event"] == "decision"} == {version}
        assert [line["connected"] for line in later if line["event"] == "connection"] in ([False, True], [False])
        status = json.loads(http(f"{running.endpoints['coordinator']}/v1/health")[1])
        assert status == {"status": "ok"}


def _decide_own_payments(data: Path, folder: Path) -> None:
    """A model of the user's own, made with the onnx package alone, on payments of the user's own."""
    own = answer(data, "publish", str(write_gemm(folder / "own.onnx", 30)), "--model", "fraud-csv")["manifest"]
    plan = write_rollout(folder / "own.yaml", "own")
    plan.write_text(plan.read_text().replace("model: fraud", "model: fraud-csv"))
    answer(data, "rollout", "apply", str(plan))
    rows = [f"{second},{','.join(['0.5'] * 28)},{second % 40}.5,{int(second % 7 == 0)}" for second in range(40)]
    payments = folder / "payments.csv"
    payments.write_text("\n".join([",".join(COLUMNS), *rows]))
    words = ("--id", "pi-0001", "--class", "pi", "--payments", str(payments), "--count", "6", "--rate", "5", "--json")
    ran = atoll(data, "device", "run", *words)
    assert ran.returncode == 0, ran.stderr
    assert [(line["version"], line["where"]) for line in decisions(ran.stdout)[-2:]] == [(own, "device")] * 2


def _feature_names() -> tuple[str, ...]:
    from device_sim.terminal_features import FEATURES

    return FEATURES
