"""A real QEMU without a guest, images for it, and a monitor that follows a script."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

from qemu.qmp import QMPClient

from hotlun.backends.qemu import QEMUHostBackend
from hotlun.model import Attachment, Disk, DiskKind, ImageFormat, Slot

GREETING = {"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}}


@dataclass
class QEMU:
    """A running QEMU: one monitor for the backend, one for the test to look at it."""

    qmp_socket: str
    process: asyncio.subprocess.Process
    client: QMPClient

    async def ask(self, command: str, **arguments: object) -> list[dict[str, object]]:
        """The answer to a command that answers with a list."""
        answer = await self.client.execute(command, arguments or None)
        assert isinstance(answer, list)
        return answer

    async def get(self, path: str, name: str) -> object:
        """A property of a QOM object."""
        return await self.client.execute("qom-get", {"path": path, "property": name})

    async def devices(self) -> set[str]:
        """The ids of the devices that have one, controllers left out."""
        listing = await self.ask("qom-list", path="/machine/peripheral")
        return {str(entry["name"]) for entry in listing if str(entry["type"]) == "child<scsi-hd>"}

    async def nodes(self) -> dict[str, dict[str, object]]:
        """The named block nodes."""
        return {
            str(node["node-name"]): node
            for node in await self.ask("query-named-block-nodes", flat=True)
            if not str(node["node-name"]).startswith("#")
        }

    async def is_bare(self) -> bool:
        """Whether nothing is attached, and nothing left of it."""
        return not await self.devices() and not await self.nodes()


@asynccontextmanager
async def running_qemu(
    folder: os.PathLike[str],
    *options: str,
    controllers: Sequence[str] = ("scsi0", "scsi1"),
    user: int | None = None,
) -> AsyncGenerator[QEMU]:
    """QEMU, stopped before its first instruction; killed on the way out.

    Args:
        folder: where the monitors' sockets are made.
        options: more of its command line.
        controllers: ids of virtio-scsi controllers.
        user: the uid it runs as, with a group of the same number and no others.
    """
    async with AsyncExitStack() as stack:
        arguments = [
            *("-machine", "q35", "-accel", "tcg", "-m", "64", "-S"),
            *("-nodefaults", "-no-user-config", "-display", "none"),
        ]
        for name in controllers:
            arguments += ["-device", f"virtio-scsi-pci,id={name}"]
        paths = [os.path.join(folder, name) for name in ("qmp.sock", "look.sock")]
        monitors = []
        for number, path in enumerate(paths):
            monitors.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            monitors[-1].bind(path)
            monitors[-1].listen(1)
            chardev = f"socket,id=m{number},fd={monitors[-1].fileno()},server=on,wait=off"
            arguments += ["-chardev", chardev, "-mon", f"chardev=m{number},mode=control"]
            stack.callback(_unlink, path)
        process = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64",
            *arguments,
            *options,
            pass_fds=[monitor.fileno() for monitor in monitors],
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        stack.push_async_callback(_end, process)
        for monitor in monitors:
            monitor.close()  # or it would go on listening when QEMU has ended
        client = QMPClient()
        await client.connect(paths[1])
        stack.push_async_callback(_disconnect, client)
        yield QEMU(paths[0], process, client)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):  # a QEMU that quits does it itself
        os.unlink(path)


async def _disconnect(client: QMPClient) -> None:
    with suppress(EOFError, OSError):
        await client.disconnect()


def make_image(path: os.PathLike[str], format: str, size: str = "1M", *options: str) -> str:  # noqa: A002 - the word of the API
    """An empty image, made by qemu-img; its path."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", format, *options, os.fspath(path), size], check=True
    )
    return os.fspath(path)


def convert(source: os.PathLike[str], target: os.PathLike[str], format: str, *options: str) -> None:  # noqa: A002 - the word of the API
    """An image with the bytes of a raw one, made by qemu-img."""
    paths = (os.fspath(source), os.fspath(target))
    subprocess.run(
        ["qemu-img", "convert", "-q", "-f", "raw", "-O", format, *options, *paths], check=True
    )


@contextmanager
def loop_device(path: os.PathLike[str] | str, *, read_only: bool = False) -> Iterator[str]:
    """A host block device whose sectors are a file's; its path."""
    options = ["--read-only"] if read_only else []
    device = subprocess.run(
        ["losetup", "--find", "--show", *options, os.fspath(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


_serials = iter(range(1 << 30))


def attachment(
    path: os.PathLike[str] | str,
    lun: int = 0,
    *,
    format: ImageFormat | None = ImageFormat.RAW,  # noqa: A002 - the word of the API
    kind: DiskKind = DiskKind.VIRTUAL_DISK,
    read_only: bool = False,
    provider: str = "",
    controller: int = 0,
) -> Attachment:
    """An attachment with a serial of its own."""
    disk = Disk(os.fspath(path), kind, read_only, provider, format)
    return Attachment(Slot(controller, lun), disk, f"t{next(_serials)}")


def connected(
    vm: QEMU,
    *,
    timeout: float = 30,
    controllers: Sequence[str] = ("scsi0", "scsi1"),
    allow_backing: Sequence[str] = (),
) -> AbstractAsyncContextManager[QEMUHostBackend]:
    """The backend, connected to a VM of `running_qemu`."""
    return QEMUHostBackend.connect(
        vm.qmp_socket, controllers=controllers, timeout=timeout, allow_backing=allow_backing
    )


@dataclass(frozen=True)
class Refuses:
    """The scripted monitor answers with this error."""

    words: str
    code: str = "GenericError"


class Silence(Enum):
    """What else the scripted monitor may do instead of answering."""

    STAYS = "the connection stays, the answer does not come"
    HANGS_UP = "the connection is closed"


Answer = object | Refuses | Silence


class ScriptedMonitor:
    """A monitor that knows a controller `scsi0` and answers every command with success.

    `answers` says otherwise, for a command's name; a list is used up one by one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.commands: list[str] = []
        self.answers: dict[str, Answer | list[Answer]] = {}
        self.after: dict[str, tuple[str, dict[str, object]]] = {}
        """Command -> the event, and its data, that follows the answer."""
        self.greets = True
        self.tasks: set[asyncio.Task[None]] = set()
        """Those that serve."""
        self._connections: list[asyncio.StreamWriter] = []

    def hang_up(self) -> None:
        """Close every connection."""
        for connection in self._connections:
            connection.transport.abort()
        self._connections.clear()

    def say(self, event: str, **data: object) -> None:
        """Send an event to everybody."""
        for connection in self._connections:
            self._send(connection, {"event": event, "data": data, "timestamp": {}})

    @classmethod
    @asynccontextmanager
    async def serving(cls, folder: os.PathLike[str]) -> AsyncGenerator[ScriptedMonitor]:
        """A monitor that can be connected to."""
        monitor = cls(os.path.join(folder, "scripted.sock"))
        server = await asyncio.start_unix_server(monitor._serve, monitor.path)
        try:
            yield monitor
        finally:
            server.close()
            for connection in monitor._connections:
                connection.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self._connections.append(writer)
        if self.greets:
            self._send(writer, GREETING)
        with suppress(ConnectionError):
            async for message in _documents(reader):
                command = str(message["execute"])
                answer = self._answer(command, message.get("arguments", {}))
                if answer is Silence.HANGS_UP:
                    break
                if isinstance(answer, Refuses):
                    error = {"class": answer.code, "desc": answer.words}
                    self._send(writer, {"id": message.get("id"), "error": error})
                elif answer is not Silence.STAYS:
                    self._send(writer, {"id": message.get("id"), "return": answer})
                if command in self.after:
                    name, data = self.after[command]
                    self._send(writer, {"event": name, "data": data, "timestamp": {}})
        writer.close()

    def _answer(self, command: str, arguments: dict[str, Any]) -> Answer:
        self.commands.append(command)
        planned = self.answers.get(command, {})
        if isinstance(planned, list):
            return planned.pop(0) if planned else {}
        if command == "qom-list" and command not in self.answers:
            is_there = arguments["path"] == "/machine/peripheral/scsi0"
            return [{"name": "scsi0.0", "type": "child<SCSI>"}] if is_there else []
        return planned

    @staticmethod
    def _send(writer: asyncio.StreamWriter, message: object) -> None:
        writer.write(json.dumps(message).encode() + b"\r\n")


async def _documents(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """JSON documents, which a QMP client sends without anything between them."""
    decoder = json.JSONDecoder()
    text = ""
    while piece := await reader.read(1 << 16):
        text += piece.decode()
        while text:
            try:
                document, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            text = text[end:].lstrip()
            yield document
