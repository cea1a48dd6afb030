"""Signals that ask for an end: remembered, turned into a cancellation, never lost and never an exception."""

import asyncio
import os
import signal

from atoll.endings import Endings


def test_a_signal_cancels_the_task_that_asked_for_it() -> None:
    with Endings() as endings:

        async def work() -> str:
            with endings.cancelling():
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
                try:
                    await asyncio.sleep(5)
                except asyncio.CancelledError:
                    return "cancelled"
            return "slept"

        assert asyncio.run(work()) == "cancelled"
        assert endings.received == signal.SIGTERM


def test_each_further_signal_cancels_again_and_the_first_one_is_told() -> None:
    with Endings() as endings:

        async def work() -> int:
            loop, cancelled = asyncio.get_running_loop(), 0
            with endings.cancelling():
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGINT):
                    loop.call_soon(os.kill, os.getpid(), number)
                    try:
                        await asyncio.sleep(5)
                    except asyncio.CancelledError:
                        cancelled += 1
            return cancelled

        assert asyncio.run(work()) == 3
        assert endings.received == signal.SIGINT


def test_a_signal_before_the_task_cancels_it_at_once_and_one_after_it_interrupts_nothing() -> None:
    with Endings() as endings:
        os.kill(os.getpid(), signal.SIGINT)

        async def work() -> str:
            try:
                with endings.cancelling():
                    await asyncio.sleep(5)
            except asyncio.CancelledError:
                return "cancelled"
            return "slept"

        assert asyncio.run(work()) == "cancelled"
        os.kill(os.getpid(), signal.SIGTERM)  # nothing to cancel any more: whatever is being tidied up goes on


def test_what_was_ignored_stays_ignored_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    was = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Endings() as endings:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGINT) is not before
        assert endings.received == 0
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGHUP, was)
