"""The live page in a real browser, on a scripted event stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from monitoring.snapshot import DeviceState, Note, RolloutState
from tests.fakes.browser import Browser, Page, chromium
from tests.fakes.live_page import LivePage
from tests.fakes.snapshots import FIRST, HOSTILE_TEXT, LEARNED, empty_snapshot, sample_snapshot

pytestmark = pytest.mark.slow

LIVE = "document.querySelector('#link').innerText === 'live'"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def live() -> Iterator[LivePage]:
    with LivePage(sample_snapshot()).serving() as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.page() as found:
        yield found


def texts(page: Page, selector: str) -> list[str]:
    found: Any = page.run(f"[...document.querySelectorAll({selector!r})].map((one) => one.innerText)")
    return list(found)


def opened(page: Page, live: LivePage, **options: Any) -> Page:
    page.show(live.url, **options)
    page.wait(LIVE)
    return page


def test_everything_is_shown_and_nothing_goes_wrong(live: LivePage, page: Page) -> None:
    opened(page, live)
    assert page.text("#scope") == "acme / fraud"
    assert page.text("#act") == "act 4: canary"
    assert [line for line in page.text(".figures").split("\n") if line][:6] == [
        "Decisions",
        "238 / s",
        "184,233 in all",
        "Latency, p95",
        "121 µs",
        "p50 46.4 µs · p99 1.47 ms",
    ]
    assert [page.text(f"#{name}") for name in ("heard", "safe", "lost", "rollout")] == [
        "56 of 60",
        "1",
        "0",
        "running",
    ]
    assert len(texts(page, ".device")) == 60
    assert len(texts(page, ".region")) == 2
    legend = texts(page, "#legend li")
    assert legend[0].startswith("eu-west:1 43")
    assert legend[0].endswith("stable")
    assert legend[1].endswith("rolling out")
    assert [text.split("\t")[0] for text in texts(page, "#releases tbody tr")] == [
        "eu-west:3 rolling out learned",
        "eu-west:2 withdrawn",
        "eu-west:1 stable",
    ]
    rollouts = texts(page, "#rollouts article")
    assert "15 of 16 devices in this stage run it" in rollouts[0]
    assert "stopped, rolled back" in rollouts[1]
    assert "false_positive_rate 41.18% of 34" in rollouts[1]
    rounds = texts(page, "#rounds article")
    assert "19 contributions, quorum 30" in rounds[0]
    assert "0.312 → 0.487" in rounds[1]
    assert "11 contributions at the deadline, quorum 30" in rounds[2]
    assert "sat out: 3 × training diverged, 1 × no data" in rounds[2]
    assert page.text("#notes").split("\n")[1].startswith("rollout learned: widened")
    assert "announced on eu-west:1, 40257 parameters" in page.text("#notes")
    assert page.problems == []
    assert {url.removeprefix(live.url) for url in page.requests if url != "data:,"} == {
        "",
        "v1/events",
        *(f"static/{name}" for name in ("page.css", *SCRIPTS)),
    }


SCRIPTS = ("page.js", "dom.js", "trend.js", "versions.js", "fleet.js", "panels.js")


def test_versions_of_two_models_have_two_names_and_a_stable_one_each(page: Page) -> None:
    state = sample_snapshot()
    other = replace(state.releases[0], model="ranking", manifest="7" * 64)
    done = replace(state.rollouts[0], name="ranks", model="ranking", state="completed", target=other.manifest)
    ours = tuple(replace(one, model="fraud") for one in state.rollouts)
    releases = tuple(replace(one, model="fraud") for one in state.releases)
    with LivePage(replace(state, releases=(*releases, other), rollouts=(*ours, done))).serving() as live:
        opened(page, live)
        shown = [text.split("\t")[0] for text in texts(page, "#releases tbody tr")]
        assert {"fraud eu-west:1 stable", "ranking eu-west:1 stable"} <= set(shown)
        assert texts(page, "#legend li")[0].startswith("fraud eu-west:1 43")


def test_text_from_outside_stays_text(live: LivePage, page: Page) -> None:
    opened(page, live)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert page.text("#notes").count(HOSTILE_TEXT) == 1
    assert HOSTILE_TEXT in page.text("#rollouts h3")
    assert HOSTILE_TEXT in page.text("#rounds table")
    assert HOSTILE_TEXT in texts(page, ".device b")
    assert page.run("document.images.length") == 0
    assert page.run("window.stolen === undefined")
    assert page.problems == []


def test_an_inline_script_would_be_refused(live: LivePage, page: Page) -> None:
    opened(page, live)
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.stolen = 1\">')")
    page.wait("document.images.length === 1 && document.images[0].complete")
    assert page.run("window.stolen === undefined")
    assert any("Content Security Policy" in problem for problem in page.problems)


def test_states_of_devices_are_words_not_only_colours(live: LivePage, page: Page) -> None:
    opened(page, live)
    found = dict(zip(texts(page, ".device b"), texts(page, ".device span"), strict=True))
    assert found["pi-0009"] == "on probation"
    assert found["pos-0013"] == "fetching"
    assert found["phone-0020"] == "rolling back"
    assert found["pi-0027"] == "safe mode"
    assert found["mcu-0005"] == "silent 2 min"
    assert found["pos-0058"] == "never heard"
    assert found["pos-0000"] == "eu-west:1"


def test_only_what_needs_attention_can_be_shown(live: LivePage, page: Page) -> None:
    opened(page, live)
    page.run("document.querySelector('#attention').click()")
    names = page.run("[...document.querySelectorAll('.device:not([hidden]) b')].map((one) => one.innerText)")
    assert sorted(names) == ["mcu-0005", "mcu-0041", "phone-0020", "pi-0027", "pos-0030", "pos-0058"]
    assert page.run("document.querySelectorAll('.device[tabindex=\"0\"]:not([hidden])').length") == 1
    page.run("document.querySelector('#attention').click()")
    assert page.run("document.querySelectorAll('.device:not([hidden])').length") == 60


def test_a_device_is_reached_and_chosen_by_keyboard(live: LivePage, page: Page) -> None:
    opened(page, live)
    page.run("document.querySelector('#attention').focus()")
    page.press("Tab")
    first = page.run("document.activeElement.dataset.device")
    page.press("ArrowRight")
    second = page.run("document.activeElement.dataset.device")
    assert (first, second) == ("pos-0001", "pi-0003")
    page.press("Enter")
    assert page.text("#device h3") == "pi-0003"
    assert "3,021" in page.text("#device")
    page.press("Tab")
    assert page.run("document.activeElement.dataset.device === undefined")


def test_what_was_unfolded_stays_unfolded_while_figures_change(live: LivePage, page: Page) -> None:
    opened(page, live)
    page.run("document.querySelector('#rollouts summary').click()")
    running = live.snapshot.rollouts[1]
    live.snapshot = replace(live.snapshot, rollouts=(live.snapshot.rollouts[0], replace(running, adopted=3)))
    page.wait("document.querySelector('#rollouts').innerText.includes('3 of 16 devices')")
    assert "stage 2 of 3: 25%" in page.text("#rollouts details")


def test_a_canary_is_marked_as_one(live: LivePage, page: Page) -> None:
    canary = replace(live.snapshot.rollouts[1], stage=0, in_stage=1, adopted=1)
    devices = tuple(
        replace(device, running=LEARNED if device.device_id == "pos-0000" else FIRST, version="", state="idle")
        for device in live.snapshot.devices
    )
    live.snapshot = replace(live.snapshot, rollouts=(canary,), devices=devices)
    opened(page, live)
    assert texts(page, ".device.canary span") == ["canary"]


def test_a_device_before_its_first_version_is_no_alarm(live: LivePage, page: Page) -> None:
    devices = tuple(
        replace(device, running="", version="", state="idle", safe_mode=True, last_seen=live.snapshot.time)
        for device in live.snapshot.devices
    )
    live.snapshot = replace(live.snapshot, devices=devices, releases=(), rollouts=())
    opened(page, live)
    assert set(texts(page, ".device span")) == {"no model"}
    assert page.text("#safe") == "0"
    assert texts(page, "#legend li") == ["no model 60 100 %"]
    assert page.text("#attention") == "Nothing needs attention"


def test_a_paused_rollout_says_that_it_waits(live: LivePage, page: Page) -> None:
    paused: RolloutState = replace(live.snapshot.rollouts[1], state="paused", standing="paused, waits for you")
    live.snapshot = replace(live.snapshot, rollouts=(paused,))
    opened(page, live)
    assert "paused, waits for you" in page.text("#rollouts article")


def test_a_rollout_without_devices_and_a_first_version_that_stopped_say_what_that_means(
    live: LivePage, page: Page
) -> None:
    words, why = "waiting for devices", "waits for devices: none that follows fraud is in this stage yet"
    alone = replace(live.snapshot.rollouts[1], in_stage=0, adopted=0, health={}, standing=words, reason=why)
    kept = "stopped; devices keep this first version"
    ended = replace(live.snapshot.rollouts[0], name="first", target=FIRST, standing=kept)
    live.snapshot = replace(live.snapshot, rollouts=(ended, alone))
    opened(page, live)
    shown = texts(page, "#rollouts article")
    assert words in shown[0]
    assert why in shown[0]
    assert kept in shown[1]
    assert "rolled back" not in shown[1].split("\n")[0]


def test_the_page_comes_back_after_the_stream_drops(live: LivePage, page: Page) -> None:
    opened(page, live)
    live.refusing = True
    live.drop()
    page.wait("document.querySelector('#link').innerText.startsWith('no news for')")
    assert page.run("document.body.classList.contains('stale')")
    live.refusing = False
    live.snapshot = replace(live.snapshot, notes=(Note(time=live.snapshot.time, text="back again"),))
    page.wait(LIVE)
    assert "back again" in page.text("#notes")
    assert live.opened >= 2


def test_an_open_stream_without_events_is_called_old(live: LivePage, page: Page) -> None:
    opened(page, live)
    live.silent = True
    page.wait("document.querySelector('#link').innerText.startsWith('no news for')")
    live.silent = False
    page.wait(LIVE)


def test_requests_lost_lately_are_an_alarm_and_old_ones_are_not(live: LivePage, page: Page) -> None:
    opened(page, live)
    assert page.text("#lost-more") == "2 since the start"
    assert page.run("document.querySelectorAll('.figures .bad #lost').length") == 0
    first, *others = live.snapshot.devices
    live.snapshot = replace(live.snapshot, devices=(replace(first, lost_requests=3), *others))
    page.wait("document.querySelector('.figures .bad #lost')?.innerText === '3'")
    assert page.text("#lost-more") == "5 since the start"


def test_a_lost_broker_is_said(live: LivePage, page: Page) -> None:
    live.snapshot = replace(live.snapshot, broker_connected=False)
    page.show(live.url)
    page.wait("document.querySelector('#link').innerText.includes('lost the broker')")


def test_a_dead_region_stands_out_and_a_removed_device_goes(live: LivePage, page: Page) -> None:
    opened(page, live)
    now = live.snapshot.time
    devices: list[DeviceState] = [
        replace(device, last_seen=now - 60) if device.region == "eu-west" else device
        for device in live.snapshot.devices
        if device.device_id != "pos-0001"
    ]
    live.snapshot = replace(live.snapshot, devices=tuple(devices))
    page.wait("document.querySelectorAll('.device').length === 59")
    assert texts(page, ".region.bad h3") == ["eu-west: 0 of 30 devices heard"]


def test_an_empty_platform_says_what_is_missing(live: LivePage, page: Page) -> None:
    live.snapshot = empty_snapshot()
    opened(page, live)
    for section, words in (
        ("#fleet-empty", "No device has enrolled yet"),
        ("#rollouts", "No rollout yet"),
        ("#rounds", "No federated round yet"),
        ("#releases", "No version yet"),
        ("#notes", "Nothing yet"),
    ):
        assert words in page.text(section)
    assert "no decisions yet" in page.run("document.querySelector('#trend-rate').textContent")
    assert not page.run("document.querySelector('#act').checkVisibility()")
    assert page.problems == []


@pytest.mark.parametrize(("width", "dark", "devices"), [(400, False, 60), (400, True, 240), (1280, True, 60)])
def test_nothing_sticks_out(live: LivePage, page: Page, width: int, dark: bool, devices: int) -> None:
    live.snapshot = sample_snapshot(devices)
    opened(page, live, width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.run("document.querySelector('.device').click()")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.overflowing() == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_the_contrast_that_wcag_aa_asks_for(live: LivePage, page: Page, dark: bool) -> None:
    opened(page, live, dark=dark)
    page.run("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert page.low_contrast() == []
