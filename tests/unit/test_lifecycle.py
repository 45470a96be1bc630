"""The table of facts, and the picture of it in the documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hotlun.errors import BackendError, OutcomeUnknownError
from hotlun.facts import TABLE, UNDOING, Action, Fact, Kind
from hotlun.lifecycle import begin, done, failed, next_step
from hotlun.model import Attachment, Disk, DiskKind, MountConfig, Slot
from hotlun.states import DiskState, MountState
from hotlun.wants import ask_release, is_on_its_way, join, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent


class Answer:
    """Where a caller waits, without a loop."""

    def __init__(self) -> None:
        self.outcome: BaseException | str | None = None

    def done(self) -> bool:
        return self.outcome is not None

    def set_result(self, result: None, /) -> None:
        self.outcome = "done"

    def set_exception(self, exception: BaseException, /) -> None:
        self.outcome = exception


@pytest.fixture
def disk() -> DiskState:
    attachment = Attachment(Slot(0, 0), Disk("/d", DiskKind.VIRTUAL_DISK), "h1")
    return DiskState(attachment, ("path", "/d", ""))


def take(disk: DiskState) -> Action:
    """One step, done."""
    step = next_step(disk)
    assert step is not None
    begin(disk, step)
    done(disk, step)
    settle(disk)
    action, *_ = step
    return action


def test_the_picture_is_the_tables() -> None:
    """docs/lifecycle.md is what the script draws."""
    script = ROOT / "scripts" / "draw-lifecycle"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0


@pytest.mark.parametrize("kind", Kind)
def test_every_thing_can_be_undone_from_everywhere(kind: Kind) -> None:
    """From any fact but *no* some undoing step leads on, and in the end to *no*."""
    for fact in TABLE[kind]:
        seen = []
        while fact is not Fact.NO:
            moves = [a for a in TABLE[kind][fact] if a in UNDOING]
            assert len(moves) == 1
            assert fact not in seen
            seen.append(fact)
            fact = TABLE[kind][fact][moves[0]].done


@pytest.mark.parametrize("kind", Kind)
def test_a_definite_failure_changes_nothing(kind: Kind) -> None:
    """It has not happened."""
    for fact, moves in TABLE[kind].items():
        assert all(outcomes.failed is fact for outcomes in moves.values())


def test_a_life(disk: DiskState) -> None:
    """An add and its release, step by step, without a loop or a backend."""
    answer = Answer()
    handle = join(disk, MountState(MountConfig(), "/m"), "vm", answer)
    steps = [take(disk), take(disk), take(disk)]
    assert steps == [Action.GRANT, Action.ATTACH, Action.MOUNT]
    assert answer.outcome == "done"
    assert next_step(disk) is None
    released = Answer()
    ask_release(handle, released)
    settle(disk)
    assert [take(disk) for _ in UNDOING] == list(UNDOING)
    assert released.outcome == "done"
    assert next_step(disk) is None
    assert disk.is_gone


def test_asking_for_the_next_step_changes_nothing(disk: DiskState) -> None:
    """It is a question: asked again, it has the same answer."""
    join(disk, MountState(MountConfig(), "/m"), "vm", Answer())
    first = next_step(disk)
    second = next_step(disk)
    assert first is not None
    assert second is not None
    assert first[0] is second[0] is Action.GRANT
    assert disk.grants == {}


@pytest.mark.parametrize(
    ("error", "fact"),
    [(BackendError("no"), Fact.NO), (OutcomeUnknownError("?"), Fact.MAYBE)],
)
def test_unknown_is_not_failed(disk: DiskState, error: Exception, fact: Fact) -> None:
    """After an unknown attach the disk may be there; after a failed one it is not."""
    answer = Answer()
    join(disk, None, "", answer)
    step = next_step(disk)
    assert step is not None
    begin(disk, step)
    failed(disk, step, error)
    assert disk.fact is fact
    settle(disk)
    if fact is Fact.MAYBE:
        assert answer.outcome is None
        assert [take(disk), take(disk)] == [Action.UNPLUG, Action.DETACH]
    assert answer.outcome is error


def everything(disk: DiskState) -> object:
    """What can be changed of a disk and what hangs on it."""
    things = [disk, *disk.mounts.values()]
    facts = [(thing.fact, thing.closing, thing.stalled, thing.reason) for thing in things]
    handles = [(h.mount, h.is_live, h.is_gone, h.answer.done()) for h in disk.handles]
    held = [dict(mount.handles) for mount in disk.mounts.values()]
    given_up = (disk.is_gone, disk.vacated, list(disk.left), list(disk.unmounted))
    return facts, handles, held, given_up, dict(disk.active), dict(disk.mounts)


def at_every_point(disk: DiskState, config: MountConfig | None) -> Iterator[None]:
    """One caller's add and release, looked at before and after each step."""
    mount = MountState(config, "/m") if config is not None else None
    answer = Answer()
    handle = join(disk, mount, "", answer)
    for _ in range(2):
        yield
        while (step := next_step(disk)) is not None:
            begin(disk, step)
            yield
            done(disk, step)
            yield
            settle(disk)
            yield
        if not handle.is_gone:
            answer = Answer()
            ask_release(handle, answer)


@pytest.mark.parametrize("config", [None, MountConfig(filesystem="ext4")])
def test_who_is_on_his_way_has_nothing_to_be_settled(
    disk: DiskState, config: MountConfig | None
) -> None:
    """A glance says so in the middle of an add and a release, and is never wrong about it."""
    glances = []
    for _ in at_every_point(disk, config):
        glances.append(is_on_its_way(disk))
        if glances[-1]:
            before = everything(disk)
            settle(disk)
            assert everything(disk) == before
    assert disk.is_gone
    assert sum(glances) > len(glances) / 3
