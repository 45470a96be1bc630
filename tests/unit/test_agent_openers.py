"""Who has a disk's node open: what one look at the processes has seen serves many, if it is new."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from support.guest import FakeGuest

from hotlun.agent.holders import Opened
from hotlun.agent.openers import Openers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hotlun.agent.kernel import Kernel

PATIENCE = 10.0
ASKING = 8


class Looks:
    """Looks at processes, each of which waits for its answer to be put here."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.answers: queue.SimpleQueue[Opened | OSError] = queue.SimpleQueue()

    def __call__(self, kernel: Kernel) -> Opened:
        self.begun.release()
        answer = self.answers.get(timeout=PATIENCE)
        if isinstance(answer, OSError):
            raise answer
        return answer


class Waiting(threading.Condition):
    """Tells when somebody is about to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.release()
        return super().wait(timeout)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    guest = FakeGuest(tmp_path)
    yield guest
    guest.close()


@pytest.fixture
def disk(guest: FakeGuest) -> str:
    """Its directory in sysfs."""
    return str(guest.add_disk(1, "sda", "8:0"))


def test_who_asks_during_a_look_is_served_by_the_next(guest: FakeGuest, disk: str) -> None:
    """It may have gone past already what came since; all of them share that next one."""
    looks = Looks()
    openers = Openers(guest.kernel, looks)
    openers._changed = waiting = Waiting()
    with ThreadPoolExecutor(ASKING) as threads:
        first = threads.submit(openers.of, disk)
        assert looks.begun.acquire(timeout=PATIENCE)
        others = [threads.submit(openers.of, disk) for _ in range(ASKING - 1)]
        for _ in others:
            assert waiting.waits.acquire(timeout=PATIENCE)
        looks.answers.put(Opened())
        assert first.result(PATIENCE) == []
        assert looks.begun.acquire(timeout=PATIENCE)
        looks.answers.put(Opened((("8:0", f"{guest.kernel.proc}/77", "/dev/sda"),)))
        told = {tuple(other.result(PATIENCE)) for other in others}
    assert told == {("process 77 (?) has /dev/sda open",)}
    assert not looks.begun.acquire(blocking=False)


def test_who_comes_before_a_look_begins_is_served_by_it(guest: FakeGuest, disk: str) -> None:
    """Whoever is to have it lets the others come first."""
    looks, gave_way, may_look = Looks(), threading.Semaphore(0), threading.Event()

    def give_way() -> None:
        gave_way.release()
        may_look.wait(PATIENCE)

    openers = Openers(guest.kernel, looks, give_way)
    openers._changed = waiting = Waiting()
    with ThreadPoolExecutor(ASKING) as threads:
        asking = [threads.submit(openers.of, disk)]
        assert gave_way.acquire(timeout=PATIENCE)
        asking += [threads.submit(openers.of, disk) for _ in range(ASKING - 1)]
        for _ in asking[1:]:
            assert waiting.waits.acquire(timeout=PATIENCE)
        looks.answers.put(Opened())
        may_look.set()
        assert [one.result(PATIENCE) for one in asking] == [[]] * ASKING
    assert looks.begun.acquire(blocking=False)
    assert not looks.begun.acquire(blocking=False)


def test_a_look_that_fails_is_had_again_by_who_waits(guest: FakeGuest, disk: str) -> None:
    """The error is its own caller's alone."""
    looks = Looks()
    openers = Openers(guest.kernel, looks)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(openers.of, disk)
        assert looks.begun.acquire(timeout=PATIENCE)
        second = threads.submit(openers.of, disk)
        looks.answers.put(OSError("no descriptors"))
        with pytest.raises(OSError, match="no descriptors"):
            first.result(PATIENCE)
        assert looks.begun.acquire(timeout=PATIENCE)
        looks.answers.put(Opened())
        assert second.result(PATIENCE) == []
