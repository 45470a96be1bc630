"""KVM if it really boots a kernel here, TCG otherwise; tried once, then remembered.

The existence of /dev/kvm proves nothing: on a host that itself is a VM without
nested virtualisation, QEMU opens the device and the guest hangs. So the kernel
and the initramfs are started once under KVM and have a few seconds to say that
they are alive.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

from hotlun.errors import UnsupportedError
from hotlun.vm.cache import cache_directory, fingerprint
from hotlun.vm.hardware import (
    Accelerator,
    boot_arguments,
    console_arguments,
    machine_arguments,
)
from hotlun.vm.process import QEMU, Process, Runtime

if TYPE_CHECKING:
    from hotlun.vm.image import Image

log = logging.getLogger("hotlun.vm")

PROBE_TIMEOUT = 5.0
"""Seconds for a kernel to come up under KVM; where KVM works it takes one or two."""
ALIVE = b"hotlun: alive"


def qemu_fingerprint() -> str:
    """Which QEMU this is: asking it for its version would cost a tenth of a restore.

    Raises:
        UnsupportedError: there is none.
    """
    path = shutil.which(QEMU)
    if path is None:
        raise UnsupportedError(f"there is no {QEMU}: install the package qemu-system-x86")
    facts = os.stat(path)
    return fingerprint(os.path.realpath(path), str(facts.st_size), str(facts.st_mtime_ns))


async def working_accelerator(image: Image) -> Accelerator:
    """The fastest accelerator that boots `image` on this machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Accelerator.TCG
    host = os.uname()
    key = fingerprint(host.nodename, host.release, qemu_fingerprint(), image.key)
    directory = os.path.join(cache_directory(), "accelerator")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    memory = os.path.join(directory, key)
    try:
        return Accelerator(_read(memory))
    except (FileNotFoundError, ValueError):
        log.info("trying whether KVM boots a kernel here")
    found = Accelerator.KVM if await _boots_under_kvm(image) else Accelerator.TCG
    log.info("this machine runs guests with %s", found.value)
    _write(memory, found)
    return found


async def _boots_under_kvm(image: Image) -> bool:
    with tempfile.TemporaryDirectory(prefix="hotlun-probe-") as directory:
        runtime = Runtime(directory)
        arguments = [
            *machine_arguments(Accelerator.KVM, 256, 1),
            *boot_arguments(image.kernel, image.initramfs, "hotlun.probe"),
            *console_arguments(runtime.console),
        ]
        process = await Process.start(arguments, runtime)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                await process.exited.wait()
        except TimeoutError:
            return False
        finally:
            process.kill()
            await process.end()
        return ALIVE in _read(runtime.console).encode()


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
