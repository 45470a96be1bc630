"""One QEMU process: started with its sockets already listening, watched, ended.

The unix sockets are made here and inherited, so a client can connect the moment
the process exists, and a QEMU that fails closes the connection instead of
leaving a client to wait for a socket file that never appears.

An *attached* QEMU is our child and is killed by the kernel if we die first. A
*detached* one is for the command line: it outlives us, known by its pid file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from typing import IO, TYPE_CHECKING

from hotlun.errors import UnsupportedError
from hotlun.vm.errors import MachineError
from hotlun.vm.hardware import SOCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

QEMU = "qemu-system-x86_64"
END_TIMEOUT = 5.0
"""Seconds for QEMU to flush and close its disks after SIGTERM, before SIGKILL."""


class Runtime:
    """The directory of one running VM, and the names of the files in it."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.console = os.path.join(directory, "console.log")
        self.stderr = os.path.join(directory, "qemu.log")
        self.initramfs = os.path.join(directory, "initramfs")
        self.pid_file = os.path.join(directory, "qemu.pid")

    def socket(self, name: str) -> str:
        """The path of one of the SOCKETS."""
        return os.path.join(self.directory, f"{name}.sock")

    def open_stderr(self) -> IO[bytes]:
        """The file that QEMU's complaints go to."""
        return open(self.stderr, "ab")

    def daemon_pid(self) -> int:
        """The pid of a detached QEMU, as it wrote it down itself."""
        with open(self.pid_file, encoding="ascii") as file:
            return int(file.read())

    def clear(self) -> None:
        """Remove the files of a VM that is gone, so that another can be started here."""
        for entry in os.scandir(self.directory):
            os.unlink(entry.path)

    def last_words(self) -> str:
        """What QEMU and the guest's console said at the end, for an error message."""
        parts = []
        for title, path in (("QEMU", self.stderr), ("the guest's console", self.console)):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
                text = file.read().decode(errors="replace").strip()
                parts.append(f"{title} said: {text}" if text else f"{title} said nothing")
        return "; ".join(parts)


class Process:
    """A running QEMU, held by a pidfd: its pid cannot come to mean somebody else.

    `exited` is set when it has ended, whoever ended it.
    """

    def __init__(
        self, pid: int, runtime: Runtime, child: asyncio.subprocess.Process | None
    ) -> None:
        self.pid = pid
        self.runtime = runtime
        self.exited = asyncio.Event()
        self._child = child
        self._loop = asyncio.get_running_loop()
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = -1
            self.exited.set()
        else:
            self._loop.add_reader(self._descriptor, self._ended)

    @classmethod
    async def start(
        cls, arguments: Sequence[str], runtime: Runtime, *, descriptors: Sequence[int] = (),
        detached: bool = False,
    ) -> Process:  # fmt: skip
        """Start QEMU with `arguments`, inheriting `descriptors`.

        Raises:
            UnsupportedError: there is no QEMU.
            MachineError: a detached QEMU did not accept its arguments. (An
                attached one is found out by its exit.)
        """
        if shutil.which(QEMU) is None:
            raise UnsupportedError(f"there is no {QEMU}: install the package qemu-system-x86")
        argv = [QEMU, *arguments]
        if detached:
            argv += ["-daemonize", "-pidfile", runtime.pid_file]
        elif setpriv := shutil.which("setpriv"):
            argv = [setpriv, "--pdeathsig", "KILL", "--", *argv]
        with runtime.open_stderr() as stderr:
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                pass_fds=tuple(descriptors),
                start_new_session=True,  # a Ctrl-C at the terminal is ours to handle, not QEMU's
            )
        if not detached:
            return cls(child.pid, runtime, child)
        code = await cls._daemonized(child, runtime)
        if code != 0:
            raise MachineError(
                f"QEMU did not start (exit status {code}): {runtime.last_words()}",
                operation="start",
                detail=runtime.last_words(),
            )
        return cls(runtime.daemon_pid(), runtime, None)

    @classmethod
    async def _daemonized(cls, child: asyncio.subprocess.Process, runtime: Runtime) -> int:
        waiting = asyncio.ensure_future(child.wait())
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # A quarter of a second. Killed before, it would leave its daemon to itself.
            if await waiting == 0:
                await cls(runtime.daemon_pid(), runtime, None).end()
            raise

    async def end(self) -> None:
        """Ask QEMU to end, wait, kill it if it does not. Returns when it is gone."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(END_TIMEOUT):
                await self.exited.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self.exited.wait()
        await self.let_go()

    async def let_go(self) -> None:
        """Watch it no longer. It stays as it is; one that has ended is reaped."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        if self._child is not None and self.exited.is_set():
            await self._child.wait()

    def kill(self) -> None:
        """End it at once, without flushing anything."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def _ended(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self.exited.set()


@contextlib.contextmanager
def listening_sockets(runtime: Runtime) -> Iterator[dict[str, int]]:
    """The VM's sockets, listening; ours are closed when QEMU has inherited them."""
    with contextlib.ExitStack() as stack:
        descriptors = {}
        for name in SOCKETS:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                listener.bind(runtime.socket(name))
            except OSError as error:  # a path of more than 107 bytes, for one
                raise MachineError(f"no socket {runtime.socket(name)}: {error}") from error
            listener.listen(1)
            descriptors[name] = listener.fileno()
        yield descriptors
