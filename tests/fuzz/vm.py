"""The fuzz against a real agent, in a VM with disks that its requests really mount.

What is asked for there happens. So inputs that would have it happen outside of the sandbox,
such as a mount over /etc, or that would wait for long, are not sent; the report says how
many. Between inputs all is undone by requests that make sense, and now and then the guest
is looked at: nothing may be left in it, and the agent must be the same process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from support import disks

from fuzz import oracle
from fuzz.grammar import Profile
from fuzz.inputs import make
from fuzz.report import Failure, Outcome
from fuzz.target import Figures
from hotlun.agent.errors import RequestError
from hotlun.agent.settings import DiskSettings, Slot, read_timeout
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.bridge import messages
from hotlun.bridge.documents import MessageError, decode, encode_request
from hotlun.bridge.frames import Frame, FrameDecoder, encode
from hotlun.bridge.messages import MessageType, ModifyRequest
from hotlun.bridge.responses import Response
from hotlun.model import Attachment, Disk, DiskKind, ImageFormat
from hotlun.model import Slot as HostSlot
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fuzz.inputs import Input
    from fuzz.oracle import Cut, Debt

_MIB = 1 << 20
SANDBOX = "/run/fuzz/"
_REFUSED = ("", "/", "relative", "/run/../etc", "/etc/passwd", "/etc/passwd/x", "/proc/x/y")
"""Other paths that may be asked for: nothing can be mounted there."""

_LUNS = range(4)
PROFILE = Profile(
    slots=(*((0, lun) for lun in _LUNS), (0, 0), (0, 2), (0, 0), (0, 9), (7, 0)),
    paths=(*(SANDBOX + name for name in ("a", "a", "b", "b/c", "d e\n\u00e9")), *_REFUSED),
    timeouts=(1, 20, 50),
    identities={(0, lun): {"Serial": f"fuzz{lun}"} for lun in _LUNS},
    makes=0.1,
    encrypts=0.01,
)
_LONGEST_WAIT = 0.1
"""Seconds that an input may have the agent wait for a disk that is not there."""

_DEADLINE = 60.0
_PATIENCE = 0.3
"""Seconds for answers that may come or not, as a port does not tell one host from the next."""
_BUSY = "is being worked on by another request"
_OF_LINKS = ("no answer", "an answer that", "another ActivityId")
"""What cannot be told where links are not told apart."""
_LOOK_EVERY = 100
_GROWTH = 4 << 10
"""KiB that the agent may grow by when inputs are sent again: its threads and their heaps are
there by then, while inputs that are new to it may need more of them than any before."""

_LOOK = r"""
agent=$(pgrep -xf 'python3 .*/agent.pyz .*')
echo "$agent" $(cut -d' ' -f22 /proc/$agent/stat)
grep VmRSS /proc/$agent/status
ls /proc/$agent/fd | wc -l
echo =
cut -d' ' -f5- /proc/self/mountinfo
ls -A /dev/mapper
find /run ! -path '/run/qemu*' ! -path '/run/qga*'
"""
_FIND_AGAIN = "for scan in /sys/class/scsi_host/host*/scan; do echo '- - -' >$scan; done"


class Seen(NamedTuple):
    """The guest at a moment: the agent's pid and start, its KiB, its files, and the world."""

    process: str
    memory: int
    files: int
    world: str


class Wish(NamedTuple):
    """What a request may have brought about."""

    slot: Slot
    partition: int
    path: str
    block_device: bool

    def request(self, kind: str) -> bytes:
        """The document that asks for it, or for its end."""
        settings = {
            "MountPath": self.path,
            "Lun": self.slot.lun,
            "Controller": self.slot.controller,
            "Partition": self.partition,
            "BlockDev": self.block_device,
        }
        request = {
            "RequestType": kind,
            "ResourceType": messages.MAPPED_VIRTUAL_DISK,
            "Settings": settings,
        }
        return encode_request(messages.modify_request(request))


async def run(seed: int, start: int, count: int, *, talk: bool = False) -> Outcome:
    """Send this many inputs, from this index on; and half of them again, which show a leak.

    Args:
        talk: print what is sent and answered.
    """
    figures, failures, failed = Figures(), [], 0
    begun = time.monotonic()
    async with _machine() as machine:
        session = _Session(machine, figures)
        await session.tidy([Wish(Slot(0, 0), 0, SANDBOX + "a", block_device=False)], mounting=True)
        first = await look(machine)
        memory = [first.memory]
        index, since = start - 1, start
        skipped = 0
        sent: list[Input] = []
        while figures.inputs < count:
            index += 1
            given = make(seed, index, PROFILE)
            if not is_harmless(given):
                skipped += 1
                if talk:
                    print(f"input {index} is not sent: {given.data!r}")
                    break
                continue
            wrong = await session.feed(given)
            sent.append(given)
            if talk:
                print(f"{given.writes!r}\nis answered\n{session.answers!r}")
            is_last = figures.inputs == count
            if figures.inputs % _LOOK_EVERY == 0 or is_last or wrong:
                now = await look(machine)
                wrong += _differences(first, now, since, index)
                memory.append(now.memory)
                since = index + 1
            if wrong:
                failed += 1
                failures.append(Failure(index, wrong))
                if failed > 5:
                    break
        for given in sent[: count // 2]:
            if wrong := await session.feed(given):
                failed += 1
                failures.append(Failure(given.number, wrong))
        await session.tidy([Wish(Slot(0, 0), 0, SANDBOX + "a", block_device=False)], mounting=True)
        last = await look(machine)
    grown = []
    if last.memory > memory[-1] + _GROWTH:
        grown.append(
            f"by the first {count // 2} inputs, sent again, the agent grew "
            f"from {memory[-1]} to {last.memory} KiB"
        )
    if last.files > first.files + 1:  # the device mapper's control, opened when first needed
        grown.append(f"the agent had {first.files} files open, and has {last.files}")
    size = (
        f"of the agent at first, and after each {_LOOK_EVERY} inputs: "
        f"{', '.join(map(str, memory))} KiB; after half of them again: {last.memory} KiB; "
        f"{first.files}, {last.files} files; "
        f"{skipped} inputs were not sent"
    )
    return Outcome(figures, failures, failed, grown, [size], time.monotonic() - begun)


@contextlib.asynccontextmanager
async def _machine() -> AsyncIterator[Machine]:
    """A VM with an ext4, a blank disk, a partitioned one, and an ext4 that cannot be written."""
    with tempfile.TemporaryDirectory(prefix="hotlun-fuzz-") as directory:
        folder = Path(directory)
        images = (
            disks.ext4(folder / "0.raw", "one"),
            disks.blank(folder / "1.raw", 64 * _MIB),
            disks.partitioned(folder / "2.raw", "gpt", {1: "first", 2: "second"}),
            disks.ext4(folder / "3.raw", "read-only"),
        )
        async with Machine.start(connect=False) as machine:
            async with QEMUHostBackend.connect(
                machine.qmp_socket, controllers=machine.controllers
            ) as host:
                for lun, image in zip(_LUNS, images, strict=True):
                    disk = Disk(str(image), DiskKind.VIRTUAL_DISK, lun == 3, format=ImageFormat.RAW)
                    await host.attach(Attachment(HostSlot(0, lun), disk, f"fuzz{lun}"))
            yield machine


async def look(machine: Machine) -> Seen:
    """At the agent, and at all that it changes."""
    done = await machine.run(_LOOK)
    head, _, world = done.stdout.partition("=\n")
    process, memory, files = head.splitlines()
    return Seen(process, int(memory.split()[1]), int(files), world)


def _differences(first: Seen, now: Seen, since: int, index: int) -> list[str]:
    wrong = []
    if now.process != first.process:
        wrong.append(f"another agent: {first.process}, and now {now.process}")
    if now.world != first.world:
        old, new = set(first.world.splitlines()), set(now.world.splitlines())
        wrong.append(f"left by one of {since} to {index}: {new - old}; gone: {old - new}")
    return wrong


class _Session:
    """One host after another, at the VM's port."""

    def __init__(self, machine: Machine, figures: Figures) -> None:
        self._machine = machine
        self._figures = figures
        self._ids = itertools.count(1 << 60)
        self.answers = b""

    async def feed(self, given: Input) -> list[str]:
        """Send one input; what was wrong with the answers."""
        debt = oracle.owed(given.data, drops=given.drops)
        strict = is_told_apart(debt, given)
        self.answers = b""
        reader, writer = await asyncio.open_unix_connection(self._machine.agent_socket)
        try:
            for data in given.writes:
                writer.write(data)
                await writer.drain()
            if not given.drops:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_DEADLINE if strict else _PATIENCE):
                        await self._receive(reader, debt.must.total())
        finally:
            await _close(writer)
        whole = oracle.cut(self.answers)[0]
        self.answers = self.answers[: sum(16 + len(frame.payload) for frame in whole)]
        wrong, read = oracle.check(debt, self.answers)
        if not strict:
            wrong = [what for what in wrong if not any(words in what for words in _OF_LINKS)]
        wrong += oracle.leaks([self.answers], debt.frames)
        self._note(given, read)
        wishes = wishes_of(debt)
        mounted = [
            wish for wish, is_unplug in wishes if not is_unplug and wish.path.startswith(SANDBOX)
        ]
        if mounted or given.drops or not strict or not debt.is_whole:
            await self.tidy(mounted)
        if any(is_unplug for _, is_unplug in wishes):
            await self._machine.run(_FIND_AGAIN)
        return wrong

    async def tidy(self, wishes: list[Wish], *, mounting: bool = False) -> None:
        """Undo what may have been done, as a host would; with `mounting`, do it before.

        Raises:
            RuntimeError: the agent does not.
        """
        reader, writer = await asyncio.open_unix_connection(self._machine.agent_socket)
        try:
            async with asyncio.timeout(_DEADLINE):
                greeting = Frame(
                    MessageType.NEGOTIATE_PROTOCOL,
                    next(self._ids),
                    encode_request(messages.negotiate_request()),
                )
                # Answers to the host before may come first.
                answer = messages.response_type(greeting.type), greeting.id
                decoder = FrameDecoder(sync_on=answer)
                await _asked(reader, writer, decoder, greeting)
                for kind in (messages.ADD, messages.REMOVE) if mounting else (messages.REMOVE,):
                    for wish in reversed([*dict.fromkeys(wishes)]):
                        request = wish.request(kind)
                        while text := await _asked(
                            reader,
                            writer,
                            decoder,
                            Frame(MessageType.MODIFY_SETTINGS, next(self._ids), request),
                        ):
                            if _BUSY not in text:  # with the input, whose host is gone
                                raise RuntimeError(f"{wish}: {kind} was refused: {text}")
        finally:
            await _close(writer)

    async def _receive(self, reader: asyncio.StreamReader, count: int) -> None:
        while len(oracle.cut(self.answers)[0]) < count:
            data = await reader.read(1 << 16)
            if not data:
                return
            self.answers += data

    def _note(self, given: Input, read: list[tuple[Cut, dict[str, Any]]]) -> None:
        figures = self._figures
        figures.inputs += 1
        figures.dropped += given.drops
        reached = False
        for answer, document in read:
            figures.note(document)
            if answer.kind == messages.response_type(MessageType.MODIFY_SETTINGS):
                done = not document["Result"]
                reached |= done or "disk 0:" in document.get("ErrorMessage", "")
                figures.verbs["done" if done else "refused"] += 1
        figures.reached += reached


async def _asked(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decoder: FrameDecoder, frame: Frame
) -> str:
    """Why a request was refused; empty if it was not."""
    writer.write(encode(frame))
    answers: list[Frame] = []
    while not answers:
        data = await reader.read(1 << 16)
        if not data:
            raise RuntimeError("the VM hung up")
        answers += decoder.feed(data)
    return Response.read(answers[0].payload).text


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def is_told_apart(debt: Debt, given: Input) -> bool:
    """Whether a port knows where this link begins and ends.

    It takes a read that begins as Negotiate does for the begin of a link, and has no way
    to hang up on a host that talks nonsense.
    """
    greeting = MessageType.NEGOTIATE_PROTOCOL.to_bytes(4, "little")
    begins = given.writes[0].startswith(greeting)
    return not debt.breaks and begins and given.data.count(greeting) == 1


def wishes_of(debt: Debt) -> list[tuple[Wish, bool]]:
    """What the frames may bring about, read as the agent reads it; whether it is an unplug."""
    found = []
    for frame in debt.frames:
        if frame.kind != MessageType.MODIFY_SETTINGS:
            continue
        with contextlib.suppress(MessageError, RequestError):
            request = ModifyRequest.read(decode(frame.payload))
            if request.resource_type == messages.SCSI_DEVICE:
                found.append((Wish(Slot.read(request.settings), 0, "", False), True))
            elif request.resource_type == messages.MAPPED_VIRTUAL_DISK:
                settings = DiskSettings.read(request.settings, adding=True)
                wish = Wish(settings.slot, settings.partition, settings.path, settings.block_device)
                found.append((wish, False))
    return found


def is_harmless(given: Input) -> bool:
    """Whether it can be sent: all that it can bring about is in the sandbox, and soon there."""
    debt = oracle.owed(given.data, drops=given.drops)
    frames, _ = oracle.cut(given.data)
    for frame in frames:
        if frame.kind != MessageType.MODIFY_SETTINGS:
            continue
        with contextlib.suppress(MessageError, RequestError):
            request = ModifyRequest.read(decode(frame.payload))
            timeout = read_timeout(request.settings)
            if timeout is None or timeout > _LONGEST_WAIT:
                return False
    for wish, is_unplug in wishes_of(debt):
        if is_unplug and wish.slot.lun in _LUNS and given.number % 20:
            return False  # the disk has to be found again each time
        if not wish.path.startswith(SANDBOX) and wish.path not in _REFUSED:
            return False
    return True
