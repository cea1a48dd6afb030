import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.control import control_app
from fl_coordinator.routes.access import STATUS
from model_delta.digest import digest_of
from model_delta.encoding import unpack, unpack_plain
from model_delta.errors import AtollError, Malformed, NotFound, StorageFull, Unavailable, Untrusted
from model_delta.keys.certificates import make_request, serial_of
from model_delta.trust.updater import TrustAnchors
from tests.fl_coordinator.control_calls import TOKENS, calling
from tests.fl_coordinator.platform_in_memory import CANARY, FIRST, Platform, fraud_model, on_a_loop, until


@on_a_loop
async def test_a_version_is_published_looked_at_and_rolled_out_over_http(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    device = platform.device("pos-0001")
    async with calling(platform) as call:
        answer = await call("POST", "/v1/models?model=fraud&name=v1&threshold=0.4", content=fraud_model(1))
        published = answer.json()
        assert (answer.status_code, published["version"], published["release"]) == (200, "eu-west:1", 1)
        again = await call("POST", "/v1/models?model=fraud&name=v1", content=fraud_model(1))
        assert again.json() == published
        seen = (await call("GET", f"/v1/releases/{published['manifest']}", "gateway")).json()
        assert seen["decision_threshold"] == 0.4
        envelope = await call("GET", f"/v1/store/manifest/{published['manifest']}", "gateway")
        assert envelope.content == platform.store.get("manifest", published["manifest"])
        begun = await call("POST", "/v1/rollouts", content=FIRST)
        assert begun.json()["state"] == "running"
        await until(lambda: device.running == published["manifest"])
        await device.report(5)
        await until(lambda: platform.ledger.stable("fraud") == published["manifest"])
        state: dict[str, Any] = {"decisions": 0}
        async with asyncio.timeout(30):
            while state["decisions"] < 5:  # a snapshot is kept for a quarter of a second
                await asyncio.sleep(0.02)
                state = (await call("GET", "/v1/state", None)).json()
        assert state["decisions"] == 5
        assert state["devices"][0]["running"] == published["manifest"]
        shown = (await call("GET", "/v1/rollouts/first")).json()
        assert shown["history"][0]["event"] == "begun"
        assert [one["name"] for one in (await call("GET", "/v1/rollouts")).json()] == ["first"]


@on_a_loop
async def test_each_role_may_call_its_own_and_nothing_else(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    allowed = {
        ("POST", "/v1/models?model=fraud"): {"admin"},
        ("POST", "/v1/rollouts"): {"admin"},
        ("GET", "/v1/releases"): {"admin", "gateway"},
        ("GET", "/v1/rounds/r/announcement"): {"admin", "aggregator"},
        ("GET", "/v1/rounds/r/contributions/" + "0" * 64): {"admin", "aggregator"},
        ("GET", "/v1/rounds/r/attempt?aggregator=a0"): {"admin", "aggregator"},
        ("GET", "/v1/log?from=0"): {"admin", "aggregator"},
        ("POST", "/v1/relays/eu-west/ends"): {"admin", "gateway"},
        ("GET", "/v1/store/blob/" + "0" * 64): {"admin", "gateway"},
        ("POST", "/v1/enroll"): {"admin", "gateway", "join"},
        ("POST", "/v1/aggregators"): {"admin", "aggregator"},
        ("GET", "/v1/flower/commands?wait=0"): {"admin", "flower"},
        ("POST", "/v1/flower/replies"): {"admin", "flower"},
        ("POST", "/v1/notes"): {"admin"},
        ("POST", "/v1/identities/pos-0001/revoke"): {"admin"},
        ("POST", "/v1/rounds"): {"admin"},
        ("GET", "/v1/keys"): {"admin"},
        ("POST", "/v1/keys/rotate"): {"admin"},
        ("POST", "/v1/releases/" + "0" * 64 + "/shred"): {"admin"},
    }
    async with calling(platform) as call:
        for (method, path), roles in allowed.items():
            for role in TOKENS:
                status = (await call(method, path, role, content=b"")).status_code
                assert (status == 403) == (role not in roles), (method, path, role, status)
            for nobody in (None, "wrong", "", "é"):
                assert (await call(method, path, nobody)).status_code == 401, (method, path)


@on_a_loop
async def test_a_revoked_device_gets_no_key_counts_no_more_and_cannot_come_back_by_itself(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    lost, kept = platform.device("pos-0001"), platform.device("pos-0002")
    async with calling(platform) as call:
        version = await platform.coordinator.publish(fraud_model(1), model="fraud", name="v1")
        assert (await call("POST", "/v1/identities/pos-0001/revoke")).status_code == 200
        assert (await call("POST", "/v1/identities/pos-0009/revoke")).status_code == 404
        serials = (await call("GET", "/v1/revoked", "aggregator")).json()["serials"]
        assert serials == [str(serial_of(lost.certificate))]
        await lost.ask_key(version.manifest)
        await until(lambda: bool(lost.answers))
        assert "revoked" in lost.answers[0].error
        await lost.hello()
        await lost.report(50)
        await kept.report(5)
        await until(lambda: platform.coordinator.snapshot().decisions == 5)
        assert platform.ledger.device("pos-0001").last_seen == 0.0
        with pytest.raises(Untrusted, match="was revoked"):
            lost.enrol()
        lost.enrol(replace=True)
        assert str(serial_of(lost.certificate)) not in serials


@on_a_loop
async def test_no_web_page_and_no_proxy_borrows_the_loopback(tmp_path: Path) -> None:
    async with calling(Platform(tmp_path)) as call:
        for host in (b"localhost:8080", b"127.0.0.1:8080", b"[::1]:8080"):
            assert (await call("GET", "/v1/state", None, headers={b"Host": host})).status_code == 200, host
        for headers in (
            {b"Host": b"rebound.example:8080"},  # a page whose name was made to point at this machine
            {b"Host": b"127.0.0.1.rebound.example"},
            {b"Host": b""},
            {b"X-Forwarded-For": b"127.0.0.1"},
            {b"Forwarded": b"for=127.0.0.1"},
        ):
            for path in ("/v1/state", "/v1/events", "/metrics", "/v1/health"):
                assert (await call("GET", path, None, headers=headers)).status_code == 401, (headers, path)
            assert (await call("GET", "/v1/state", headers=headers)).status_code == 200, "a token is enough anywhere"


@on_a_loop
async def test_an_aggregator_cannot_register_keys_in_the_name_of_another(tmp_path: Path) -> None:
    def keys(name: str, letter: bytes) -> dict[str, str]:
        key = base64.b64encode(letter * 32).decode()
        return {"name": name, "sealing": key, "verifying": key, "url": f"http://{name}"}

    async with calling(Platform(tmp_path)) as call:
        for name in ("a0", "a1", "a2"):
            assert (await call("POST", "/v1/aggregators", "aggregator", json=keys(name, b"h"))).status_code == 200
        assert (await call("POST", "/v1/aggregators", "aggregator", json=keys("a1", b"h"))).status_code == 200, (
            "restart"
        )
        taken = await call("POST", "/v1/aggregators", "aggregator", json=keys("a1", b"x"))
        assert (taken.status_code, "other keys" in taken.text) == (403, True)
        fourth = await call("POST", "/v1/aggregators", "aggregator", json=keys("a", b"x"))  # would sort before a0
        assert fourth.status_code == 403
        known = {one["name"]: one["sealing"] for one in (await call("GET", "/v1/aggregators", "aggregator")).json()}
        assert known == {name: keys(name, b"h")["sealing"] for name in ("a0", "a1", "a2")}
        assert (await call("POST", "/v1/aggregators", "admin", json=keys("a1", b"x"))).status_code == 200


@on_a_loop
async def test_the_page_needs_no_token_on_loopback_and_one_from_elsewhere(tmp_path: Path) -> None:
    async with calling(Platform(tmp_path / "near")) as call:
        assert (await call("GET", "/v1/health", None)).json() == {"status": "ok"}
        metrics = await call("GET", "/metrics", None)
        assert b"atoll_devices" in metrics.content
        assert "atoll_records_missing 0.0" in metrics.text
    async with calling(Platform(tmp_path / "far"), client="192.0.2.7") as call:
        for path in ("/v1/health", "/v1/state", "/v1/events", "/metrics"):
            assert (await call("GET", path, None)).status_code == 401
        assert (await call("GET", "/v1/health", "admin")).status_code == 200


@on_a_loop
async def test_enrolment_over_http_and_what_a_join_token_cannot_do(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())

    def body(**changes: Any) -> dict[str, Any]:
        name = changes.get("common_name", "pi-0001")
        wanted = {
            "csr_pem": make_request(key, "pi-0001").decode(),
            "sealing_public": base64.b64encode(bytes(range(32))).decode(),
            "kind": "device",
            "common_name": name,
            "traits": {"device_class": "pi", "region": "ap-south", "merchant": "kiosk"},
        }
        return {**wanted, **changes}

    async with calling(platform) as call:
        answer = await call("POST", "/v1/enroll", "join", json=body())
        anchors = unpack(base64.b64decode(answer.json()["anchors"]), TrustAnchors)
        assert anchors.tenant == "acme"
        assert answer.json()["certificate_pem"].startswith("-----BEGIN CERTIFICATE")
        traits = platform.ledger.device("pi-0001").traits
        assert (traits.device_class, traits.region, traits.labels) == ("pi", "ap-south", {"merchant": "kiosk"})
        gateway = body(kind="gateway", common_name="gateway-x")
        assert (await call("POST", "/v1/enroll", "join", json=gateway)).status_code == 403
        assert (await call("POST", "/v1/enroll", "gateway", json=gateway)).status_code == 200
        server = body(kind="server", common_name="broker")
        assert (await call("POST", "/v1/enroll", "gateway", json=server)).status_code == 403
        for broken in (
            body(csr_pem="nonsense"),
            body(sealing_public="***"),
            body(sealing_public="AA=="),
            body(common_name="a/b"),
            body(common_name=7),
            body(traits={"region": 1}),
            body(traits=[]),
        ):
            answer = await call("POST", "/v1/enroll", "join", json=broken)
            assert answer.status_code == 400, broken
            assert answer.json()["error"].count("\n") == 0


@on_a_loop
async def test_bad_input_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with calling(platform) as call:
        for method, path, content, words in (
            ("POST", "/v1/models?model=fraud", b"PK\x03\x04 not a model", "model fraud"),
            ("POST", "/v1/models", b"x", "query parameter model"),
            ("POST", "/v1/models?model=fraud&threshold=2", fraud_model(), "threshold"),
            (
                "POST",
                "/v1/rollouts?file=my.yaml",
                CANARY.replace("NAME", "x").replace("devices: 1", "devices: many").encode(),
                "my.yaml:11",
            ),
            ("POST", "/v1/rollouts", b"\xff\xfe", "UTF-8"),
            ("POST", "/v1/rounds", b'{"model": "fraud", "quorom": 3}', "quorom"),
            ("POST", "/v1/rounds", b"[1", "round"),
            ("POST", "/v1/notes", b"[]", "JSON object"),
            ("POST", "/v1/flower/replies", b'{"no": 1}', "Flower reply"),
            ("PUT", "/v1/store/artifact/" + "0" * 64, b"x", "artifact"),
            ("POST", "/v1/aggregators", json.dumps({"name": "a0"}).encode(), "sealing"),
        ):
            answer = await call(method, path, content=content)
            assert answer.status_code in (400, 403), (path, answer.status_code)
            error = answer.json()["error"]
            assert words in error, (path, error)
            assert "\n" not in error
        assert platform.ledger.releases() == []
        assert platform.ledger.rollouts() == []
        assert (await call("POST", "/v1/rollouts", content=FIRST)).status_code == 404  # nothing is published
        assert (await call("GET", "/v1/releases/" + "0" * 64)).status_code == 404
        assert (await call("GET", "/v1/store/keyring/" + "0" * 64)).status_code == 404
        assert (await call("GET", "/v1/store/blob/..%2Fkeyring")).status_code in (400, 404)
        assert (await call("GET", "/v1/store/tuf/..%2Fkeyring")).status_code in (400, 404)
        assert (await call("GET", "/v1/store/tuf/timestamp.json")).status_code == 404  # no ceremony was held
        platform.store.put("tuf", "timestamp.json", b"{}")
        assert (await call("GET", "/v1/store/tuf/timestamp.json")).content == b"{}"


@on_a_loop
async def test_a_body_is_read_no_further_than_its_bound(tmp_path: Path) -> None:
    async with calling(Platform(tmp_path)) as call:
        sent = 0

        async def endless() -> Any:
            nonlocal sent
            while True:
                sent += 65_536
                yield b" " * 65_536

        answer = await call("POST", "/v1/rounds", content=endless())
        assert answer.status_code == 400
        assert "at most" in answer.json()["error"]
        assert sent < 2**20


@on_a_loop
async def test_the_event_stream_carries_snapshots(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    app = control_app(platform.coordinator, tokens=TOKENS, flower=platform.bridge)
    async with platform.running():
        await asyncio.to_thread(platform.coordinator.note, "act", "learn")
        sent: list[dict[str, Any]] = []
        gone = asyncio.Event()
        request = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            if request:
                return request.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if len(sent) >= 3:
                gone.set()

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/events",
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1:8080")],
            "client": ("127.0.0.1", 1),
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }
        async with asyncio.timeout(10):
            await app(scope, receive, send)  # type: ignore[arg-type]
        assert sent[0]["status"] == 200
        first = sent[1]["body"]
        assert first.startswith(b"data: ")
        assert first.endswith(b"\n\n")
        snapshot = json.loads(first.removeprefix(b"data: "))
        assert (snapshot["act"], snapshot["notes"][-1]["text"]) == ("learn", "learn")


@on_a_loop
async def test_flower_fetches_commands_and_delivers_answers(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with calling(platform) as call:
        assert (await call("GET", "/v1/flower/commands?wait=0", "flower")).status_code == 204
        pending = asyncio.create_task(platform.bridge.command({"x": 1}, ["a0"], 5.0))
        wire = (await call("GET", "/v1/flower/commands?wait=2", "flower")).json()
        assert wire["nodes"] == ["a0"]
        reply = {"id": wire["id"], "replies": {"a0": wire["payload"]}, "failures": {}}
        assert (await call("POST", "/v1/flower/replies", "flower", json=reply)).json() == {"wanted": True}
        assert await pending == {"a0": {"x": 1}}


@on_a_loop
async def test_an_aggregator_asks_for_the_attempt_that_it_stands_by_for(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with calling(platform) as call:
        standing, path = platform.coordinator._standing, "/v1/rounds/r-1/attempt?aggregator="

        async def ask(name: str, wait: str = "0") -> httpx.Response:
            return await call("GET", f"{path}{name}&wait={wait}", "aggregator")

        assert (await ask("a0")).status_code == 404
        standing.begin("r-1", b"announcement", ("a0", "a1", "a2"), 60.0)
        assert (await ask("a0")).status_code == 204
        assert [(await ask(name)).status_code for name in ("a3", "")] == [404, 404]
        assert [(await ask("a0", wait)).status_code for wait in ("nan", "-1", "never")] == [400] * 3
        asking = [asyncio.create_task(ask(name, "20")) for name in ("a0", "a1", "a2")]
        command = {"round_id": "r-1", "attempt": 1}
        attempt = asyncio.create_task(standing.command(command, ("a0", "a1", "a2"), 20.0))
        for answer in await asyncio.gather(*asking):
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/cbor")
            assert unpack_plain(answer.content) == command
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        assert (await ask("a0", "20")).status_code == 404


@on_a_loop
async def test_an_artifact_is_stored_under_its_digest(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with calling(platform) as call:
        path = f"/v1/store/artifact/{digest_of(b'baseline')}"
        assert (await call("PUT", path, content=b"baseline")).json()["size"] == 8
        assert (await call("GET", path, "gateway")).content == b"baseline"


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotFound, 404), (Unavailable, 503), (StorageFull, 507), (Untrusted, 403), (Malformed, 400), (AtollError, 500)],
)
def test_one_table_maps_errors_to_http(error: type[AtollError], status: int) -> None:
    assert next(code for kind, code in STATUS if issubclass(error, kind)) == status


@on_a_loop
async def test_keys_are_rotated_and_a_version_is_shredded_over_http(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with calling(platform) as call:
        published = (await call("POST", "/v1/models?model=fraud&name=v1", content=fraud_model(1))).json()
        kept = (await call("POST", "/v1/models?model=fraud&name=v2", content=fraud_model(2))).json()
        asked = (await call("GET", "/v1/keys")).json()
        assert asked == {"floor": 1, "latest": 1, "rewrapped": 0, "to_rewrap": 0}
        assert (await call("POST", "/v1/keys/rotate", json={})).json() == {"floor": 1, "latest": 2}
        assert (await call("POST", "/v1/keys/rotate", json={"forget": "yes"})).status_code == 400
        place = f"/v1/releases/{published['manifest']}"
        assert (await call("GET", f"{place}/source")).content == fraud_model(1)
        assert (await call("POST", f"{place}/shred")).json() == {"floor": 3, "latest": 3}
        assert (await call("GET", f"{place}/source")).status_code == 403
        assert (await call("GET", f"/v1/releases/{kept['manifest']}/source")).content == fraud_model(2)


@on_a_loop
async def test_a_release_tells_its_form_and_what_was_asked_for_is_checked(tmp_path: Path) -> None:
    platform = Platform(tmp_path)
    async with calling(platform) as call:
        answer = await call("POST", "/v1/models?model=fraud&quantize=none", content=fraud_model(1))
        assert answer.json()["form"]["int8"] is False
        seen = (await call("GET", f"/v1/releases/{answer.json()['manifest']}")).json()
        assert seen["form"] == answer.json()["form"]
        second = await call("POST", "/v1/models?model=fraud&quantize=int8", content=fraud_model(2))
        assert second.json()["form"]["int8"] is True
        refused = await call("POST", "/v1/models?model=fraud&quantize=int4", content=fraud_model(3))
        assert refused.status_code == 400
        assert "quantize: expected auto, int8 or none, found 'int4'" in refused.text
