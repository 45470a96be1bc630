"""VMs that outlive the process that started them, by name: what the command line starts.

Each has a directory with its sockets, its logs and, written last, a note of who it is.
A pid alone does not say that: numbers are used again. So the note has the moment the
process started as well (proc(5): field 22 of /proc/PID/stat).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from hotlun.vm.cache import cache_directory, locked
from hotlun.vm.errors import MachineError
from hotlun.vm.guest_exec import RUN_TIMEOUT, GuestExec
from hotlun.vm.hardware import Hardware
from hotlun.vm.power import power_on
from hotlun.vm.process import Process, Runtime

if TYPE_CHECKING:
    from hotlun.vm.guest_exec import Completed
    from hotlun.vm.hardware import Accelerator

_NOTE = "machine.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


@dataclass(frozen=True)
class RunningMachine:
    """A VM that runs on its own. Each of its sockets serves one client at a time.

    Attributes:
        name: what it was called when it was started.
        directory: where its sockets and logs are.
        pid: QEMU's process id.
        started: when that process started, in clock ticks since the host's boot.
        controllers: the controllers' QEMU device ids, in our order.
        memory_mib, cpus: what it was started with.
    """

    name: str
    directory: str
    pid: int
    started: int
    controllers: tuple[str, ...]
    memory_mib: int
    cpus: int

    @property
    def qmp_socket(self) -> str:
        """The path of QEMU's monitor."""
        return Runtime(self.directory).socket("qmp")

    @property
    def agent_socket(self) -> str:
        """The path of the bridge to the agent."""
        return Runtime(self.directory).socket("agent")

    @property
    def console(self) -> str:
        """The file that the guest's console is written to."""
        return Runtime(self.directory).console

    async def run(self, command: str, *, timeout: float = RUN_TIMEOUT) -> Completed:
        """Run `/bin/sh -c COMMAND` as root in the guest.

        Raises:
            MachineError: the VM does not answer.
            OutcomeUnknownError: the command did not end within `timeout` seconds.
        """
        guest = await GuestExec.open(Runtime(self.directory).socket("guest"), timeout=timeout)
        try:
            return await guest.run(["/bin/sh", "-c", command], timeout=timeout)
        finally:
            await guest.close()


def runtime_directory() -> str:
    """`$XDG_RUNTIME_DIR/hotlun`, or `run` in the cache where there is no such variable."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(base):
        directory = os.path.join(base, "hotlun")
    else:
        directory = os.path.join(cache_directory(), "run")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return directory


async def start_detached(
    name: str,
    controllers: int = 4,
    memory_mib: int = 512,
    cpus: int = 1,
    timeout: float = 120.0,
    *,
    accelerator: Accelerator | None = None,
) -> RunningMachine:
    """Start a VM that goes on when this process ends; the arguments are `Machine.start`'s.

    Raises:
        ValueError: such hardware, or such a name, cannot be had.
        UnsupportedError: something that is needed is not on this machine.
        MachineError: a VM of that name runs already, or it did not come up.
    """
    directory = _directory(name)
    hardware = Hardware(controllers, memory_mib, cpus)
    async with locked(_lock(name)):
        if _read(name) is not None:
            raise MachineError(f"a VM called {name!r} runs already: stop it or choose another name")
        shutil.rmtree(directory, ignore_errors=True)  # of one that has crashed
        os.mkdir(directory, mode=0o700)
        try:
            process = await power_on(
                hardware,
                Runtime(directory),
                timeout=timeout,
                accelerator=accelerator,
                detached=True,
            )
            try:
                return _register(name, hardware, process)
            finally:
                await process.let_go()
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise


def list_machines() -> list[RunningMachine]:
    """The VMs that run, by name."""
    names = sorted(entry.name for entry in os.scandir(runtime_directory()) if entry.is_dir())
    return [machine for name in names if (machine := _read(name)) is not None]


def find_machine(name: str) -> RunningMachine:
    """The running VM of that name.

    Raises:
        MachineError: there is none; the message says which there are.
    """
    machine = _read(name)
    if machine is None:
        running = ", ".join(machine.name for machine in list_machines()) or "none"
        raise MachineError(f"no VM called {name!r} runs; running: {running}")
    return machine


async def stop(name: str) -> None:
    """End the VM of that name, and remove what is left of it.

    Raises:
        MachineError: there is none.
    """
    directory = _directory(name)
    async with locked(_lock(name)):
        try:
            machine = find_machine(name)
        except MachineError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        process = Process(machine.pid, Runtime(directory), None)
        if _start_time(machine.pid) == machine.started:  # now that the pid is held
            await process.end()
        else:
            await process.let_go()
        shutil.rmtree(directory)


def _directory(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a VM's name is up to 32 letters, digits, '-', '_' and '.', not {name!r}")
    return os.path.join(runtime_directory(), name)


def _lock(name: str) -> str:
    return os.path.join(runtime_directory(), f".lock-{name}")


def _register(name: str, hardware: Hardware, process: Process) -> RunningMachine:
    machine = RunningMachine(
        name=name,
        directory=_directory(name),
        pid=process.pid,
        started=_start_time(process.pid),
        controllers=hardware.controller_ids,
        memory_mib=hardware.memory_mib,
        cpus=hardware.cpus,
    )
    note = os.path.join(machine.directory, _NOTE)
    with open(f"{note}.new", "w", encoding="utf-8") as file:
        json.dump(asdict(machine), file)
    os.replace(f"{note}.new", note)
    return machine


def _read(name: str) -> RunningMachine | None:
    """The VM's note, if there is one and its process is still the one that it names."""
    try:
        with open(os.path.join(_directory(name), _NOTE), encoding="utf-8") as file:
            note = json.load(file)
        machine = RunningMachine(**{**note, "controllers": tuple(note["controllers"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return machine if _start_time(machine.pid) == machine.started else None


def _start_time(pid: int) -> int:
    """When the process started; -1 if it has ended, reaped or not."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        # The second field is the program's name, in parentheses, and may contain anything.
        state, *fields = file.read().rpartition(")")[2].split()
        return -1 if state in "ZX" else int(fields[18])
    return -1
