"""The device makes a new file from files: power cuts in its middle, a full disk, work that is withdrawn."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.slots import Slots
from edge_runtime.update import State
from model_delta.errors import NotFound, StorageFull
from model_delta.release import Release
from tests.edge_runtime.test_device import PowerCut, cut_at_write, dies, events, play
from tests.edge_runtime.test_healing import adopted, large_model, settled, spoil
from tests.edge_runtime.world import Life, World, eventually


def files_in(folder: Path, slot: str) -> set[str]:
    return {path.name for path in (folder / "state" / "slots" / slot).iterdir()}


async def ends_with(world: World, folder: Path, goal: Release, what: str) -> None:
    """One undisturbed life: `goal` answers, its file is there, and nothing half-made."""
    async with Life(world.device("pos-0001", folder)) as device:
        await eventually(lambda: settled(device, goal), what=what)
    found = Slots(folder / "state")
    version = found.installed(found.pointer())
    assert version is not None
    assert found.model_file(version).read_bytes() == world.files[goal.digest]
    for slot in ("a", "b"):
        assert files_in(folder, slot) in (set(), {"model.bin", "manifest.envelope"})


async def on_the_first(world: World, folder: Path) -> tuple[Release, Release]:
    """A device on the first of two versions with several segments; the plan wants the second."""
    first = world.publish(large_model(1))
    second = world.publish(large_model(2, world.files[first.digest]), first)
    world.plan(first)
    await adopted(world, folder, first)
    world.plan(second)
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("way", ["patch", "replace"])
def test_the_power_may_go_off_at_every_write_of_a_file(tmp_path: Path, way: str) -> None:
    """Each death from the same start: at the first write of whatever kind, torn in half, then at the second, ..."""

    async def story(world: World, folder: Path) -> None:
        if way == "patch":
            _, goal = await on_the_first(world, folder)
        else:
            goal = world.publish(large_model(1))
            world.plan(goal)
            await adopted(world, folder, goal)
            spoil(folder, 0.5)
        start, told = folder.with_name("start"), len(world.outcomes)
        shutil.copytree(folder / "state", start)
        number = 0
        while True:
            number += 1
            shutil.rmtree(folder / "state")
            shutil.copytree(start, folder / "state")
            world.outcomes.clear()
            world.known.clear()
            device = world.device("pos-0001", folder)
            if not await dies(device, cut_at_write(device, number, "torn"), until=goal.digest):
                break
            await ends_with(world, folder, goal, f"write {number}")
        assert number > 8
        assert told <= 1

    play(story, tmp_path)


def test_what_was_written_before_a_power_cut_is_not_written_again(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        _, second = await on_the_first(world, folder)
        size = len(world.files[second.digest])
        device = world.device("pos-0001", folder)
        written = count_written(device.installation._slots)
        stop_after(device.installation._slots, second.digest, 130_000)
        await dies(device)
        part = folder / "state" / "slots" / "b" / f"{second.digest}.part"
        assert 0 < part.stat().st_size < size
        assert part.stat().st_mode & 0o777 == 0o600
        assert "model.bin" not in files_in(folder, "b")
        assert written[second.digest] >= 130_000
        device = world.device("pos-0001", folder)
        written = count_written(device.installation._slots)
        async with Life(device):
            await eventually(lambda: settled(device, second))
        assert written[second.digest] <= size - 90_000, "the large segment that was whole is kept"
        assert files_in(folder, "b") == {"model.bin", "manifest.envelope"}

    play(story, tmp_path)


def test_a_power_cut_between_a_file_and_its_manifest_costs_nothing(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        _, second = await on_the_first(world, folder)
        device = world.device("pos-0001", folder)
        async with Life(device):
            await eventually(lambda: settled(device, second))
        state = folder / "state"
        (state / "slots" / "b" / "manifest.envelope").unlink()
        (state / "pointer").write_text("a")
        room = Slots(state).room("b")
        room.adopt(second.digest)
        found = room.read(second.digest)
        assert found is not None
        assert found.pread(0, found.size) == world.files[second.digest]
        Slots(state).install("b", second.envelope)
        version = Slots(state).installed("b")
        assert version is not None
        assert Slots(state).model_file(version).read_bytes() == world.files[second.digest]

    play(story, tmp_path)


def test_a_slot_is_not_installed_from_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    release = world.publish(world.model(seed=1))
    with pytest.raises(NotFound, match="expected a finished file of version"):
        Slots(tmp_path / "state").install("a", release.envelope)


def test_an_update_that_does_not_fit_is_refused_before_a_byte_is_fetched(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = await on_the_first(world, folder)
        device = world.device("pos-0001", folder)
        slots = device.installation._slots
        free = 1_000
        slots._free = lambda path: free
        with pytest.raises(StorageFull, match=r"needs \d+ bytes more on .*, which has 1000: free some space"):
            slots.require_room(2_000, "version")
        before = set(world.store)
        asked = sum(world.chunks.values())
        async with Life(device):
            await eventually(lambda: device.state == State.FETCHING and sum(world.chunks.values()) > asked)
            await asyncio.sleep(0.15)
            assert device.running.digest == first.digest, "it goes on answering"
            assert not slots.complete_blobs()
            assert files_in(folder, "b") == set()
            free = 10**9
            await eventually(lambda: settled(device, second))
        assert set(world.store) == before

    play(story, tmp_path)


def test_an_old_version_makes_room_when_there_is_no_other(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        _, second = await on_the_first(world, folder)
        async with Life(world.device("pos-0001", folder)) as device:
            await eventually(lambda: settled(device, second) and len(world.outcomes) == 2)
        third = world.publish(large_model(3, world.files[second.digest]), second)
        world.plan(third)
        device = world.device("pos-0001", folder)
        slots = device.installation._slots
        size = len(world.files[third.digest])
        model = folder / "state" / "slots" / "a" / "model.bin"
        slots._free = lambda path: size // 2 + (0 if model.exists() else size)
        async with Life(device):
            await eventually(lambda: settled(device, third) and len(world.outcomes) == 3)
        assert world.outcomes[2].route == "patch"
        assert files_in(folder, "a") == {"model.bin", "manifest.envelope"}

    play(story, tmp_path)


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = await on_the_first(world, folder)
        device = world.device("pos-0001", folder, retry_first_s=0.05)
        slots = device.installation._slots
        full = [True]
        fill_up(slots, second.digest, full)
        async with Life(device):
            part = folder / "state" / "slots" / "b" / f"{second.digest}.part"
            await eventually(part.exists)
            await asyncio.sleep(0.15)
            assert device.running.digest == first.digest
            assert Slots(folder / "state").pointer() == "a"
            full.clear()
            await eventually(lambda: settled(device, second))
        assert events(world)[0] == "adopted"

    play(story, tmp_path)


def test_a_withdrawal_stops_the_writer(tmp_path: Path) -> None:
    async def story(world: World, folder: Path) -> None:
        first, second = await on_the_first(world, folder)
        device = world.device("pos-0001", folder)
        stalled = stall(device.installation._slots, second.digest)
        async with Life(device):
            await eventually(lambda: stalled[0] > 0)
            world.plan(first, name="back")
            await eventually(lambda: settled(device, first) and events(world) == ["adopted", "withdrawn"])
            writes = stalled[0]
            await asyncio.sleep(0.1)
            assert stalled[0] == writes, "nobody writes any more"

    play(story, tmp_path)


# What happens to writes


def watch(slots: Slots, on_write: Any) -> None:
    """Call `on_write(name, data, write)` for each write to a file in the making."""
    room = slots.room

    def watched(slot: Any) -> Any:
        made = room(slot)
        opened = made.open

        def opening(name: str) -> Any:
            return _Watched(opened(name), name, on_write)

        made.open = opening  # type: ignore[method-assign]
        return made

    slots.room = watched  # type: ignore[method-assign]


class _Watched:
    """An open file whose writes are watched."""

    def __init__(self, opened: Any, name: str, on_write: Any) -> None:
        self._opened, self._name, self._on_write = opened, name, on_write

    def __enter__(self) -> Any:
        self._file = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        self._on_write(self._name, data, self._file.write)
        return len(data)


def count_written(slots: Slots) -> dict[str, int]:
    """Bytes written to each file in the making, counted from now on."""
    written: dict[str, int] = {}

    def on_write(name: str, data: Any, write: Any) -> None:
        written[name] = written.get(name, 0) + len(data)
        write(data)

    watch(slots, on_write)
    return written


def stop_after(slots: Slots, digest: str, size: int) -> None:
    """The power goes off when so many bytes were written to the file of version `digest`."""
    written = [0]

    def on_write(name: str, data: Any, write: Any) -> None:
        write(data)
        written[0] += len(data) if name == digest else 0
        if written[0] >= size:
            raise PowerCut

    watch(slots, on_write)


def fill_up(slots: Slots, digest: str, full: list[bool]) -> None:
    """As long as `full` says so the disk takes one write to the file of version `digest` and no second."""
    writes = [0]

    def on_write(name: str, data: Any, write: Any) -> None:
        writes[0] += name == digest
        if full and writes[0] > 1:
            raise OSError(28, "No space left on device")
        write(data)

    watch(slots, on_write)


def stall(slots: Slots, digest: str) -> list[int]:
    """Writes to the file of version `digest` take long; how many there were."""
    writes = [0]

    def on_write(name: str, data: Any, write: Any) -> None:
        if name == digest:
            writes[0] += 1
            time.sleep(0.1)
        write(data)

    watch(slots, on_write)
    return writes
