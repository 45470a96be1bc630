"""Extensible virtual disks of the provider `nbd`, against a real QEMU and a real qemu-nbd."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
from support.qemu import QEMU, attachment

from hotlun.backends.providers import nbd_server
from hotlun.errors import BackendError, HotlunError
from hotlun.model import Attachment, DiskIdentity, DiskKind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from hotlun.backends.qemu import QEMUHostBackend

SIZE = 1 << 20


def served(path: str, *, read_only: bool = False) -> Attachment:
    kind = DiskKind.EXTENSIBLE_VIRTUAL_DISK
    return attachment(path, kind=kind, provider="nbd", format=None, read_only=read_only)


@asynccontextmanager
async def serving(folder: Path, *options: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    """qemu-nbd, ready to be connected to."""
    image = folder / "served.raw"
    image.write_bytes(bytes(SIZE))
    pid_file = folder / "nbd.pid"
    process = await asyncio.create_subprocess_exec(
        *("qemu-nbd", "--format=raw", "--persistent", f"--pid-file={pid_file}"),
        *options,
        str(image),
    )
    try:
        async with asyncio.timeout(20):
            # It writes its pid once it listens.
            while not pid_file.exists():
                await asyncio.sleep(0.02)
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.qemu
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("export", ["", "a:name/with 100% of everything"])
async def test_a_disk_behind_a_unix_socket(
    vm: QEMU, host: QEMUHostBackend, tmp_path: Path, export: str, read_only: bool
) -> None:
    """The default export and a named one, as writable as asked for."""
    socket = tmp_path / "nbd.sock"
    path = f"unix:{socket}:{export}" if export else f"unix:{socket}"
    disk = served(path, read_only=read_only)
    async with serving(tmp_path, f"--socket={socket}", f"--export-name={export}"):
        await host.attach(disk)
        (node,) = (await vm.nodes()).values()
        assert node["ro"] == read_only
        (size,) = [
            block["inserted"]["image"]["virtual-size"]  # type: ignore[index] # QMP, untyped
            for block in await vm.ask("query-block")
            if "inserted" in block
        ]
        assert size == SIZE
        assert host.identity(disk) == DiskIdentity(disk.serial)  # the size is the server's to say
        await host.detach(disk)


@pytest.mark.qemu
async def test_a_disk_over_tcp(host: QEMUHostBackend, tmp_path: Path, unused_tcp_port: int) -> None:
    """An export by host, port and name."""
    options = ("--bind=127.0.0.1", f"--port={unused_tcp_port}", "--export-name=data")
    async with serving(tmp_path, *options):
        disk = served(f"127.0.0.1:{unused_tcp_port}/data")
        await host.attach(disk)
        await host.detach(disk)


@pytest.mark.qemu
async def test_a_server_that_refuses(
    host: QEMUHostBackend, tmp_path: Path, unused_tcp_port: int
) -> None:
    """No such export, no writing, nobody there: each error says what to do."""
    socket = tmp_path / "nbd.sock"
    options = (f"--socket={socket}", "--export-name=data", "--read-only")
    async with serving(tmp_path, *options):
        with pytest.raises(BackendError, match="the server has no such export"):
            await host.attach(served(f"unix:{socket}:other", read_only=True))
        with pytest.raises(BackendError, match="attach it read-only"):
            await host.attach(served(f"unix:{socket}:data"))
    # qemu-nbd has left its socket behind, and nobody listens there.
    for path in (f"unix:{socket}", f"127.0.0.1:{unused_tcp_port}"):
        with pytest.raises(BackendError, match="its server cannot be reached"):
            await host.attach(served(path))
    with pytest.raises(BackendError, match="there is no socket"):
        await host.attach(served(f"unix:{tmp_path}/none.sock"))


@pytest.mark.qemu
async def test_a_server_that_hangs(vm: QEMU, host: QEMUHostBackend, tmp_path: Path) -> None:
    """It is given up after a few seconds, and the VM's monitor works again."""
    socket = tmp_path / "nbd.sock"
    async with serving(tmp_path, f"--socket={socket}") as server:
        server.send_signal(signal.SIGSTOP)
        with pytest.raises(HotlunError, match="its server cannot be reached"):
            await host.attach(served(f"unix:{socket}"))
        assert await host.occupied() == set()


@pytest.mark.parametrize(
    ("path", "server", "export"),
    [
        ("unix:/run/nbd", {"type": "unix", "path": "/run/nbd"}, ""),
        ("unix:/run/nbd:", {"type": "unix", "path": "/run/nbd"}, ""),
        ("unix:/run/nbd:a:b/c", {"type": "unix", "path": "/run/nbd"}, "a:b/c"),
        ("h.example:10809", {"type": "inet", "host": "h.example", "port": "10809"}, ""),
        ("h.example:10809/", {"type": "inet", "host": "h.example", "port": "10809"}, ""),
        ("10.0.0.1:1/a/b:c", {"type": "inet", "host": "10.0.0.1", "port": "1"}, "a/b:c"),
        ("[::1]:10809/x", {"type": "inet", "host": "::1", "port": "10809"}, "x"),
    ],
)
def test_paths(path: str, server: dict[str, str], export: str) -> None:
    """Each form of path names a server and an export."""
    assert nbd_server(path) == (server, export)


@pytest.mark.parametrize(
    "path",
    [
        "unix:",
        "unix:relative:x",
        "unix:10809/x",
        "unix:/" + "x" * 107,
        "/run/nbd.sock",
        "host",
        "host/export",
        "host:/x",
        "host:0/x",
        "host:65536",
        "host:1x",
        "::1:10809",
        "[host]:1",
        "json:{}:1",
        "a b:1",
        "host:1/" + "x" * 4097,
        "nbd://host:1/x",
    ],
)
def test_impossible_paths(path: str) -> None:
    """Anything else is refused, with the forms that are not."""
    with pytest.raises(BackendError, match=r"evd://nbd/unix:/SOCKET"):
        nbd_server(path)
