"""The Host Compute Service as far as disks go, with a VM of the project's own behind it.

It has nothing but the text of a document to go by, holds that against `hcs_grammar`, and carries
it out in QEMU and in the real guest. What it answers is an HRESULT with the service's document
of an error, as the real library gives it. What was not as it has to be is in `violations`.

What is assumed of the real one, as nobody has written it down: that requests for one slot are
carried out one after another (those for the guest apart), and that a Remove takes out whatever
is there, whoever has put it there.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from support import hcs_grammar
from support.hcs_answers import (
    CONNECT_FAILED,
    CONNECTION_CLOSED,
    CORRUPT,
    EXISTS,
    FAIL,
    INVALID_JSON,
    NO_ACCESS,
    NO_FILE,
    NOT_FOUND,
    SERVICE_DISCONNECT,
    SHARING,
    STOPPED,
    compact,
    listing,
    refuse,
)
from support.hcs_grammar import GuestRequest, InvalidDocumentError, ResourceRequest
from support.late import Late

from hotlun import Attachment, Disk, DiskKind, ImageFormat, Slot
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.codes import is_failure
from hotlun.bridge.messages import PROTOCOL_VERSION
from hotlun.errors import BackendError, OutcomeUnknownError, SlotTakenError, VMGoneError
from hotlun.hcs.system import StillRunningError
from hotlun.model import Presence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from hotlun.vm import Machine

ID = "hotlun-on-qemu"
RUNTIME_ID = "6a8d2f50-6f0e-4c55-9a39-3a1c8f6b2e11"
USER = "65534"
"""Whom the VM runs as: who may open what `ID` was granted."""
TIMEOUT = 60.0
"""Seconds for whatever is waited for."""

_WORDS = {
    "Failed to get": SHARING,
    "Permission denied": NO_ACCESS,
    "No such file": NO_FILE,
}
"""QEMU's own -> the code for it."""


class HCSOnQEMU:
    """A `System` whose disks are real; made by `serving`.

    Attributes:
        vm: the machine behind it.
        own: the QEMU ids of the devices that are the VM's own, by slot.
        documents: the text of all that was asked to be modified, in order.
        violations: what was asked and must not be.
        attached: what is there by our doing.
        lists_disks: whether it answers what is attached when it is asked for that.
    """

    def __init__(
        self, host: QEMUHostBackend, guest: BridgeConnection, own: Mapping[Slot, str], vm: Machine
    ) -> None:
        self.vm = vm
        self._host = host
        self._guest = guest
        self.own = dict(own)
        self._granted: dict[str, Disk] = {}
        self._locks: defaultdict[tuple[Slot, type], asyncio.Lock] = defaultdict(asyncio.Lock)
        self._stalled: list[Late] = []
        self._late: dict[str, Late] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._made = 0
        self.documents: list[str] = []
        self.violations: list[str] = []
        self.attached: dict[Slot, Attachment] = {}
        self.lists_disks = True

    @classmethod
    @asynccontextmanager
    async def serving(
        cls, vm: Machine, own: Mapping[Slot, str] | None = None
    ) -> AsyncIterator[HCSOnQEMU]:
        """For a machine that was started without backends.

        Args:
            vm: the machine.
            own: the QEMU ids of the devices that are the VM's own, by slot.
        """
        async with (
            QEMUHostBackend.connect(
                vm.qmp_socket, controllers=vm.controllers, timeout=TIMEOUT
            ) as host,
            BridgeConnection.connect_unix(vm.agent_socket, timeout=TIMEOUT) as guest,
        ):
            system = cls(host, guest, own or {}, vm)
            try:
                yield system
            finally:
                await system.close()

    def stall(self, verb: str, *, is_done_first: bool = False, times_out: bool = True) -> Late:
        """Have the next such request wait until it is settled.

        Args:
            verb: of the backends: `"attach"`, `"mount"`...
            is_done_first, times_out: see `Late`.
        """
        late = self._late[verb] = Late(is_done_first=is_done_first, times_out=times_out)
        self._stalled.append(late)
        return late

    async def modify(self, document: Mapping[str, Any]) -> None:
        text = compact(document)
        self.documents.append(text)
        try:
            request = hcs_grammar.read(text, self._guest.features)
        except InvalidDocumentError as error:
            self._refuse_wrong(text, error)
        late = self._late.pop(request.verb, None)
        task = asyncio.create_task(self._carry_out(request, late), name=f"service {request.verb}")
        self._tasks.add(task)
        outcome: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        task.add_done_callback(lambda done: self._has_ended(done, outcome, late))
        limit = TIMEOUT
        if late is not None:
            late.begun.set()
            limit = 0 if late.times_out else limit
        await asyncio.wait({task}, timeout=limit)  # which cancels nothing, whoever is cancelled
        if not task.done():
            raise StillRunningError("no answer within the time that was allowed", outcome)
        task.result()

    async def properties(self, query: Mapping[str, Any]) -> dict[str, Any]:
        text = compact(query)
        try:
            wanted = hcs_grammar.read_query(text)
        except InvalidDocumentError as error:
            self._refuse_wrong(text, error)
        there = await self._there()
        found: dict[str, Any] = {
            "Id": ID,
            "SystemType": "VirtualMachine",
            "RuntimeId": RUNTIME_ID,
            "RuntimeOsType": "Linux",
            "State": "Running",
        }
        for name in wanted:
            if name == "GuestConnection":
                told = self._guest.capabilities.fields.document
                found["GuestConnectionInfo"] = {
                    "SupportedSchemaVersions": told["SupportedSchemaVersions"],
                    "ProtocolVersion": PROTOCOL_VERSION,
                    "GuestDefinedCapabilities": told["GuestDefinedCapabilities"],
                }
            elif name != "MappedVirtualDisk":
                self._refuse_wrong(text, f"no property is called {name!r}")
            elif self.lists_disks:
                found["MappedVirtualDiskControllers"] = listing(there)
        return json.loads(compact(found))  # type: ignore[no-any-return]

    async def grant_vm_access(self, vm_id: str, path: str) -> None:
        self._check_vm(vm_id)
        if not os.path.exists(path):
            refuse(NO_FILE)
        disk = Disk(path, DiskKind.VIRTUAL_DISK, format=_format(path))
        await self._host.grant_access(disk, USER)
        self._granted[path] = disk

    async def revoke_vm_access(self, vm_id: str, path: str) -> None:
        self._check_vm(vm_id)
        disk = self._granted.pop(path, None)
        if disk is not None:
            await self._host.revoke_access(disk, USER)

    async def close(self) -> None:
        for late in self._stalled:  # of a test that has failed
            late.settle()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _has_ended(
        self,
        task: asyncio.Task[None],
        outcome: asyncio.Future[Exception | None],
        late: Late | None,
    ) -> None:
        self._tasks.discard(task)
        error = task.exception()
        assert error is None or isinstance(error, Exception)
        outcome.set_result(error)
        if late is not None:
            late.ended.set()

    # --- Carrying out ---

    async def _carry_out(self, request: ResourceRequest | GuestRequest, late: Late | None) -> None:
        try:
            async with self._locks[request.slot, type(request)]:
                if late is not None and not late.is_done_first:
                    await late.wait()
                if isinstance(request, GuestRequest):
                    await self._relay(request)
                elif request.is_add:
                    await self._add(request)
                else:
                    await self._remove(request.slot)
        except VMGoneError as error:
            refuse(STOPPED, str(error))
        finally:
            if late is not None and late.is_done_first:
                late.done.set()
                await late.wait()

    async def _add(self, request: ResourceRequest) -> None:
        slot, path = request.slot, request.path
        if slot in self.attached or slot in self.own:
            refuse(EXISTS, f"slot {slot} holds a disk")
        if request.kind is not DiskKind.EXTENSIBLE_VIRTUAL_DISK and not os.path.exists(path):
            refuse(NO_FILE, path)
        self._made += 1
        is_image = request.kind is DiskKind.VIRTUAL_DISK
        disk = Disk(
            path,
            request.kind,
            request.read_only,
            request.provider,
            _format(path) if is_image else None,
        )
        attachment = Attachment(slot, disk, f"service{self._made}")
        try:
            await self._host.attach(attachment)
        except SlotTakenError as error:
            refuse(EXISTS, str(error))
        except OutcomeUnknownError as error:
            refuse(SERVICE_DISCONNECT, str(error))
        except VMGoneError:
            raise
        except BackendError as error:
            words = f"{error.detail or error}"
            code = next((code for told, code in _WORDS.items() if told in words), None)
            refuse(code or (CORRUPT if "image" in str(error) else FAIL), words)
        self.attached[slot] = attachment

    async def _remove(self, slot: Slot) -> None:
        if slot in self.own:
            self.violations.append(f"the VM's own device at slot {slot} was removed")
            await self.vm.query("device_del", {"id": self.own.pop(slot)})
            return
        attachment = self.attached.get(slot)
        if attachment is None:
            refuse(NOT_FOUND, f"slot {slot} is empty")
        try:
            await self._host.detach(attachment)
        except OutcomeUnknownError as error:
            refuse(SERVICE_DISCONNECT, str(error))
        except VMGoneError:
            raise
        except BackendError as error:
            refuse(FAIL, str(error))
        del self.attached[slot]

    async def _relay(self, request: GuestRequest) -> None:
        try:
            answer = await self._guest.modify(request.document)
        except OutcomeUnknownError as error:
            refuse(CONNECTION_CLOSED, str(error))
        except VMGoneError:
            raise
        except BackendError as error:
            refuse(CONNECT_FAILED, str(error))
        if is_failure(answer.code):
            refuse(answer.code, answer.text)

    async def _there(self) -> dict[Slot, str]:
        """The paths of what QEMU says is there, and the VM's own."""
        attached = dict(self.attached)
        try:
            seen = await self._host.survey(attached.values())
        except VMGoneError as error:
            refuse(STOPPED, str(error))
        paths = {slot: f"C:\\own\\{name}.vhdx" for slot, name in self.own.items()}
        for slot, attachment in attached.items():
            if seen[attachment.serial] is Presence.PRESENT:
                paths[slot] = attachment.disk.path
        return paths

    def _check_vm(self, vm_id: str) -> None:
        if vm_id != ID:
            self._refuse_wrong(vm_id, "access is given to VMs by their id")

    def _refuse_wrong(self, text: str, problem: object) -> NoReturn:
        self.violations.append(f"{problem}: {text}")
        refuse(INVALID_JSON, str(problem))


def _format(path: str) -> ImageFormat:
    """By its suffix, as the service tells them."""
    return ImageFormat.VHDX if path.lower().endswith(".vhdx") else ImageFormat.VHD
