"""The server in the guest that is in memory: it is given one input, and watched."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import re
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from fuzz import oracle
from fuzz.guest.errors import StrayError
from fuzz.guest.machine import Guest
from fuzz.loading import Agent
from hotlun.agent.links import SocketLink
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from fuzz.guest.clock import Clock
    from fuzz.inputs import Input
    from fuzz.oracle import Debt
    from hotlun.agent.queries import DiskQuery, Found
    from hotlun.agent.settings import DiskSettings, Slot

_DEADLINE = 30.0
"""Seconds for what takes none in a guest whose time is not ours."""


class StuckError(Exception):
    """A request does not end, or ended a thread: nothing can be told of the inputs that follow."""


_SHAPED = 200
"""Characters of an error that tell its kind."""
_SHAPES = (
    (re.compile(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\""), "'...'"),
    (re.compile(r"(?:/[^\s:;,]*)+"), "/..."),
    (re.compile(r"\b(?:0x[0-9a-f]+|sd[a-z]\d*|dm-\d+)\b|\d[\d,.:]*"), "#"),
)


class AtOnce:
    """Stands in for the threads that wait for the kernel: here it never lets anybody wait."""

    def run(self, job: Callable[[], None]) -> None:
        job()


class Figures:
    """What the inputs came to: how far they got, and how they were refused."""

    def __init__(self) -> None:
        self.inputs = 0
        self.reached = 0
        """Inputs of which at least one request came to a disk."""
        self.faulted = 0
        """Inputs in which a system call failed because they said so."""
        self.dropped = 0
        self.verbs: collections.Counter[str] = collections.Counter()
        self.codes: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.escaped: collections.Counter[str] = collections.Counter()
        """Scripted failures that came out as bare errors, where nobody has words for them."""

    def add(self, other: Figures) -> None:
        """Those of another part of the run."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def note(self, document: dict[str, Any]) -> None:
        """An answer."""
        code = document["Result"] & 0xFFFFFFFF
        try:
            self.codes[HResult(code).name] += 1
        except ValueError:
            self.codes[f"{code:#010x}"] += 1
        if code:
            self.refusals[shape(document["ErrorMessage"][:_SHAPED])] += 1


@functools.lru_cache(4096)
def shape(text: str) -> str:
    """An error's words without what differs from one to the next."""
    for pattern, placeholder in _SHAPES:
        text = pattern.sub(placeholder, text)
    return text[:90]


class Watched:
    """The verbs of the input at hand, counted."""

    def __init__(self, figures: Figures, clock: Clock) -> None:
        self.figures = figures
        self.clock = clock
        self.disks: Any = None
        self.reached = 0

    def mount(self, settings: DiskSettings, wanted: Callable[[], bool]) -> None:
        self._count("mount")
        self.clock.begin()
        self.disks.mount(settings, wanted)
        self._count("mounted")

    def unmount(self, settings: DiskSettings) -> None:
        self._count("unmount")
        self.clock.begin()
        self.disks.unmount(settings)
        self._count("unmounted")

    def unplug(self, slot: Slot, timeout: float | None) -> None:
        self._count("unplug")
        self.clock.begin()
        self.disks.unplug(slot, timeout)
        self._count("unplugged")

    def survey(self, asked: list[DiskQuery]) -> list[Found]:
        self._count("survey")
        found: list[Found] = self.disks.survey(asked)
        self._count("surveyed")
        self.figures.verbs["found mounts"] += sum(sum(disk.mounts) for disk in found)
        return found

    def _count(self, verb: str) -> None:
        self.reached += 1
        self.figures.verbs[verb] += 1


class ListLink:
    """A link whose bytes are known beforehand, and that ends when the answers are there."""

    def __init__(self, given: Input, debt: Debt) -> None:
        self._writes = iter(given.writes)
        self._owed = debt.must.total()
        self._enough = threading.Event()
        self.sent: list[bytes] = []
        self.late = False

    def receive(self) -> bytes:
        for data in self._writes:
            return data
        if len(self.sent) < self._owed:
            end = time.monotonic() + _DEADLINE
            while not (self._enough.wait(1) or StrayError.seen or self.late):
                self.late = time.monotonic() > end
        return b""

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        if len(self.sent) == self._owed:
            self._enough.set()

    def close(self) -> None:
        pass


class Log(logging.Handler):
    """What the agent says, and what of it must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Target:
    """One server for all inputs, each of which finds the guest as the first one did."""

    def __init__(self) -> None:
        self.guest = Guest()
        self.figures = Figures()
        self._agent = Agent(self.guest)
        self._watched = Watched(self.figures, self.guest.clock)
        self._uevents = self._agent["uevents"].Uevents(object())
        self.server = self._agent["server"].Server(self._watched, self._uevents.wake_all)
        self._kernel = self._agent["kernel"].Kernel()
        self._mounts: Any = None
        self._log = Log()
        self.lines: list[str] = []
        """What the agent has said of the last input."""
        self.answers = b""
        """What it has answered to it."""

    @contextlib.contextmanager
    def listening(self) -> Any:
        """Hear the agent's log, and keep it from the terminal."""
        log = logging.getLogger("hotlun.agent")
        before = log.level, log.propagate, logging._srcfile
        logging._srcfile = ""  # nobody reads where it was said, and to find out takes long
        log.addHandler(self._log)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        try:
            yield
        finally:
            log.removeHandler(self._log)
            log.level, log.propagate, logging._srcfile = before

    def feed(self, given: Input) -> list[str]:
        """Serve one input; what was wrong with how that went."""
        self._begin(given)
        debt = oracle.owed(given.data, drops=given.drops)
        wrong: list[str] = []
        if given.by_socket:
            self.answers = self._by_socket(given, debt)
        else:
            link = ListLink(given, debt)
            self.server.serve(link)
            self.answers = b"".join(link.sent)
            if link.late:
                wrong.append(f"not all answers were there after {_DEADLINE:g} s")
        wrong += self._settle()
        said, read = oracle.check(debt, self.answers)
        wrong += said
        self.lines = [record.getMessage() for record in self._log.records]
        wrong += oracle.leaks([self.answers, *self.lines], debt.frames)
        wrong += self._unexpected()
        codes = []
        for answer, document in read:
            self.figures.note(document)
            if answer.kind == 0x20100A01:
                codes.append(document["Result"])
        refused = len(codes) == sum(f.kind == 0x10100A01 for f in debt.frames) and all(codes)
        if refused and not self.guest.injected:
            wrong += [f"all was refused, and {what} is left of it" for what in self.guest.changes()]
        self._note(given)
        return wrong

    def _begin(self, given: Input) -> None:
        self.guest.begin(given.faults, given.luck)
        agent, kernel = self._agent, self._kernel
        mapper = agent["devmapper"].DeviceMapper(kernel)
        self._mounts = agent["mounts"].Mounts(kernel)
        self._watched.disks = agent["disks"].Disks(
            kernel,
            agent["scsi"].ScsiDisks(kernel, self._uevents, AtOnce()),
            agent["mappings"].Mappings(kernel, mapper, self._uevents),
            self._mounts,
        )
        self._watched.reached = 0
        self._log.records = []

    def _by_socket(self, given: Input, debt: Debt) -> bytes:
        """As the agent serves a unix socket."""
        ours, theirs = socket.socketpair()
        serving = threading.Thread(target=self.server.serve, args=(SocketLink(theirs),))
        serving.start()
        answers = bytearray()
        with ours:
            ours.settimeout(_DEADLINE)
            with contextlib.suppress(OSError):  # it has hung up
                for data in given.writes:
                    ours.sendall(data)
            with contextlib.suppress(ConnectionResetError):  # and had not read all
                while not given.drops:
                    if not debt.breaks and len(oracle.cut(bytes(answers))[0]) >= debt.must.total():
                        break
                    data = ours.recv(1 << 16)
                    if not data:
                        break
                    answers += data
        serving.join(_DEADLINE)
        if given.drops:  # the last may be cut off
            whole = oracle.cut(bytes(answers))[0]
            del answers[sum(16 + len(frame.payload) for frame in whole) :]
        return bytes(answers)

    def _settle(self) -> list[str]:
        """Wait for what a dropped link has left behind; what then still is there."""
        waiting = self.server._lanes._waiting
        end = time.monotonic() + _DEADLINE
        while waiting:
            if StrayError.seen or time.monotonic() > end:
                raise StuckError(f"requests that do not end: {[*waiting]}; {StrayError.seen}")
            time.sleep(0)
        wrong = []
        files = [
            self.guest.tree.path_of(file.spot)
            for file in [*self.guest.files.opened.values()]
            if file.spot.node is not self.guest.control
        ]
        if files:
            wrong.append(f"left open: {files}")
        if self._mounts._places.claimed:
            wrong.append(f"left claimed: {self._mounts._places.claimed}")
        if self._uevents._watches:
            wrong.append(f"left watching: {self._uevents._watches}")
        return wrong

    def _unexpected(self) -> list[str]:
        """Tracebacks in the log, less those of failures that the input scripted."""
        wrong = []
        for record in self._log.records:
            if record.exc_info is None:
                continue
            error = record.exc_info[1]
            if isinstance(error, OSError) and self.guest.injected:
                self.figures.escaped[_origin(error)] += 1
            else:
                text = logging.Formatter().formatException(record.exc_info)
                wrong.append(f"{record.getMessage()}\n{text}")
        return wrong

    def _note(self, given: Input) -> None:
        figures = self.figures
        figures.inputs += 1
        figures.reached += bool(self._watched.reached)
        figures.faulted += bool(self.guest.injected)
        figures.dropped += given.drops


def _origin(error: BaseException) -> str:
    """The agent's function that let it through."""
    found = "?"
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/agent/" in code.co_filename:
            module = code.co_filename.rpartition("/")[2].removesuffix(".py")
            found = f"{module}.{code.co_name}"
        trace = trace.tb_next
    return found
