"""A compute system in memory: what it is asked, and answers as a test scripts them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hotlun.hcs.results import failure
from hotlun.hcs.system import StillRunningError

if TYPE_CHECKING:
    from collections.abc import Mapping

    Document = Mapping[str, Any]

NOT_FOUND, TAKEN = 0x80070490, 0x800700B7


class MemorySystem:
    """A `System` that keeps what is attached, by resource path, and all that it was sent.

    Attributes:
        documents: of `modify`, in order.
        attached: the settings by resource path.
        access: the (vm_id, path) pairs granted, in order of all calls in `access_calls`.
        told: more members of the properties that it tells.
    """

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.attached: dict[str, Document] = {}
        self.access: set[tuple[str, str]] = set()
        self.access_calls: list[tuple[str, str, str]] = []
        self.queries: list[Document] = []
        self.told: dict[str, Any] = {}
        self.is_closed = False
        self._script: list[_Turn] = []

    def refuse(self, code: int, document: str = "") -> None:
        """Answer the next call with this HRESULT."""
        self._script.append(_Turn(error=failure(code, document)))

    def answer(self) -> None:
        """Answer the next call as ever; what is scripted next is for the one behind it."""
        self._script.append(_Turn())

    def lose(self, error: Exception) -> None:
        """Raise this from the next call."""
        self._script.append(_Turn(error=error))

    def hang(self) -> asyncio.Future[Exception | None]:
        """Have the next call go on for longer than anybody waits, until this is settled."""
        outcome: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._script.append(_Turn(outcome=outcome))
        return outcome

    def stall(self) -> asyncio.Event:
        """Have the next call wait for this."""
        gate = asyncio.Event()
        self._script.append(_Turn(gate=gate))
        return gate

    async def modify(self, document: Document) -> None:
        self.documents.append(document)
        await self._turn(document)
        self._carry_out(document)

    async def properties(self, query: Document) -> dict[str, Any]:
        self.queries.append(query)
        await self._turn()
        return {"Id": "vm", "SystemType": "VirtualMachine", **self.told}

    async def grant_vm_access(self, vm_id: str, path: str) -> None:
        self.access_calls.append(("grant", vm_id, path))
        await self._turn()
        self.access.add((vm_id, path))

    async def revoke_vm_access(self, vm_id: str, path: str) -> None:
        self.access_calls.append(("revoke", vm_id, path))
        await self._turn()
        self.access.discard((vm_id, path))

    async def close(self) -> None:
        self.is_closed = True

    async def _turn(self, document: Document | None = None) -> None:
        await asyncio.sleep(0)
        if not self._script:
            return
        turn = self._script.pop(0)
        if turn.gate is not None:
            await turn.gate.wait()
        if turn.error is not None:
            raise turn.error
        if turn.outcome is not None:
            if document is not None:
                turn.outcome.add_done_callback(
                    lambda done: None if done.result() else self._carry_out(document)
                )
            raise StillRunningError("scripted: it goes on", turn.outcome)

    def _carry_out(self, document: Document) -> None:
        path = document.get("ResourcePath")
        if path is None:
            return
        if document["RequestType"] == "Add":
            if path in self.attached:
                raise failure(TAKEN)
            self.attached[path] = document["Settings"]
        elif self.attached.pop(path, None) is None:
            raise failure(NOT_FOUND)


class _Turn:
    def __init__(
        self,
        *,
        error: Exception | None = None,
        gate: asyncio.Event | None = None,
        outcome: asyncio.Future[Exception | None] | None = None,
    ) -> None:
        self.error = error
        self.gate = gate
        self.outcome = outcome
