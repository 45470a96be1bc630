"""The VM of `probe.py`: bare QMP, a script in the guest, and nothing else in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import EventListener, QMPClient

from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    Parts = Sequence[tuple[str, Sequence[str]]]

SCRIPTS = [Path(__file__).with_name(name) for name in ("probe_in_guest.py", "probe_sampler.py")]
PORT = "benchmark"
IMAGE_SIZE = 64 << 20
PATIENCE = 60.0
"""Seconds for any answer of the guest's."""

FOUR = ("scsi0", "scsi1", "scsi2", "scsi3")
CONTROLLERS = {
    **{name: f"0000:00:{0x10 + index:02x}.0" for index, name in enumerate(FOUR)},
    "one-queue": "0000:00:18.0",
    "iothread": "0000:00:19.0",
    "no-events": "0000:00:1a.0",
    "ioeventfd": "0000:00:1b.0",
}
"""By id, where they are on the guest's PCI bus."""
MORE_CONTROLLERS = (
    ("-object", "iothread,id=thread"),
    ("-device", "virtio-scsi-pci,id=one-queue,num_queues=1,ioeventfd=off,addr=0x18"),
    ("-device", "virtio-scsi-pci,id=iothread,iothread=thread,addr=0x19"),
    ("-device", "virtio-scsi-pci,id=no-events,hotplug=off,ioeventfd=off,addr=0x1a"),
    ("-device", "virtio-scsi-pci,id=ioeventfd,addr=0x1b"),
)


@dataclass(frozen=True)
class Way:
    """A way to plug disks in, and to let them go.

    Args:
        cpus: of the VM.
        controllers: of which each gets as many disks; the disks take turns.
        properties: more of them for each scsi-hd.
        read_only: the disks, all of them.
        settings: what the guest's kernel is told meanwhile: path -> value.
        image: which image the disks have, by its name in `Images`.
        paused: the VM stands still while QEMU takes the disks.
        window: how many disks of a controller are on their way at most; 0 for no limit.
        backwards: the highest LUN first.
        scan: the guest is told of no disk, and asks the controller once all are there.
        listener: whether a process in the guest is woken for each uevent, as udev is.
        agent: whether hotlun's agent hears of the disks, too.
        threads: that let the disks go in the guest.
        unbind: whether each disk loses its driver before it is deleted.
    """

    cpus: int = 1
    controllers: tuple[str, ...] = ("scsi0",)
    properties: Mapping[str, object] = field(default_factory=dict)
    read_only: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    image: str = "blank"
    paused: bool = False
    window: int = 0
    backwards: bool = False
    scan: bool = False
    listener: bool = False
    agent: bool = True
    threads: int = 8
    unbind: bool = False


@dataclass(frozen=True)
class Spent:
    """Seconds, on the clock and of the virtual processors' threads."""

    seconds: float
    cpu: float


class Images:
    """As many blank disks as are wanted, of each kind."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def path(self, kind: str, number: int) -> str:
        path = Path(self._directory, f"{kind}{number}.img")
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(IMAGE_SIZE)
                if kind == "mbr":  # one partition, of type 0x83
                    file.seek(446)
                    start, sectors = 2048, IMAGE_SIZE // 512 - 2048
                    file.write(b"\0\0\0\0\x83\0\0\0" + start.to_bytes(4, "little"))
                    file.write(sectors.to_bytes(4, "little"))
                    file.seek(510)
                    file.write(b"\x55\xaa")
        return str(path)


class ProbeVM:
    """One VM that disks are plugged into."""

    def __init__(
        self,
        vm: Machine,
        qmp: QMPClient,
        images: Images,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._pid = vm.pid
        self._qmp = qmp
        self._images = images
        self._reader = reader
        self._writer = writer
        self._threads: list[int] = []
        self._count = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, cpus: int) -> AsyncIterator[ProbeVM]:
        with tempfile.TemporaryDirectory() as directory:
            socket = f"{directory}/port"
            more = [word for pair in MORE_CONTROLLERS for word in pair]
            more += ["-chardev", f"socket,id=benchmark,path={socket},server=on,wait=off"]
            more += ["-device", f"virtserialport,bus=ports.0,nr=3,chardev=benchmark,name={PORT}"]
            async with Machine.start(cpus=cpus, connect=False, extra_arguments=more) as vm:
                await _install(vm)
                reader, writer = await asyncio.open_unix_connection(socket, limit=64 << 20)
                qmp = QMPClient("benchmark")
                await qmp.connect(vm.qmp_socket)
                try:
                    probe = cls(vm, qmp, Images(directory), reader, writer)
                    known: Any = await qmp.execute("query-cpus-fast")
                    probe._threads = [cpu["thread-id"] for cpu in known]
                    yield probe
                finally:
                    await qmp.disconnect()
                    writer.close()

    async def plug_and_let_go(self, way: Way, disks: int) -> tuple[Spent, Spent]:
        """What it took until all disks were there, and until the guest had let them go."""
        async with self._set(way):
            with self._spent() as plugged:
                names = await self._plug(way, disks)
            with self._spent() as gone:
                await self._ask("let_go", threads=way.threads, unbind=way.unbind)
        await self._unplug(names)
        return plugged[0], gone[0]

    async def commands(self, way: Way, disks: int) -> tuple[list[str], list[str]]:
        """Each SCSI command of the guest's, while disks come and while they go."""
        coming, going = await self._observed(way, disks, "note_commands", "noted_commands")
        return coming, going

    async def shares(
        self, way: Way, disks: int, parts: Parts
    ) -> tuple[dict[str, int], dict[str, int]]:
        """How often the guest was met at which part of its work, while disks come and go."""
        coming, going = await self._observed(way, disks, "sample", "sampled", parts=parts)
        return coming, going

    async def _observed(
        self, way: Way, disks: int, begin: str, end: str, **arguments: object
    ) -> tuple[Any, Any]:
        async with self._set(way):
            await self._ask(begin)
            names = await self._plug(way, disks)
            coming = await self._ask(end, **arguments)
            await self._ask(begin)
            await self._ask("let_go", threads=way.threads, unbind=way.unbind)
            going = await self._ask(end, **arguments)
        await self._unplug(names)
        return coming, going

    @contextlib.asynccontextmanager
    async def _set(self, way: Way) -> AsyncIterator[None]:
        before = await self._ask("set", settings=dict(way.settings))
        if way.listener:
            await self._ask("listen")
        if not way.agent:
            await self._ask("signal_agent", name="SIGSTOP")
        try:
            yield
        finally:
            await self._ask("set", settings=before)
            if way.listener:
                await self._ask("listen_no_more")
            if not way.agent:
                await self._ask("signal_agent", name="SIGCONT")

    async def _plug(self, way: Way, disks: int) -> list[str]:
        places = [
            (way.controllers[number % len(way.controllers)], number // len(way.controllers))
            for number in range(disks)
        ]
        if way.backwards:
            places.reverse()
        scan = CONTROLLERS[way.controllers[0]] if way.scan else ""
        windows = {
            CONTROLLERS[name]: asyncio.Semaphore(way.window or disks) for name in way.controllers
        }
        await self._ask("see", disks=disks, each=bool(way.window), scan=scan)
        if way.paused:
            await self._qmp.execute("stop")
        adding = asyncio.gather(
            *(
                self._add(way, number, *place, windows[CONTROLLERS[place[0]]])
                for number, place in enumerate(places)
            )
        )
        if way.window:
            for _ in range(disks):
                windows[await self._hear()].release()
        names = await adding
        if way.paused:
            await self._qmp.execute("cont")
        if way.scan:
            self._say("all are there")
        await self._hear()
        return names

    async def _add(
        self, way: Way, number: int, controller: str, lun: int, window: asyncio.Semaphore
    ) -> str:
        await window.acquire()
        self._count += 1
        name = f"probe{self._count}"
        access = {"read-only": way.read_only, "auto-read-only": False, "discard": "unmap"}
        file = {"driver": "file", "filename": self._images.path(way.image, number), **access}
        node = {"node-name": name, "driver": "raw", "file": file, **access}
        device = {"id": name, "drive": name, "serial": name, "bus": f"{controller}.0"}
        where = {"driver": "scsi-hd", "channel": 0, "scsi-id": 0, "lun": lun}
        await asyncio.gather(
            self._qmp.execute("blockdev-add", node),
            self._qmp.execute("device_add", {**where, **device, **way.properties}),
        )
        return name

    async def _unplug(self, names: list[str]) -> None:
        listener = EventListener("DEVICE_DELETED", lambda event: "device" in event["data"])
        with self._qmp.listen(listener):
            await asyncio.gather(*(self._qmp.execute("device_del", {"id": name}) for name in names))
            left = set(names)
            while left:
                left.discard((await listener.get())["data"]["device"])
        await asyncio.gather(
            *(self._qmp.execute("blockdev-del", {"node-name": name}) for name in names)
        )
        await self._ask("none_left")

    @contextlib.contextmanager
    def _spent(self) -> Iterator[list[Spent]]:
        spent: list[Spent] = []
        begin, cpu = time.perf_counter(), self._cpu()
        yield spent
        spent.append(Spent(time.perf_counter() - begin, self._cpu() - cpu))

    def _cpu(self) -> float:
        """Seconds that the virtual processors' threads have had."""
        return sum(_nanoseconds(self._pid, thread) for thread in self._threads) / 1e9

    async def _ask(self, do: str, **arguments: object) -> Any:
        self._say({"do": do, **arguments})
        return await self._hear()

    def _say(self, request: object) -> None:
        self._writer.write(json.dumps(request).encode() + b"\n")

    async def _hear(self) -> Any:
        async with asyncio.timeout(PATIENCE):
            answer = json.loads(await self._reader.readline())
        if isinstance(answer, dict) and "failed" in answer:
            raise RuntimeError(f"in the guest: {answer['failed']}")
        return answer


async def _install(vm: Machine) -> None:
    written = [f"cat >/run/{path.name} <<'END'\n{path.read_text()}\nEND\n" for path in SCRIPTS]
    done = await vm.run(
        "set -e\nmount -t tracefs tracefs /sys/kernel/tracing\n"
        + "".join(written)
        + f"setsid python3 -I /run/{SCRIPTS[0].name} {PORT} </dev/null >/dev/console 2>&1 &"
    )
    if done.returncode:
        raise RuntimeError(f"in the guest: {done.stdout}{done.stderr}")


def _nanoseconds(process: int, thread: int) -> int:
    """A thread's time on a processor (proc(5): schedstat's first field)."""
    with open(f"/proc/{process}/task/{thread}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[0])
