import asyncio

from fl_coordinator.inbox import Inbox
from model_delta.topics import up


def test_one_device_cannot_crowd_out_the_others() -> None:
    async def story() -> None:
        inbox = Inbox(messages_max=8, per_device_max=3, message_bytes_max=100, bytes_max=1000)
        assert [inbox.put(up("loud", "report"), b"x") for _ in range(5)] == [True] * 3 + [False] * 2
        assert inbox.put(up("quiet", "report"), b"y")
        assert await inbox.get() == (up("loud", "report"), b"x")
        assert inbox.put(up("loud", "report"), b"z"), "what was read makes room"
        assert [inbox.get_nowait()[1] for _ in range(4)] == [b"x", b"x", b"y", b"z"]
        assert inbox.empty()

    asyncio.run(story())


def test_messages_and_their_sum_are_bounded() -> None:
    async def story() -> None:
        inbox = Inbox(messages_max=3, per_device_max=9, message_bytes_max=100, bytes_max=250)
        assert not inbox.put(up("pos-1", "report"), bytes(101))
        assert [inbox.put(up("pos-1", "report"), bytes(100)) for _ in range(3)] == [True, True, False]
        assert inbox.put(up("pos-1", "report"), b"")
        assert not inbox.put(up("pos-2", "report"), b""), "full"
        await inbox.get()
        assert inbox.put(up("pos-1", "report"), bytes(100))

    asyncio.run(story())
