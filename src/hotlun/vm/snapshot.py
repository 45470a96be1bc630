"""Warm snapshots: the state of a VM that has booted and has everything at hand.

It is taken from a VM of its own, while no client is connected to any of its
sockets, and loaded into every VM that is started with the same devices: a few
hundred milliseconds instead of as many hundredths of a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import tempfile
import time
from typing import TYPE_CHECKING

from qemu.qmp import QMPError

from hotlun.bridge.client import BridgeConnection
from hotlun.vm.accelerator import qemu_fingerprint
from hotlun.vm.cache import Shelf, fingerprint
from hotlun.vm.errors import MachineError, StaleSnapshotError
from hotlun.vm.guest_exec import GuestExec
from hotlun.vm.hardware import snapshot_arguments
from hotlun.vm.launch import boot, launched
from hotlun.vm.monitor import Monitor
from hotlun.vm.process import Process, Runtime

if TYPE_CHECKING:
    from hotlun.vm.hardware import Hardware
    from hotlun.vm.launch import Software

log = logging.getLogger("hotlun.vm")

KEEP = 6
"""How many are kept. One has about 110 MB; each change of the agent makes a new one."""

_STATE = "state"


class Snapshots:
    """The snapshot of some hardware with some software in it.

    Args:
        hardware: the VM's devices.
        software: the guest's image and agent, the accelerator.
        timeout: seconds for booting, and again for everything up to the snapshot.
    """

    def __init__(self, hardware: Hardware, software: Software, *, timeout: float) -> None:
        self._hardware = hardware
        self._software = software
        self._timeout = timeout
        self._shelf = Shelf("snapshots", keep=KEEP)
        self._key = fingerprint(
            software.image.key,
            software.agent,
            qemu_fingerprint(),
            *snapshot_arguments(hardware, software.accelerator),
        )

    async def find_or_take(self) -> str:
        """The path of the saved state. If there is none, a VM is booted to take it."""
        if (entry := self._shelf.find(self._key)) is None:
            async with self._shelf.lock(self._key):
                if (entry := self._shelf.find(self._key)) is None:
                    entry = await self._take()
        return os.path.join(entry, _STATE)

    def discard(self) -> None:
        """Forget the saved state, so that the next start takes a new one."""
        self._shelf.discard(self._key)

    async def _take(self) -> str:
        log.info("booting a guest to take a snapshot of; this happens once")
        started = time.monotonic()
        with self._shelf.building(self._key) as directory:
            with tempfile.TemporaryDirectory(prefix="hotlun-snapshot-") as scratch:
                runtime = Runtime(scratch)
                process = await boot(
                    self._hardware.plain(), self._software, runtime, timeout=self._timeout
                )
                log.info("the guest was up after %.2f s", time.monotonic() - started)
                try:
                    async with asyncio.timeout(self._timeout):
                        await _warm(runtime, self._timeout)
                        await _save(runtime, os.path.join(directory, _STATE))
                except TimeoutError as error:
                    raise MachineError(
                        f"no snapshot within {self._timeout:g} s; {runtime.last_words()}"
                    ) from error
                finally:
                    await process.end()
            entry = self._shelf.finish(self._key, directory)
        size = os.path.getsize(os.path.join(entry, _STATE))
        log.info(
            "a snapshot of %d MiB was taken after %.2f s", size >> 20, time.monotonic() - started
        )
        return entry


async def restore(
    state: str,
    hardware: Hardware,
    software: Software,
    runtime: Runtime,
    *,
    timeout: float,
    detached: bool = False,
) -> Process:
    """Start a VM from a saved state, and return when its guest runs in the present.

    Raises:
        StaleSnapshotError: QEMU did not take the state, or the guest did not wake up.
        MachineError: QEMU did not start, or all of it took too long.
    """
    started = time.monotonic()
    with open(state, "rb", buffering=0) as file:  # noqa: ASYNC230 - it is only opened here
        async with launched(
            hardware, software, runtime, "-S", "-incoming", "defer",
            timeout=timeout, detached=detached,
        ) as process:  # fmt: skip
            async with Monitor.connect(runtime.socket("control")) as monitor:
                try:
                    await monitor.load(file.fileno())
                    await monitor.execute("cont")
                except (QMPError, MachineError) as error:
                    raise StaleSnapshotError(f"the snapshot was not loaded: {error}") from error
            loaded = time.monotonic()
            await _wake(runtime)
    log.debug(
        "restored the guest: loaded after %.3f s, awake after %.3f s",
        loaded - started,
        time.monotonic() - started,
    )
    return process


async def _warm(runtime: Runtime, timeout: float) -> None:
    guest = await GuestExec.open(runtime.socket("guest"), timeout=timeout)
    try:
        done = await guest.run(["/usr/lib/hotlun/warm"], timeout=timeout)
    finally:
        await guest.close()
    if done.returncode != 0:
        raise MachineError(f"the guest's tools do not work: {done.stderr.strip()[-1000:]}")
    async with BridgeConnection.connect_unix(runtime.socket("agent"), timeout=timeout):
        pass  # it has answered: it is up, and will not be in the middle of starting


async def _save(runtime: Runtime, path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        async with Monitor.connect(runtime.socket("control")) as monitor:
            await monitor.execute("stop")
            await monitor.save(descriptor)
    finally:
        os.close(descriptor)


async def _wake(runtime: Runtime) -> None:
    """Tell the guest what time it is, give it randomness of its own, hear that it has both."""
    try:
        reader, writer = await asyncio.open_unix_connection(runtime.socket("resume"))
        try:
            writer.write(f"{time.time_ns()} {secrets.token_hex(32)}\n".encode())
            answer = await reader.readline()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    except (OSError, ValueError) as error:
        raise StaleSnapshotError(f"the guest did not wake up: {error}") from error
    if answer.strip() != b"ok":
        raise StaleSnapshotError(f"the guest woke up badly: {answer[:200]!r}")
