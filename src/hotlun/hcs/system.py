"""What a VM of the Host Compute Service is to the backends: five methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from hotlun.errors import OutcomeUnknownError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    Document = Mapping[str, Any]


@runtime_checkable
class System(Protocol):
    """One compute system that runs, and whose documents these are.

    Every method may be called side by side with every other one. A call that is cancelled
    goes on: it may or may not happen.

    Each raises `BackendError` where the service refused (`code` is its HRESULT as an unsigned
    number, `detail` its own words): then nothing was done. `OutcomeUnknownError` says that it
    may have been done; if it still goes on, that is a `StillRunningError`.
    """

    async def modify(self, document: Document) -> None:
        """Have the service carry out a ModifySettingRequest."""

    async def properties(self, query: Document) -> dict[str, Any]:
        """The properties that a PropertyQuery asks for; `{}` is the service's own choice."""

    async def grant_vm_access(self, vm_id: str, path: str) -> None:
        """Let the VM with this id of the service open the file."""

    async def revoke_vm_access(self, vm_id: str, path: str) -> None:
        """Take that back."""

    async def close(self) -> None:
        """Let go of the system, which goes on; what is under way is seen through."""


def check_system(system: System) -> None:
    """Whether that is one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(system, System):
        raise TypeError(f"not a System, as `open_system` gives it: {system!r}")


class StillRunningError(OutcomeUnknownError):
    """The time is over, and the service has not ended the operation, which goes on.

    Args:
        message: see `HotlunError`.
        outcome: done when the operation has ended: None if it succeeded, or its error.
    """

    def __init__(self, message: str, outcome: asyncio.Future[Exception | None]) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class SystemInfo:
    """What the service says of a compute system; `""` for what it does not say.

    Args:
        id: what `open_system` and `vm_id` take.
        kind: `"VirtualMachine"` or `"Container"` (HCS: SystemType).
        runtime_id: the GUID that Hyper-V sockets know the VM by.
        os_type: what runs in it, in lower case, `"linux"` or `"windows"`.
        owner: who made it, in its own words.
        state: `"Running"`, for instance.
    """

    id: str
    kind: str = ""
    runtime_id: str = ""
    os_type: str = ""
    owner: str = ""
    state: str = ""

    @classmethod
    def read(cls, properties: Document) -> Self:
        """From the properties of a system; what is no text in them counts as not said."""

        def text(name: str) -> str:
            value = properties.get(name)
            return value if isinstance(value, str) else ""

        return cls(
            id=text("Id"),
            kind=text("SystemType"),
            runtime_id=text("RuntimeId"),
            os_type=text("RuntimeOsType").lower(),
            owner=text("Owner"),
            state=text("State"),
        )
