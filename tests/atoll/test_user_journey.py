"""A user without the demo: start a platform, publish a model, run a device, stop, come back, lose processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atoll.control_client import ControlClient
from atoll.process_tree import process_table
from device_sim.payments_csv import COLUMNS
from edge_runtime.onnx_model import run_graph
from edge_runtime.participation import RoundRecord
from model_delta.encoding import unpack
from tests.atoll.platform_process import (
    Platform,
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
from tests.fakes import kafka_server
from tests.fakes.any_signature import PIXELS, digits_model, tokens_model

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
        until(lambda: not processes_of(data), 60, "no process is left")
        assert not any(listens(port) for port in ports)

    with platform(data, broker) as second:
        assert second.ports == ports
        assert answer(data, "rollout", "status", "one")["target"] == version
        again = atoll(data, "device", "run", "--count", "2", "--rate", "5", "--json")
        assert [line["version"] for line in decisions(again.stdout)] == [version] * 2, again.stderr
        assert (data / "identities/pos-0001/certificate.pem").read_bytes() == certificate
        first_numbers = {str(line["decision_id"]) for line in decided}
        assert not first_numbers & {str(line["decision_id"]) for line in decisions(again.stdout)}
        own, payments = _decide_own_payments(data, tmp_path)
        if broker == "embedded":
            _deal_own_payments(data, payments, own)
            _answer_tensors(second, tmp_path)
        assert second.stop(signal.SIGINT) == 0
    until(lambda: not processes_of(data), 60, "no process is left")
    assert not any(listens(port) for port in ports)


@pytest.fixture
def updates_log(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Options of `atoll up` for contributions in a real Kafka, behind TLS and a password, where there is one."""
    if not kafka_server.found():
        return []
    broker = request.getfixturevalue("kafka")
    url = f"kafka://{broker.login_address}/updates-{uuid.uuid4().hex}"
    login = broker.login_file(tmp_path / "kafka.properties", kafka_server.COORDINATOR)
    return ["--updates-log", url, "--updates-login", str(login)]


@contextmanager
def fleets(data: Path, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Five devices in two processes: three and two. They may be stopped when the block ends."""
    words = (sys.executable, "-m", "atoll", "fleet", "run", "--devices", "5", "--data", str(data))
    with (folder / "fleets.log").open("wb") as log:
        shards = [subprocess.Popen([*words, "--shard", f"{n}/2"], stdout=log, stderr=log) for n in range(2)]
        try:
            yield shards
        finally:
            for one in shards:
                one.kill()
                one.wait()


@pytest.mark.slow(seconds=30)
@pytest.mark.timeout(600)  # 30 s on two cores
def test_any_process_may_die_while_a_device_decides_and_while_a_fleet_learns(
    tmp_path: Path, updates_log: list[str]
) -> None:
    data = tmp_path / "data"
    options = ["--learning", *updates_log]
    with platform(data, "embedded", port=free_run(16), more=options) as running, fleets(data, tmp_path) as shards:
        version = answer(data, "publish", str(write_mlp(tmp_path / "own.onnx", 1)))["manifest"]
        answer(data, "rollout", "apply", str(write_rollout(tmp_path / "one.yaml", "one")))
        device = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "atoll",
                "device",
                "run",
                "--data",
                str(data),
                "--id",
                "pos-0009",
                "--rate",
                "10",
                "--json",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert device.stdout is not None
        seen: list[dict[str, object]] = []
        by_itself = (version, "device")
        # Its region answers by the same version before the device has it: then a dead gateway leaves the built-in rule.
        while [(line["version"], line["where"]) for line in seen if line["event"] == "decision"].count(by_itself) < 3:
            seen.append(json.loads(device.stdout.readline()))
        port_of = {"coordinator run": 1, "gateway run": 2, "broker run": 0}
        for words, place in port_of.items():
            before = running.pid_of(words)
            os.kill(before, signal.SIGKILL)
            _until_it_is_back(data, words, before, running.ports[place])
            assert running.pid_of(words) != before
        assert answer(data, "rollout", "status", "one")["target"] == version
        device.send_signal(signal.SIGINT)
        printed, complaints = device.communicate(timeout=60)
        assert device.returncode == 0, complaints
        assert "Traceback" not in complaints
        later = lines(printed)
        telling = [line for line in (*seen, *later) if line["event"] != "decision" or line["version"] != version]
        assert {line["version"] for line in later if line["event"] == "decision"} == {version}, (telling, complaints)
        assert [line["connected"] for line in later if line["event"] == "connection"] in ([False, True], [False])
        status = json.loads(http(f"{running.endpoints['coordinator']}/v1/health")[1])
        assert status == {"status": "ok"}
        _learn_while_an_aggregator_dies(running, shards, tmp_path, on_kafka=bool(updates_log))
        _leave_out_whom_a_round_took_before(data, tmp_path)


ROUND = """
apiVersion: atoll/v1
kind: Round
metadata: {name: one}
spec: {model: fraud, quorum: 5, contributions_max: 5, deadline: 240s, f: 0, m_min: 3, training: {steps: 5}}
"""


def _learn_while_an_aggregator_dies(
    running: Platform, shards: list[subprocess.Popen[bytes]], folder: Path, *, on_kafka: bool
) -> None:
    """One round to its end. An aggregator dies when it has read the first three contributions; when it is back, it has
    them still, reads the other two and no more, from the log by itself."""
    data, url = running.data, running.endpoints["aggregators"]["a1"]
    until(lambda: answer(data, "rollout", "status", "one")["state"] == "completed", 60, "the first version is out")
    (folder / "round.yaml").write_text(ROUND)
    shards[1].send_signal(signal.SIGSTOP)
    round_id = answer(data, "round", "run", "--file", str(folder / "round.yaml"), "--no-wait")["round_id"]
    until(lambda: _read_of_the_log(url).get("kept") == 3, 150, "three contributions are read")
    before, reached = running.pid_of("aggregator run --name a1"), _read_of_the_log(url)["offset"]
    assert reached == 3 or not on_kafka
    os.kill(before, signal.SIGKILL)
    port = int(url.rsplit(":", 1)[1])
    _until_it_is_back(data, "aggregator run --name a1", before, port)
    until(lambda: _read_of_the_log(url).get("offset") == reached, 60, "it goes on where it was")
    shards[1].send_signal(signal.SIGCONT)
    told = answer(data, "round", "status", round_id)
    end = time.monotonic() + 150
    while told["state"] not in ("PUBLISHED", "FAILED") and time.monotonic() < end:
        told = answer(data, "round", "status", round_id)
    assert (told["state"], told["reason"]) == ("PUBLISHED", "")
    assert len(told["admitted"]) == 5
    read = _read_of_the_log(url)
    assert (read["kept"], read["refused"], read["gaps"]) == (2, 0, 0)
    assert read["offset"] == 5 or not on_kafka
    assert told["figures"]["relays"]["eu-west"]["contributions"] == 5
    until(lambda: _announcements(running, "fetched") == 1, 60, "the relay has asked for the end")


def _leave_out_whom_a_round_took_before(data: Path, folder: Path) -> None:
    """A device over its quota is told before it trains: this training would take many minutes."""
    endless = "quota: {per_device: 1}, training: {steps: 100000, batch_size: 100000}"
    (folder / "again.yaml").write_text(ROUND.replace("training: {steps: 5}", endless).replace("one", "again"))
    round_id = answer(data, "round", "run", "--file", str(folder / "again.yaml"), "--no-wait")["round_id"]
    records = list((data / "devices").glob("*/round.record"))
    until(lambda: [unpack(one.read_bytes(), RoundRecord).round_id for one in records] == [round_id] * 5, 60, "all know")
    for one in records:
        record = unpack(one.read_bytes(), RoundRecord)
        assert (record.ended[:29], record.contribution) == ("refused: over quota: 1 rounds", b"")
    answer(data, "round", "abort", round_id)
    told = answer(data, "round", "status", round_id)
    assert (told["sat_out"], told["refused"], told["admitted"]) == ({"over quota": 5}, {}, [])


def _until_it_is_back(data: Path, words: str, before: int, port: int) -> None:
    """A killed process is gone and another one listens: the dying may listen on when its command line is gone."""
    until(
        lambda: (
            before not in process_table()
            and any(words in line for pid, line in processes_of(data) if pid != before)
            and listens(port)
        ),
        60,
        f"{words} comes back",
    )


def _announcements(running: Platform, result: str) -> float:
    """How many announcements came to the region's relay with this result."""
    text = http(f"{running.endpoints['gateways']['eu-west']}/metrics")[1].decode()
    found = re.search(rf'atoll_relay_announcements_total{{result="{result}"}} (\S+)', text)
    return float(found[1]) if found else 0.0


def _read_of_the_log(url: str) -> dict[str, float]:
    """What an aggregator says of its reading since its start, by the name of the metric or the result it counts."""
    text = http(f"{url}/metrics")[1].decode()
    found = re.findall(r'aggregator_log_(?:records\{result="(.*)"\}|(offset)) (\d\S*)', text)
    return {result or name: float(count) for result, name, count in found}


def _decide_own_payments(data: Path, folder: Path) -> tuple[str, Path]:
    """A model of the user's own, made with the onnx package alone, on payments of the user's own: both of them."""
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
    decided = decisions(ran.stdout)
    assert [line["version"] for line in decided[-2:]] == [own] * 2, "by itself, or by its region where it is unsure"
    assert "device" in {line["where"] for line in decided}
    return own, payments


def _deal_own_payments(data: Path, payments: Path, version: str) -> None:
    """A fleet over the same file: its devices follow the model of such payments, and ask their region for that one."""
    words = ("fleet", "run", "--payments", str(payments), "--devices", "2", "--rate", "20", "--data", str(data))
    fleet = subprocess.Popen([sys.executable, "-m", "atoll", *words], stdout=subprocess.DEVNULL)
    asked = re.compile(rb'atoll_gateway_decisions_total\{.*version="core:1@' + version[:12].encode())
    try:
        until(lambda: answer(data, "rollout", "status", "own")["adopted"] >= 2, 60, "the fleet runs the version")
        until(lambda: asked.search(_gateway_metrics(data)), 60, "close scores are put to the region")
    finally:
        fleet.terminate()
        assert fleet.wait(60) == 0


def _gateway_metrics(data: Path) -> bytes:
    endpoints = json.loads((data / "endpoints.json").read_text())
    return http(f"{endpoints['gateways']['eu-west']}/metrics")[1]


def _answer_tensors(running: Platform, folder: Path) -> None:
    """Models that know nothing of payments: adopted and held by their inferences; a version that fails goes back."""
    control = ControlClient(running.endpoints["coordinator"], running.token("admin"))
    plan = write_rollout(folder / "any.yaml", "NAME").read_text().replace("model: fraud", "model: MODEL")
    plan = "\n".join(line for line in plan.splitlines() if "false_positive_rate" not in line)
    plan = plan.replace("minSeconds: 3", "minSeconds: 1").replace("match: {}", "match: {deviceId: [pi-0021, pi-0022]}")

    def roll_out(model: str, name: str, source: bytes) -> str:
        found = control.post("/v1/models", source, model=model, quantize="none")
        control.post("/v1/rollouts", plan.replace("NAME", name).replace("MODEL", model))
        return str(found["manifest"])

    first, tokens = roll_out("digits", "d1", digits_model(1)), roll_out("tokens", "t1", tokens_model())
    one = folder / "one.json"
    one.write_text(json.dumps({"pixels": PIXELS["pixels"][:1].tolist()}))
    words = [sys.executable, "-m", "atoll", "device", "run", "--data", str(running.data), "--json", "--rate", "100"]
    ways = (["--id", "pi-0021", "--model", "digits", "--inputs", str(one)], ["--id", "pi-0022", "--model", "tokens"])
    papers, devices = [folder / f"{more[1]}.lines" for more in ways], []
    for path, more in zip(papers, ways, strict=True):
        with path.open("w") as paper:  # a pipe that nobody reads would hold them up
            devices.append(subprocess.Popen([*words, *more], stdout=paper))
    try:
        for name in ("d1", "t1"):
            until(lambda: control.get(f"/v1/rollouts/{name}")["state"] == "completed", 60, f"{name} is out")  # noqa: B023
        bad = roll_out("digits", "d2", digits_model(2, rows_only=4))  # as many as its golden case has
        until(lambda: control.get("/v1/rollouts/d2")["state"] == "stopped", 60, "the bad version is withdrawn")
        assert "rolled_back: 1 devices" in control.get("/v1/rollouts/d2")["history"][-1]["reason"]
    finally:
        for device in devices:
            device.send_signal(signal.SIGINT)
        assert [device.wait(timeout=60) for device in devices] == [0, 0]
    told = [lines(path.read_text()) for path in papers]
    digits, words_of = ([line for line in seen if line["event"] == "inference"] for seen in told)
    expected = run_graph(digits_model(1), {"pixels": PIXELS["pixels"][:1]})
    for line in (digits[0], digits[-1]):
        assert (line["version"], line["where"], line["error"]) == (first, "device", "")
        assert line["outputs"]["label"] == expected["label"].tolist()
    assert {line["version"] for line in digits if line["error"]} == {bad}
    outcomes = [(line["outcome"], line["version"]) for line in told[0] if line["event"] == "outcome"]
    assert outcomes == [("adopted", first), ("rolled_back", bad)]
    assert {(line["version"], len(line["outputs"]["pooled"][0])) for line in words_of} == {(tokens, 6)}
    assert [line["made_up"] for line in told[1] if line["event"] == "inputs"] == [True]


def _feature_names() -> tuple[str, ...]:
    from device_sim.terminal_features import FEATURES

    return FEATURES
