"""A small VM to try hotlun on: built from Debian packages, booted once, restored ever after.

Needs QEMU, apt and dpkg on an x86-64 host; no root. `Machine.start` is the way in;
`start_detached` and its siblings are for VMs that outlive the process.
"""

import socket

if not hasattr(socket, "AF_UNIX"):
    raise ImportError(
        "hotlun.vm runs QEMU, on Linux alone: docs/windows.md says how to reach a VM of Hyper-V",
        name=__name__,
    )

from hotlun.vm.errors import MachineError
from hotlun.vm.guest_exec import Completed
from hotlun.vm.hardware import Accelerator
from hotlun.vm.machine import Machine
from hotlun.vm.registry import (
    RunningMachine,
    find_machine,
    list_machines,
    start_detached,
    stop,
)

__all__ = [
    "Accelerator",
    "Completed",
    "Machine",
    "MachineError",
    "RunningMachine",
    "find_machine",
    "list_machines",
    "start_detached",
    "stop",
]
