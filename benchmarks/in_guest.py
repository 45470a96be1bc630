#!/usr/bin/env python3
"""The part of `guest.py` that runs in the guest: it times the agent, and what does the same bare.

    python3 -I in_guest.py AGENT.pyz < PLAN.json > SAMPLES.json

The agent is a process of its own, reached over a unix socket. What it is compared with is
done in this process, by system calls through ctypes and by programs. They take turns, with
the same disk. While this one is timed the other does not run, and the guest's own agent
never does: all would hear of each device that goes.
Standard library only, as it is in the guest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

AGENT = sys.argv[1]
sys.path[:0] = [AGENT, os.path.dirname(__file__)]

from recorded import Recorder, copied, replay  # noqa: E402

from hotlun.bridge import messages  # noqa: E402
from hotlun.bridge.documents import decode, encode_request  # noqa: E402
from hotlun.bridge.frames import HEADER, Frame, encode  # noqa: E402
from hotlun.bridge.messages import MessageType  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOCKET = "/run/hotlun/benchmark.sock"
FOLDER = "/run/benchmark"
"""Where the paths are; it is there before, so that neither side has to make it."""
KEY_FILE = f"{FOLDER}/key"
MAPPED = "benchmark"

BLANKED = 2 << 20
"""Bytes at either end of a disk that are zeroed to make it blank."""

MS_RDONLY = 1
UMOUNT_NOFOLLOW = 8

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class Job(NamedTuple):
    """Something that is done and undone, and timed both ways."""

    name: str
    rounds: int
    disk: Disk
    do: list[Any]
    """The agent's requests, one after another; timed."""
    undo: list[Any]
    bare: str
    """The name of the bare side's class below; `""` if nothing does the same."""
    arguments: dict[str, Any]
    blank: bool
    """Whether the disk is to be blank each time."""
    replayed: bool
    """Whether the agent's system calls are made without it, too."""


class Disk:
    """A disk of ours, by its LUN, which is on no other controller."""

    def __init__(self, lun: int) -> None:
        (self.address,) = glob.glob(f"/sys/bus/scsi/devices/*:0:0:{lun}")
        self.host, self.place = os.path.basename(self.address).split(":", 1)

    @property
    def node(self) -> str:
        (name,) = os.listdir(f"{self.address}/block")
        return f"/dev/{name}"

    def find_again(self) -> None:
        """Have the kernel look for it if it was let go."""
        if not os.path.exists(self.address):
            with open(f"/sys/class/scsi_host/host{self.host}/scan", "w") as scan:
                scan.write(self.place.replace(":", " "))
        until(self._is_readable)

    def _is_readable(self) -> bool:
        try:
            with open(self.node, "rb") as file:
                return bool(file.read(1))
        except (OSError, ValueError):  # it has no name yet
            return False

    def blank(self) -> None:
        """Leave nothing that anybody would recognise."""
        with open(self.node, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            for offset in (0, size - BLANKED):
                os.pwrite(file.fileno(), bytes(BLANKED), offset)
            os.fsync(file.fileno())


class Agent:
    """The agent's own file, run once more."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", AGENT, "--unix", SOCKET, "--log-level", "warning"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(lambda: os.path.exists(SOCKET))
        self._socket = socket.socket(socket.AF_UNIX)
        until(lambda: not self._socket.connect_ex(SOCKET))
        self._ids = itertools.count(1)
        self._request(MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request())

    def modify(self, request: Any) -> float:
        """Have it do one thing; the seconds from the request to the answer."""
        return self._request(MessageType.MODIFY_SETTINGS, messages.modify_request(request))

    def nothing(self) -> float:
        """The seconds for a request that is answered without looking at anything."""
        return self._request(MessageType.START, messages.start_request())

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """A time without it; then it has caught up with what happened meanwhile."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            self.nothing()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _request(self, kind: int, document: Any) -> float:
        data = encode(Frame(kind, next(self._ids), encode_request(document)))
        begin = time.perf_counter()
        self._socket.sendall(data)
        answer = self._receive(HEADER.size)
        answer += self._receive(HEADER.unpack(answer)[1] - HEADER.size)
        seconds = time.perf_counter() - begin
        said = decode(answer[HEADER.size :])
        if said.document["Result"]:
            raise RuntimeError(said.string("ErrorMessage"))
        return seconds

    def _receive(self, size: int) -> bytes:
        return self._socket.recv(size, socket.MSG_WAITALL)


class Mount:
    """mkdir(2) and mount(2); umount2(2) and rmdir(2)."""

    def __init__(self, disk: Disk, arguments: dict[str, Any]) -> None:
        self.disk = disk.node
        self.node = disk.node
        self.path = f"{FOLDER}/bare"
        self.arguments = arguments

    def do(self) -> None:
        filesystem: str = self.arguments["filesystem"]
        flags = MS_RDONLY if "read_only" in self.arguments else 0
        os.mkdir(self.path, 0o700)
        check(libc.mount(self.node.encode(), self.path.encode(), filesystem.encode(), flags, None))

    def undo(self) -> None:
        check(libc.umount2(self.path.encode(), UMOUNT_NOFOLLOW))
        os.rmdir(self.path)


class FoundOutAndMounted(Mount):
    """libblkid's verdict, and a mount as that."""

    def do(self) -> None:
        blkid = ctypes.CDLL("libblkid.so.1")
        blkid.blkid_new_probe_from_filename.restype = ctypes.c_void_p
        probe = ctypes.c_void_p(blkid.blkid_new_probe_from_filename(self.disk.encode()))
        found = ctypes.c_char_p()
        check(blkid.blkid_do_safeprobe(probe))
        check(blkid.blkid_probe_lookup_value(probe, b"TYPE", ctypes.byref(found), None))
        self.arguments = {"filesystem": (found.value or b"").decode()}
        blkid.blkid_free_probe(probe)
        super().do()


class MadeAndMounted(Mount):
    """mkfs with the arguments that the agent gives it, and a mount."""

    def do(self) -> None:
        run(*self.arguments["maker"], self.disk)
        super().do()


class Opened(Mount):
    """cryptsetup or veritysetup `open`, and a mount; after it is unmounted, `close`."""

    def __init__(self, disk: Disk, arguments: dict[str, Any]) -> None:
        super().__init__(disk, arguments)
        self.node = f"/dev/mapper/{MAPPED}"

    def do(self) -> None:
        words = {"DISK": self.disk, "NAME": MAPPED}
        opening = [words.get(word, word) for word in self.arguments["open"]]
        run(*opening, stdin=bytes.fromhex(self.arguments.get("key", "")))
        super().do()

    def undo(self) -> None:
        super().undo()
        run(self.arguments["open"][0], "close", MAPPED)


class Formatted(Mount):
    """What the original agent does for an encrypted disk, less its debug messages."""

    def __init__(self, disk: Disk, arguments: dict[str, Any]) -> None:
        super().__init__(disk, arguments)
        self.node = f"/dev/mapper/{MAPPED}"

    def do(self) -> None:
        with open(KEY_FILE, "wb") as file:
            file.write(os.urandom(1024))
        run(
            *("cryptsetup", "luksFormat", self.disk, "--type", "luks2"),
            *("--key-file", KEY_FILE, "--batch-mode", "--cipher", "aes-xts-plain64"),
            *("--integrity", "hmac-sha256", "--integrity-no-wipe", "--sector-size", "4096"),
            *("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"),
        )
        run(
            *("cryptsetup", "luksOpen", self.disk, MAPPED, "--key-file", KEY_FILE),
            *("--integrity-no-journal", "--persistent"),
        )
        os.unlink(KEY_FILE)
        with open(self.node, "r+b", buffering=0) as file:
            file.write(bytes(4096))
        run("mkfs.xfs", "-f", self.node)
        super().do()

    def undo(self) -> None:
        super().undo()
        run("cryptsetup", "luksClose", MAPPED)


class Link(Mount):
    """symlink(2) and unlink(2)."""

    def do(self) -> None:
        os.symlink(self.node, self.path)

    def undo(self) -> None:
        os.unlink(self.path)


class Delete(Mount):
    """A write to the SCSI device's `delete`."""

    def __init__(self, disk: Disk, arguments: dict[str, Any]) -> None:
        super().__init__(disk, arguments)
        self.path = f"{disk.address}/delete"

    def do(self) -> None:
        file = os.open(self.path, os.O_WRONLY)
        os.write(file, b"1\n")
        os.close(file)

    def undo(self) -> None:
        pass


BARE: dict[str, type[Mount]] = {
    "mount": Mount,
    "find out and mount": FoundOutAndMounted,
    "make and mount": MadeAndMounted,
    "link": Link,
    "delete": Delete,
    "open and mount": Opened,
    "format, open and mount": Formatted,
}


def measure(agent: Agent, recorder: Recorder, job: Job) -> dict[str, list[list[float]]]:
    """Seconds for doing and undoing it: by whom, a pair for each round."""
    samples: dict[str, list[list[float]]] = {"agent": [], "calls": [], "bare": []}

    def by_agent() -> None:
        prepare(job)
        done = sum(agent.modify(request) for request in job.do)
        undone = sum(agent.modify(request) for request in job.undo)
        samples["agent"].append([done, undone])

    def calls() -> None:
        with agent.stopped():
            for _ in range(2):  # the first time it also opens what it then keeps open
                prepare(job)
                ways = [[recorder.record(request) for request in way] for way in (job.do, job.undo)]
            prepare(job)
            again = [[call for made in way for call in copied(made)] for way in ways]
            samples["calls"].append([timed(functools.partial(replay, way)) for way in again])

    def bare() -> None:
        with agent.stopped():
            prepare(job)
            way = BARE[job.bare](job.disk, job.arguments)
            samples["bare"].append([timed(way.do), timed(way.undo)])

    sides = [by_agent, *[calls] * job.replayed, *[bare] * bool(job.bare)]
    for number in range(job.rounds + 1):
        for side in reversed(sides) if number % 2 else sides:
            side()
    # The first round loads or makes what is needed.
    return {side: rounds[1:] for side, rounds in samples.items()}


def prepare(job: Job) -> None:
    job.disk.find_again()
    if job.blank:
        job.disk.blank()


def timed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def run(*command: str, stdin: bytes = b"") -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {(done.stdout + done.stderr).decode()}")


def check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what is not timed."""
    end = time.monotonic() + 30
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.001)


@contextlib.contextmanager
def guests_own_agent_stopped() -> Iterator[None]:
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if b"agent.pyz\0--port\0" in file.read():
                found.append(int(path.split("/")[2]))
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            os.kill(pid, signal.SIGCONT)


def main() -> None:
    plan = json.load(sys.stdin)
    os.makedirs(FOLDER, exist_ok=True)
    samples: dict[str, Any] = {}
    with guests_own_agent_stopped():
        agent, recorder = Agent(), Recorder()
        try:
            nothing = [agent.nothing() for _ in range(100)]
            samples["nothing"] = {"agent": [[seconds, 0.0] for seconds in nothing]}
            for job in plan:
                disk = Disk(job.pop("lun"))
                samples[job["name"]] = measure(agent, recorder, Job(disk=disk, **job))
        finally:
            agent.end()
    json.dump(samples, sys.stdout)


if __name__ == "__main__":
    main()
