"""Who wants a disk: the handles on it, those who wait for a teardown, and their answers.

A handle is adding, live or releasing. A waiter cannot begin before a teardown
is over, and drives it meanwhile. Each waits for an answer of its own; one whose
answer is done (cancelled, say) wants nothing any more. `settle` answers
everyone who can be answered by the facts as they are.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from hotlun.errors import BackendError
from hotlun.facts import MAYBE, NO, YES
from hotlun.owners import NOBODY
from hotlun.states import Failure, Handle, MountState, Waiter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hotlun.facts import Thing
    from hotlun.owners import Owner
    from hotlun.states import Answer, DiskState


def join(
    disk: DiskState,
    mount: MountState | None,
    vm_id: str,
    answer: Answer,
    owner: Owner = NOBODY,
) -> Handle:
    """Register an add on the disk: a reference on the attachment and one on the guest mount."""
    handle = Handle(disk, mount, vm_id, answer, owner)
    disk.handles[handle] = None
    disk.active[handle] = None
    if mount is not None:
        if not mount.handles:  # it may be new
            disk.mounts.setdefault(mount.config, mount)
        mount.handles[handle] = None
    return handle


def ask_release(handle: Handle, answer: Answer) -> None:
    """The handle wants to give its references back."""
    handle.answer = answer
    handle.disk.active[handle] = None


def wait_for(
    thing: DiskState | MountState, disk: DiskState, answer: Answer, *, is_adding: bool = False
) -> None:
    """Wait until the thing's teardown is over, or is called off; drive it meanwhile."""
    disk.waiters.append(Waiter(answer, thing, is_adding))


def drop(handle: Handle) -> None:
    """Take the handle's references away, whatever it was after."""
    disk = handle.disk
    handle.is_gone = True
    disk.handles.pop(handle, None)
    disk.active.pop(handle, None)
    leave_mount(handle)
    disk.left.append(handle)


def leave_mount(handle: Handle) -> None:
    """The handle holds the disk alone from now on, if that."""
    if handle.mount is not None:
        handle.mount.handles.pop(handle, None)
        handle.mount = None
    note(handle)


def lose(handle: Handle, reason: str) -> None:
    """What the handle holds is there no more; the first reason stands."""
    handle.lost = handle.lost or reason
    note(handle)


def note(handle: Handle) -> None:
    """Something changed of the handle that is to be written down."""
    if handle.disk.changed is not None:
        handle.disk.changed[handle] = None


def forget(disk: DiskState, reason: str) -> None:
    """Nothing is attached or mounted any more, and nobody holds it; grants are yet to revoke."""
    disk.fact, disk.closing = NO, True
    for handle in list(disk.handles):
        lose(handle, reason)
        complete(handle)
    for mount in list(disk.mounts.values()):
        forget_mount(disk, mount)


def retry_orphans(disk: DiskState) -> None:
    """Let the clean-up of guest mounts that nobody owns be tried once more."""
    for mount in disk.mounts.values():
        mount.stalled = False


def retry(disk: DiskState) -> None:
    """Let what nobody owns be undone once more."""
    disk.stalled = False
    retry_orphans(disk)


def halt(disk: DiskState) -> None:
    """Begin no undoing step on nobody's behalf any more."""
    disk.stalled = True
    for mount in disk.mounts.values():
        mount.stalled = True


def settle(disk: DiskState) -> None:
    """Answer everyone who can be answered by the facts as they are."""
    if disk.active:
        _settle_handles(disk)
    if disk.mounts:
        _settle_mounts(disk)
    if disk.current is None:
        if disk.fact is NO:
            _settle_detached(disk)
        elif disk.closing and is_unharmed(disk) and not has_driver(disk):
            disk.closing = False
    if disk.failures:
        disk.failures = [f for f in disk.failures if not _answer_failure(disk, f)]
    if disk.waiters:
        disk.waiters = [w for w in disk.waiters if not _answer_waiter(disk, w)]


def is_on_its_way(disk: DiskState) -> bool:
    """At a glance: what there is of a disk is one caller's, whose answer takes more steps."""
    if disk.waiters or disk.failures or len(disk.handles) != 1:
        return False
    (handle,) = disk.handles
    thing = handle.mount or disk
    if thing.fact is (NO if handle.is_live else YES) or handle.answer.done():
        return False
    return len(disk.mounts) == (thing is not disk)


def _settle_mounts(disk: DiskState) -> None:
    """Forget those that are not there, and that nobody is after."""
    changing = None if disk.current is None else disk.current[1]
    for mount in tuple(disk.mounts.values()):
        if mount.fact is NO and not mount.handles and mount is not changing:
            forget_mount(disk, mount)


def _settle_detached(disk: DiskState) -> None:
    """Nothing is attached: before an attach, or at the end."""
    if not disk.handles:  # nothing is left to do but revokes
        disk.closing = disk.vacated = True
    if disk.closing and not disk.grants:
        disk.is_gone = disk.vacated = True
        for handle in tuple(disk.handles):
            complete(handle)


def _settle_handles(disk: DiskState) -> None:
    for handle in tuple(disk.active):
        if handle.answer.done():  # its caller was cancelled, or had an error
            if handle.is_live:
                del disk.active[handle]
            else:
                drop(handle)
    for handle in tuple(disk.active):
        mount = handle.mount
        if not handle.is_live:
            if (
                disk.fact is YES
                and (mount is None or mount.fact is YES)
                and (not handle.vm_id or is_granted(disk, handle.vm_id))
            ):
                handle.is_live = True
                note(handle)
                del disk.active[handle]
                handle.answer.set_result(None)
            continue
        # A mount that is not there is to be made again for who keeps it, and for nobody else.
        if mount is not None and (len(mount.handles) > 1 or mount.fact is NO):
            leave_mount(handle)
            mount = None
        if mount is None and len(disk.handles) > 1:
            complete(handle)


def is_granted(disk: DiskState, vm_id: str) -> bool:
    grant = disk.grants.get(vm_id)
    return grant is not None and grant.fact is YES


def complete(handle: Handle) -> None:
    drop(handle)
    _resolve(handle.answer)


def _resolve(answer: Answer) -> None:
    if not answer.done():
        answer.set_result(None)


def forget_mount(disk: DiskState, mount: MountState) -> None:
    del disk.mounts[mount.config]
    disk.unmounted.append(mount)


def has_work(disk: DiskState) -> bool:
    """Whether there may be a step to take; no more than a hint, and quickly told."""
    if disk.active or disk.waiters or not disk.handles:
        return True
    return any(not mount.handles or mount.fact is NO for mount in disk.mounts.values())


def has_driver(disk: DiskState) -> bool:
    if disk.waiters or any(handle.is_releasing for handle in disk.active):
        return True
    return not (disk.handles or disk.stalled)


def is_unharmed(disk: DiskState) -> bool:
    """Has an owner, and its teardown did nothing yet that cannot be shared.

    A guest mount without an owner is no part of it.
    """
    if disk.fact is not YES or not disk.handles:
        return False
    return not any(m.fact is MAYBE and m.handles for m in disk.mounts.values())


def _answer_failure(disk: DiskState, failure: Failure) -> bool:
    mount = failure.mount
    if not disk.handles:
        is_over = disk.is_gone or disk.stalled  # stalled with one guest mount, or before it
    else:
        is_over = mount is None or disk.mounts.get(mount.config) is not mount or mount.stalled
    if not is_over:
        return False
    if not failure.answer.done():
        failure.answer.set_exception(failure.error)
    return True


def _answer_waiter(disk: DiskState, waiter: Waiter) -> bool:
    thing = waiter.thing
    if isinstance(thing, MountState):
        is_held = bool(thing.handles) and not (thing.closing or thing.is_due)
        over = disk.mounts.get(thing.config) is not thing or is_held
    else:
        over = bool(disk.handles) and not disk.closing
    if over or disk.is_gone:
        _resolve(waiter.answer)
    return waiter.answer.done()


def fail_adding(
    disk: DiskState, handles: Iterable[Handle], error: BaseException, mount: MountState | None
) -> None:
    errors = one_each(error)
    for handle in handles:
        if not handle.is_live and not handle.answer.done():
            disk.failures.append(Failure(handle.answer, next(errors), mount))
            drop(handle)


def fail_waiters(disk: DiskState, thing: Thing, error: BaseException) -> None:
    """What they wait for cannot be had."""
    errors = one_each(error)
    for waiter in disk.waiters:
        if waiter.thing is thing and not waiter.answer.done():
            waiter.answer.set_exception(next(errors))


def one_each(error: BaseException) -> Iterator[BaseException]:
    """The error itself for the first, then copies chained to it: nobody shares an object."""
    yield error
    while True:
        try:
            own = copy.copy(error)
            own.args = error.args  # its class may put other words around what it is given
        except Exception:
            own = BackendError(f"{type(error).__name__}: {error}")
        own.__cause__ = error
        if hasattr(error, "__notes__"):
            own.__notes__ = list(error.__notes__)
        yield own
