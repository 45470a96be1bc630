"""The real thing behind `System`, and how one is found and opened."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from hotlun.errors import BackendError, HotlunError, OutcomeUnknownError
from hotlun.hcs.calls import in_thread
from hotlun.hcs.computecore import ComputeCore
from hotlun.hcs.system import StillRunningError, SystemInfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from hotlun.hcs.system import Document

_T = TypeVar("_T")
_log = logging.getLogger("hotlun.hcs")

TIMEOUT = 120.0
"""Seconds that a call may take before its outcome counts as unknown."""


@asynccontextmanager
async def open_system(
    system_id: str, *, timeout: float = TIMEOUT, core: ComputeCore | None = None
) -> AsyncIterator[ComputeSystem]:
    """Open a running VM by its id of the service; `async with` it. Leaving ends nothing.

    Takes the rights of an administrator or Hyper-V administrator.

    Args:
        system_id: as `enumerate_systems` shows it; not the VM's name in Hyper-V's manager.
        timeout: seconds for each call, until its outcome counts as unknown.
        core: the library to use; None for this Windows' own.

    Raises:
        ValueError: an id that cannot be one.
        UnsupportedError: this is no Windows with the service.
        BackendError: there is no such VM, or it may not be opened.
        OutcomeUnknownError: the service does not answer.
    """
    if not system_id or "\0" in system_id:
        raise ValueError(f"no VM has this id: {system_id!r}")
    _check_timeout(timeout)
    core = core or ComputeCore.load()
    with _errors_of(f"open the VM {system_id}"):
        handle = await in_thread(
            "open", timeout, partial(core.open_system, system_id), discard=core.close_system
        )
    system = ComputeSystem(core, handle, system_id, timeout)
    try:
        yield system
    finally:
        await system.close()


async def enumerate_systems(
    *,
    kind: str = "VirtualMachine",
    owner: str | None = None,
    timeout: float = TIMEOUT,
    core: ComputeCore | None = None,
) -> list[SystemInfo]:
    """What the service runs now, as far as this user may see it.

    Args:
        kind: `"VirtualMachine"`, `"Container"`, or `""` for both.
        owner: only those that were made under this name; None for all.
        timeout: seconds.
        core: the library to use; None for this Windows' own.

    Raises:
        UnsupportedError: this is no Windows with the service.
        BackendError, OutcomeUnknownError: the service refuses, or does not answer.
    """
    _check_timeout(timeout)
    core = core or ComputeCore.load()
    query = {"Types": [kind] if kind else [], "Owners": [] if owner is None else [owner]}
    text = _compact({name: wanted for name, wanted in query.items() if wanted})
    with _errors_of("list the VMs"):
        answer = await in_thread("enumerate", timeout, partial(core.enumerate, text))
        found = _parsed(answer, list)
    return [SystemInfo.read(one) for one in found if isinstance(one, dict)]


async def revoke_vm_access(
    vm_id: str, path: str, *, timeout: float = TIMEOUT, core: ComputeCore | None = None
) -> None:
    """Take back that a VM may open a file, also of a VM that has ended.

    Args:
        vm_id: the VM's id of the service.
        path: of the file.
        timeout: seconds.
        core: the library to use; None for this Windows' own.

    Raises:
        UnsupportedError: this is no Windows with the service.
        BackendError, OutcomeUnknownError: it was refused, or goes on.
    """
    _check_timeout(timeout)
    core = core or ComputeCore.load()
    await in_thread("revoke", timeout, partial(core.revoke, vm_id, path))


class ComputeSystem:
    """A `System` of this Windows; made by `open_system`.

    Args:
        core: the library.
        handle: of the system; closed when `close` was called and no call has it any more.
        system_id: for logs and errors.
        timeout: seconds for each call.
    """

    def __init__(self, core: ComputeCore, handle: int, system_id: str, timeout: float) -> None:
        self.id = system_id
        self._core = core
        self._handle = handle
        self._timeout = timeout
        self._lock = threading.Lock()  # held for a few instructions, never while anything waits
        self._inside = 0
        """How many calls have the handle."""
        self._is_closed = False

    async def modify(self, document: Document) -> None:
        """Have the service carry out a ModifySettingRequest. Raises as `System`."""
        text = _compact(document)
        await self._call("modify", lambda handle: self._core.modify(handle, text))

    async def properties(self, query: Document) -> dict[str, Any]:
        """The properties that a PropertyQuery asks for. Raises as `System`."""
        text = _compact(query)
        answer = await self._call("properties", lambda handle: self._core.properties(handle, text))
        return _parsed(answer, dict)

    async def grant_vm_access(self, vm_id: str, path: str) -> None:
        """Let the VM `vm_id` open the file. Raises as `System`."""
        await self._call("grant", lambda _: self._core.grant(vm_id, path))

    async def revoke_vm_access(self, vm_id: str, path: str) -> None:
        """Take that back. Raises as `System`."""
        await self._call("revoke", lambda _: self._core.revoke(vm_id, path))

    async def close(self) -> None:
        """Let go of the system; again makes no difference.

        What is under way is seen through, and the handle closed after the last of it.
        """
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
            inside = self._inside
        if was_closed:
            return
        if inside:
            _log.info("%s: closed as soon as %d calls have ended", self.id, inside)
            return
        try:
            await in_thread("close", self._timeout, partial(self._core.close_system, self._handle))
        except StillRunningError as error:
            _log.warning("closing %s: %s", self.id, error)
        except BackendError:  # there is no thread to be had
            self._core.close_system(self._handle)

    async def _call(self, name: str, function: Callable[[int], _T]) -> _T:
        with self._lock:
            if self._is_closed:
                raise BackendError(f"the system {self.id} was closed: open it again")
            self._inside += 1
        _log.debug("%s: %s", self.id, name)
        return await in_thread(
            name, self._timeout, partial(function, self._handle), after=self._leave
        )

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            is_last = self._is_closed and not self._inside
        if is_last:
            self._core.close_system(self._handle)

    def __repr__(self) -> str:
        return f"<ComputeSystem {self.id}{' (closed)' if self._is_closed else ''}>"


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Have errors say what could not be done."""
    try:
        yield
    except (BackendError, OutcomeUnknownError) as error:
        kind: type[HotlunError] = (
            BackendError if isinstance(error, BackendError) else OutcomeUnknownError
        )
        raise kind(f"cannot {what}: {error}", code=error.code, detail=error.detail) from error


def _compact(document: Document) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def _parsed(answer: str, kind: type[_T]) -> _T:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError) as error:
        found = error
    if isinstance(found, kind):
        return found
    raise BackendError(
        f"the service's answer makes no sense: {answer[:200]!r}; it may be of a newer Windows",
        detail=answer[:2000],
    )


def _check_timeout(timeout: float) -> None:
    if not timeout > 0:
        raise ValueError(f"timeout is in seconds, more than 0: {timeout!r}")
