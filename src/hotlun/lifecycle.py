"""From the facts and wants of one disk to the one next step; pure, the heart.

Everything here is synchronous and does no I/O. Whoever changes a want or a
fact calls `wants.settle`, which answers whoever can be answered, and then asks
`next_step` again from the top: nothing is decided on an older view. An undoing
step is taken only while somebody drives it - a releasing handle, a waiter, or
nobody owning the thing at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hotlun.errors import JournalError, OutcomeUnknownError
from hotlun.facts import ATTACH, GRANT, MAYBE, MOUNT, NO, TABLE, UNDOING, UNMOUNT, YES
from hotlun.states import DiskState, GrantState, Handle, MountState, Waiter
from hotlun.wants import (
    complete,
    fail_adding,
    fail_waiters,
    forget_mount,
    is_granted,
    is_unharmed,
    leave_mount,
    lose,
    one_each,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from hotlun.facts import Thing
    from hotlun.states import Step


def next_step(disk: DiskState) -> Step | None:
    """The one step to take now; None if there is none, or nobody wants it taken."""
    adding, leaving = [], []
    for handle in disk.active:
        if not handle.is_live:
            adding.append(handle)
        elif not handle.answer.done():
            leaving.append(handle)
    if len(leaving) < len(disk.handles):  # somebody keeps it
        if not disk.closing:
            return _making_step(disk, adding) or _unmounting_step(disk, leaving)
        if not disk.waiters:  # of a disk that is lost, each gives back its own
            return _unmounting_step(disk, leaving)
    elif disk.stalled and not leaving and not disk.waiters:
        return None
    mounts: Collection[MountState] = disk.mounts.values()
    if len(mounts) > 1:  # what would not go before is tried last, as it keeps the others
        mounts = sorted(mounts, key=lambda mount: mount.stalled)
    for thing in (*mounts, disk, *disk.grants.values()):
        action = thing.undoing
        if action is not None:
            return action, thing, leaving
    return None


def _making_step(disk: DiskState, adding: list[Handle]) -> Step | None:
    for handle in adding:
        if handle.vm_id and not is_granted(disk, handle.vm_id):
            return GRANT, disk.grants.get(handle.vm_id) or GrantState(handle.vm_id), [handle]
    if adding and disk.fact is NO:
        return ATTACH, disk, adding
    for handle in adding:
        if handle.mount is not None and handle.mount.fact is NO:
            return MOUNT, handle.mount, [handle]
    for mount in disk.mounts.values():
        if mount.fact is NO and mount.is_wanted:  # gone behind our back
            return MOUNT, mount, ()
    return None


def _unmounting_step(disk: DiskState, leaving: list[Handle]) -> Step | None:
    """A guest mount that nobody keeps, on an attachment that others may keep."""
    for mount in disk.mounts.values():
        if mount.fact is NO:
            continue
        count = sum(handle.mount is mount for handle in leaving) if leaving else 0
        kept = len(mount.handles) > count
        if mount.closing and any(waiter.thing is mount for waiter in disk.waiters):
            return UNMOUNT, mount, leaving
        if not kept and (count or not mount.stalled):
            return UNMOUNT, mount, leaving
    return None


def begin(disk: DiskState, step: Step) -> None:
    """The step is about to be taken: from here on its thing is in teardown, if it undoes."""
    action, thing, asking = step
    disk.current = step
    disk.steps += 1
    disk.drivers = asking
    if action in UNDOING:
        disk.drivers = _begin_undoing(disk, thing, asking)
    elif isinstance(thing, GrantState):
        disk.grants[thing.vm_id] = thing


def _begin_undoing(
    disk: DiskState, thing: Thing, leaving: Sequence[Handle]
) -> Sequence[Handle | Waiter]:
    """From here on nobody shares the thing; who drives its teardown."""
    thing.closing = True
    if len(leaving) == len(disk.handles) <= 1:
        disk.closing = True
    if isinstance(thing, MountState) and thing.is_due:
        thing.is_due = not (disk.closing or all(h.is_releasing for h in thing.handles))
    if not disk.closing:
        leaving = [handle for handle in leaving if handle.mount is thing]
    # Without one of them, it is taken for those who wait.
    return leaving or [w for w in disk.waiters if disk.closing or w.thing is thing]


def done(disk: DiskState, step: Step) -> None:
    """The current step has happened."""
    action, thing, _ = step
    disk.current = None
    disk.drivers = ()
    fact = thing.fact = TABLE[thing.kind][thing.fact][action].done
    thing.reason = ""
    if thing is disk:
        if fact is NO:
            disk.vacated = True
    elif isinstance(thing, MountState):
        if fact is YES:
            thing.is_due = False
        else:
            _unmounted(disk, thing)
    elif isinstance(thing, GrantState) and fact is NO:
        del disk.grants[thing.vm_id]


def _unmounted(disk: DiskState, mount: MountState) -> None:
    if mount.is_due:
        mount.closing = False
        return
    for handle in tuple(mount.handles):
        leave_mount(handle)
        if len(disk.handles) > 1:
            complete(handle)
    forget_mount(disk, mount)


def called_off(disk: DiskState) -> None:
    """The current step has not happened, and that is nobody's failure."""
    disk.current = None
    disk.drivers = ()


def failed(disk: DiskState, step: Step, error: BaseException) -> None:
    """The current step has not happened, or, after `OutcomeUnknownError`, maybe."""
    action, thing, _ = step
    drivers = disk.drivers
    disk.current = None
    disk.drivers = ()
    outcomes = TABLE[thing.kind][thing.fact][action]
    is_unknown = isinstance(error, OutcomeUnknownError)
    thing.fact = outcomes.unknown if is_unknown else outcomes.failed
    thing.reason = f"{action} {'may not have happened' if is_unknown else 'failed'}: {error}"
    if action is GRANT:
        fail_adding(disk, (h for h in drivers if isinstance(h, Handle)), error, None)
        if thing.fact is NO and isinstance(thing, GrantState):
            del disk.grants[thing.vm_id]
    elif action is ATTACH:
        disk.vacated = not is_unknown
        fail_adding(disk, list(disk.active), error, None)
    elif action is MOUNT and isinstance(thing, MountState):
        held = [handle for handle in thing.handles if handle.is_live]
        if held:  # their releases undo what may be left of it, as after an unknown outcome
            thing.fact = MAYBE
        if not (is_unknown or isinstance(error, JournalError)):  # else it may be made yet
            thing.is_due = False
            for handle in held:
                lose(handle, f"{thing.path} was gone from the guest, and could not be made again")
        thing.closing = is_unknown or bool(held)
        # What is held is not cleaned up before its Mounts are released: nobody waits for that.
        awaited = thing if is_unknown and not held else None
        fail_adding(disk, list(thing.handles), error, awaited)
        if held:
            fail_waiters(disk, thing, error)
    else:
        _fail_undoing(disk, thing, drivers, error)


def _fail_undoing(
    disk: DiskState, thing: Thing, drivers: Iterable[Handle | Waiter], error: BaseException
) -> None:
    if isinstance(thing, MountState):
        thing.closing = thing.fact is MAYBE or not thing.handles
        thing.stalled = not thing.handles
    if disk.closing and is_unharmed(disk):
        disk.closing = False
    if not disk.handles:
        disk.stalled = True
    errors = one_each(error)
    for driver in drivers:
        shares_again = isinstance(driver, Waiter) and not (disk.closing or driver.thing.closing)
        if not driver.answer.done() and not shares_again:
            driver.answer.set_exception(next(errors))
    for failure in disk.failures:
        failure.error.add_note(f"then, cleaning up, {thing.reason}")
