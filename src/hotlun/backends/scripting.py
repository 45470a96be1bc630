"""What a test wants of a backend in memory: scripted faults, a record of calls, told events."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hotlun.errors import OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hotlun.backends.base import Listener
    from hotlun.events import Event
    from hotlun.model import Attachment, Disk, GuestMount


class Call(NamedTuple):
    """One call that reached a backend, and what it was about."""

    operation: str
    subject: Attachment | GuestMount | tuple[Disk, str] | tuple[Attachment | GuestMount, ...]
    """A grant is of a disk to a VM, a survey of any number of attachments and mounts."""


@dataclass
class _Fault:
    calls_left: int
    error: BaseException | None = None
    happens: bool = False
    gate: Gate | None = None


@dataclass
class Gate:
    """Where a stalled call waits; `reached` is set when it has come, `open()` lets it go on."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    _opened: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self) -> None:
        self._opened.set()

    async def _pass(self) -> None:
        self.reached.set()
        await self._opened.wait()


class Script:
    """The faults of one backend, what it was asked, and who hears of what happens there."""

    _operations: frozenset[str] = frozenset()

    def __init__(self, delay: float) -> None:
        self.calls: list[Call] = []
        """Every call so far, oldest first."""
        self.violations: list[str] = []
        """What was asked for and can never be right."""
        self.effects: Counter[str] = Counter()
        """How many calls of each operation changed something."""
        self._delay = delay
        self._faults: dict[str, list[_Fault]] = {}
        self._gates: list[Gate] = []
        self._listeners: dict[object, Listener] = {}
        self._has_ended = False
        """The VM: only what needs none can be done still."""

    def fail(self, operation: str, error: BaseException, *, at: int = 1) -> None:
        """The `at`-th call from now raises this, and nothing happens."""
        self._add(operation, _Fault(at, error))

    def lose(self, operation: str, *, happened: bool = False, at: int = 1) -> None:
        """The `at`-th call from now raises `OutcomeUnknownError`, whether it happened or not."""
        error = OutcomeUnknownError(f"the reply to {operation} was lost", operation=operation)
        self._add(operation, _Fault(at, error, happens=happened))

    def stall(self, operation: str, *, at: int = 1) -> Gate:
        """The `at`-th call from now waits at the gate that is returned, before anything happens."""
        gate = Gate()
        self._gates.append(gate)
        self._add(operation, _Fault(at, gate=gate))
        return gate

    def clear_faults(self) -> None:
        """Forget the faults whose call has not come yet, and open every gate."""
        self._faults.clear()
        for gate in self._gates:
            gate.open()

    def watch(self, listener: Listener) -> Callable[[], None]:
        """Have the listener hear of each event from now on, until what is returned is called."""
        token = object()
        self._listeners[token] = listener

        def stop() -> None:
            self._listeners.pop(token, None)

        return stop

    def tell(self, event: Event) -> None:
        """Let whoever listens hear that this has happened."""
        for listener in tuple(self._listeners.values()):
            listener(event)

    def count(self, operation: str) -> int:
        """How many calls of this operation have come."""
        return sum(call.operation == operation for call in self.calls)

    def _add(self, operation: str, fault: _Fault) -> None:
        if operation not in self._operations:
            known = ", ".join(sorted(self._operations))
            raise ValueError(f"no operation {operation!r} here: {known}")
        if fault.calls_left < 1:
            raise ValueError("calls are counted from 1")
        self._faults.setdefault(operation, []).append(fault)

    async def _enter(self, call: Call) -> BaseException | None:
        """Pass the faults for this call.

        Returns an error to raise after the effect, if the effect happens and
        its reply is lost.
        """
        self.calls.append(call)
        if self._has_ended and call.operation not in ("grant_access", "revoke_access"):
            raise VMGoneError(
                "the VM is gone, and nothing is attached to it any more: forget its disks",
                operation=call.operation,
            )
        due = self._due(call.operation) if self._faults else ()
        if self._delay:
            await asyncio.sleep(self._delay)
        if not due:
            return None
        for fault in due:
            if fault.gate is not None:
                await fault.gate._pass()
            if fault.error is not None and not fault.happens:
                raise fault.error
        return next((fault.error for fault in due if fault.error is not None), None)

    def _due(self, operation: str) -> list[_Fault]:
        """The faults of this call."""
        due = []
        for fault in self._faults.get(operation, ()):
            fault.calls_left -= 1
            if not fault.calls_left:
                due.append(fault)
        if due:
            left = self._faults[operation]
            self._faults[operation] = [fault for fault in left if fault.calls_left > 0]
        return due

    def _violated(self, what: str) -> AssertionError:
        self.violations.append(what)
        return AssertionError(what)
