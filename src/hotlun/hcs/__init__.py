"""The Windows Host Compute Service (HCS): the VMs of Hyper-V, as documents.

    async with open_system("my-vm") as system:
        host = HCSHostBackend(system)

`system` says what a VM is to the backends, `computecore` and `compute_system` reach the real
ones, `results` tells what a code means, and `documents` holds the shapes of what is sent.
Imports everywhere; the service itself is there on Windows only.
"""

from hotlun.hcs.compute_system import enumerate_systems, open_system, revoke_vm_access
from hotlun.hcs.documents import CONTROLLERS, document_slots, hcs_document
from hotlun.hcs.system import StillRunningError, System, SystemInfo

__all__ = [
    "CONTROLLERS",
    "StillRunningError",
    "System",
    "SystemInfo",
    "document_slots",
    "enumerate_systems",
    "hcs_document",
    "open_system",
    "revoke_vm_access",
]
