"""The floor of attach.py: QMP's bare commands, sent without waiting, and `thin_guest.c`.

The commands are those that hotlun sends, put together beforehand. Nothing is checked but
that QEMU refuses none of them; nothing is waited for but what the next step needs: a disk's
`device_del` follows the guest's word that it has let it go, and its `blockdev-del` QEMU's
DEVICE_DELETED. One thread on the host, no event loop.
"""

from __future__ import annotations

import base64
import contextlib
import json
import selectors
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hotlun import Attachment, Disk, DiskKind, ImageFormat, Slot
from hotlun.backends.attached import id_of
from hotlun.backends.migration import device_properties
from hotlun.backends.nodes import block_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from hotlun.vm import Machine

SOURCE = Path(__file__).with_name("thin_guest.c")
IN_GUEST = "/run/thin_guest"
CHUNK = 96 << 10
"""Bytes of one argument: Linux takes less than 128 KiB."""
WORKERS = 8
"""Threads in the guest. More than one, as mounting and letting go are mostly waiting."""
PATIENCE = 60.0
"""Seconds for the next word of anybody's; after that something is wrong."""
LUNS = 64
FIRST_DEVICE = 0x10
"""PCI device number of the VM's first controller."""


class Thin:
    """The helper in the guest, and how it is spoken to; `async with` its `install`."""

    def __init__(self, qmp_path: str, port: socket.socket) -> None:
        self._qmp_path = qmp_path
        self._port = Lines(port)

    @classmethod
    @contextlib.asynccontextmanager
    async def install(cls, vm: Machine, workers: int = WORKERS) -> AsyncIterator[Self]:
        """Compile the helper, put it into the guest, and give it a virtio-serial port."""
        with tempfile.TemporaryDirectory() as directory:
            text = base64.b64encode(_compiled(f"{directory}/thin_guest")).decode()
            path = f"{directory}/port"
            for start in range(0, len(text), CHUNK):
                part = text[start : start + CHUNK]
                await in_guest(vm, f"printf %s {part} | base64 -d >>{IN_GUEST}")
            address = {"type": "unix", "data": {"path": path}}
            backend = {"type": "socket", "data": {"addr": address, "wait": False}}
            await vm.query("chardev-add", {"id": "thin", "backend": backend})
            port = {"driver": "virtserialport", "id": "thin", "bus": "ports.0", "nr": 3}
            await vm.query("device_add", {**port, "chardev": "thin", "name": "thin"})
            with socket.socket(socket.AF_UNIX) as connected:
                connected.connect(path)
                await in_guest(
                    vm,
                    f"chmod +x {IN_GUEST}; until [ -e /dev/vport*p3 ]; do sleep 0.01; done\n"
                    f"setsid {IN_GUEST} /dev/vport*p3 {workers} </dev/null >/dev/console 2>&1 &",
                )
                yield cls(vm.qmp_socket, connected)

    def run(self, images: Sequence[str], *, unbind: bool = True) -> tuple[float, float]:
        """Seconds until all are attached and mounted, and until all of them are gone.

        Args:
            unbind: whether each disk loses its driver before it is deleted in the guest.
        """
        disks = [Commands.of(number, image) for number, image in enumerate(images)]
        with Monitor.connect(self._qmp_path) as qmp:
            self._port.send(f"mount {len(disks)}\n".encode())
            self._port.expect(b"ready")
            begin = time.perf_counter()
            self._add(qmp, disks)
            added = time.perf_counter()
            self._remove(qmp, disks, b"release\n" if unbind else b"delete\n")
            return added - begin, time.perf_counter() - added

    def _add(self, qmp: Monitor, disks: list[Commands]) -> None:
        qmp.send(b"".join(disk.add for disk in disks))
        self._port.expect(b"mounted")
        while qmp.answers < 2 * len(disks):
            qmp.read()

    def _remove(self, qmp: Monitor, disks: list[Commands], order: bytes) -> None:
        in_guest = {disk.said: disk.remove_device for disk in disks}
        in_qemu = {disk.id: disk.remove_node for disk in disks}
        qmp.answers = 0
        self._port.send(order)
        with selectors.DefaultSelector() as ready:
            ready.register(self._port, selectors.EVENT_READ)
            ready.register(qmp, selectors.EVENT_READ)
            while qmp.answers < 2 * len(disks):
                for key, _ in ready.select():
                    if key.fileobj is qmp:
                        gone = [in_qemu[name] for name in qmp.read() if name in in_qemu]
                    else:
                        gone = [in_guest[said] for said in self._port.read()]
                    if gone:
                        qmp.send(b"".join(gone))


class Commands:
    """What is said about one disk, as it goes over the wire."""

    def __init__(self, attachment: Attachment) -> None:
        controller, lun = attachment.slot.controller, attachment.slot.lun
        node = block_node(attachment.disk, id_of(attachment)).arguments
        device = device_properties(attachment, f"scsi{controller}.0")
        self.id = id_of(attachment)
        self.said = f"{FIRST_DEVICE + controller:x}.0 {lun}".encode()
        self.add = _command("blockdev-add", node) + _command("device_add", device)
        self.remove_device = _command("device_del", {"id": self.id})
        self.remove_node = _command("blockdev-del", {"node-name": self.id})

    @classmethod
    def of(cls, number: int, image: str) -> Commands:
        """The number-th disk, in the slot that a Manager would choose."""
        disk = Disk(image, DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
        return cls(Attachment(Slot(*divmod(number, LUNS)), disk, f"thin{number}"))


class Lines:
    """A socket that is read in lines."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(PATIENCE)
        self._socket = connected
        self._rest = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> list[bytes]:
        """The lines that are there, at least one; waits for that."""
        while True:
            data = self._socket.recv(1 << 16)
            if not data:
                raise EOFError
            *lines, self._rest = (self._rest + data).split(b"\n")
            if lines:
                return lines

    def expect(self, line: bytes) -> None:
        """Wait for this line and no other."""
        lines = self.read()
        if lines != [line]:
            raise RuntimeError(f"the guest says {lines}")


class Monitor:
    """A bare QMP connection.

    Attributes:
        answers: how many commands were carried out.
    """

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.answers = 0

    @classmethod
    @contextlib.contextmanager
    def connect(cls, path: str) -> Iterator[Self]:
        with socket.socket(socket.AF_UNIX) as connected:
            connected.connect(path)
            monitor = cls(Lines(connected))
            # With out-of-band commands QEMU reads ahead more than one; qemu.qmp enables them, too.
            monitor.send(_command("qmp_capabilities", {"enable": ["oob"]}))
            while not monitor.answers:
                monitor.read()
            monitor.answers = 0
            yield monitor

    def fileno(self) -> int:
        return self._lines.fileno()

    def send(self, data: bytes) -> None:
        self._lines.send(data)

    def read(self) -> list[str]:
        """Count answers; the ids of devices that are gone."""
        gone = []
        for line in self._lines.read():
            message = json.loads(line)
            if "return" in message:
                self.answers += 1
            elif message.get("event") == "DEVICE_DELETED":
                gone.append(message["data"].get("device"))
            elif "error" in message:
                raise RuntimeError(message["error"]["desc"])
        return gone


async def in_guest(vm: Machine, command: str) -> str:
    done = await vm.run(command)
    if done.returncode:
        raise RuntimeError(f"in the guest: {done.stdout}{done.stderr}")
    return done.stdout


def _compiled(path: str) -> bytes:
    """The helper; static, as the guest's C library may be an older one."""
    compiler = ["gcc", "-std=gnu11", "-O2", "-Wall", "-static", "-s", "-pthread"]
    subprocess.run([*compiler, "-o", path, SOURCE], check=True)
    return Path(path).read_bytes()


def _command(name: str, arguments: Any) -> bytes:
    return json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n"
