#!/usr/bin/env python3
"""What client and agent take for a request, over a unix socket on the host.

    .venv/bin/python benchmarks/bridge.py [--json] [--runs N]

The agent's server is a process of its own whose disks do nothing at all (`bridge_peers.py`), so
what is measured is the way there and back: documents made and read, frames, ids, and the agent's
threads. The floor is the same number of bytes both ways between two asyncio programs that look
at none of them: bare streams, in turns with ours; a task and a future for each that is in flight.

For a long message it is also told how much memory is taken at the most for it by this end, beyond
what is left of it afterwards, in multiples of its size: how often it is there at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting import Report, arguments, in_turn, medians, run

from hotlun.bridge import messages
from hotlun.bridge.client import BridgeConnection
from hotlun.bridge.documents import encode_request, encode_response
from hotlun.bridge.frames import HEADER
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Awaitable, Iterator

    from hotlun.bridge.documents import Document

RUNS = 15
ONE_BY_ONE, AT_ONCE = 200, 1000
LONG = 1 << 20
PEERS = Path(__file__).with_name("bridge_peers.py")


@dataclass(frozen=True)
class Asked:
    """A request, and how long it and its answer are, in bytes."""

    kind: MessageType
    document: Document
    properties: dict[str, Any] | None = None
    """What the answer has besides."""

    @property
    def size(self) -> int:
        return HEADER.size + len(encode_request(self.document))

    @property
    def answer_size(self) -> int:
        activity = messages.NULL_ID
        if self.properties is None:
            answer = messages.response(activity_id=activity)
        else:
            answer = messages.properties_response(self.properties, activity_id=activity)
        return HEADER.size + len(encode_response(answer))


UNPLUG = {
    "RequestType": messages.REMOVE,
    "ResourceType": messages.SCSI_DEVICE,
    "Settings": {"Controller": 0, "Lun": 1},
}
SURVEY = {messages.EXTENSION: {"Disks": [{"Controller": 0, "Lun": 1, "Serial": str(LONG)}]}}
REQUESTS = {
    "nothing, by who reads": Asked(MessageType.START, messages.start_request()),
    "nothing, in a disk's lane": Asked(
        MessageType.MODIFY_SETTINGS, messages.modify_request(UNPLUG)
    ),
}
LONG_ONES = {
    "a long request": Asked(MessageType.START, {**messages.start_request(), "Unread": "x" * LONG}),
    "a long answer": Asked(
        MessageType.GET_PROPERTIES,
        messages.properties_request(SURVEY),
        {messages.EXTENSION: {"Disks": [{"Device": "x" * LONG}]}},
    ),
}


@contextlib.contextmanager
def peer(kind: str, directory: str, *sizes: int) -> Iterator[str]:
    """A process that serves; the path of its socket."""
    path = str(Path(directory, "-".join(map(str, (kind, *sizes)))))
    command = [sys.executable, str(PEERS), kind, path, *map(str, sizes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"listening\n":
                raise RuntimeError(f"{kind} does not listen")
            yield path
        finally:
            process.kill()


class Ours:
    """The client, and the agent."""

    def __init__(self, connection: BridgeConnection, asked: Asked) -> None:
        self._connection = connection
        self._asked = asked

    async def trip(self) -> None:
        answer = await self._connection.request(self._asked.kind, self._asked.document)
        if answer.code:
            raise RuntimeError(answer.text)

    async def many(self, count: int) -> None:
        await asyncio.gather(*(self.trip() for _ in range(count)))


class Bare:
    """Streams, and somebody who answers whatever comes; whoever asked first is answered first."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._data = bytes(asked.size)
        self._answer_size = asked.answer_size
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def trip(self) -> None:
        self._writer.write(self._data)
        await self._reader.readexactly(self._answer_size)

    async def many(self, count: int) -> None:
        trips = asyncio.gather(*(self._trip() for _ in range(count)))
        for _ in range(count):
            await self._reader.readexactly(self._answer_size)
            self._waiting.popleft().set_result(None)
        await trips

    async def _trip(self) -> None:
        answered = asyncio.get_running_loop().create_future()
        self._waiting.append(answered)
        self._writer.write(self._data)
        await answered


@contextlib.asynccontextmanager
async def pair(asked: Asked) -> AsyncIterator[tuple[Ours, Bare]]:
    """Both, connected."""
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        agent = stack.enter_context(peer("agent", directory))
        bare = stack.enter_context(peer("answer", directory, asked.size, asked.answer_size))
        connection = await stack.enter_async_context(BridgeConnection.connect_unix(agent))
        reader, writer = await asyncio.open_unix_connection(bare, limit=4 * LONG)
        stack.callback(writer.close)
        yield Ours(connection, asked), Bare(reader, writer, asked)


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    alone = report.table("one at a time, us", "", "p50", "p99", "floor p50", "floor p99", "ratio")
    together = report.table(f"{AT_ONCE} in flight", "", "a second", "us", "floor us", "ratio")
    for name, asked in REQUESTS.items():
        async with pair(asked) as (ours, bare):
            mine, floor = await _one_by_one(ours, bare, chosen.runs)
            report.ratios[f"{name}, one at a time"] = round(mine[0] / floor[0], 3)
            alone.rows.append((name, *mine, *floor, mine[0] / floor[0]))
            took = await _all_at_once(ours, bare, AT_ONCE, chosen.runs)
            one, thin = (1e6 * took[side] / AT_ONCE for side in ("ours", "bare"))
            report.ratios[f"{name}, {AT_ONCE} in flight"] = round(one / thin, 3)
            together.rows.append((name, round(1e6 / one), one, thin, one / thin))
    long = report.table(f"{LONG >> 20} MiB", "", "ms", "floor ms", "ratio", "in memory", "floor")
    for name, asked in LONG_ONES.items():
        async with pair(asked) as (ours, bare):
            took = await _all_at_once(ours, bare, 1, chosen.runs)
            one, thin = (1e3 * took[side] for side in ("ours", "bare"))
            report.ratios[name] = round(one / thin, 3)
            held = (await _held(ours), await _held(bare))
            long.rows.append((name, one, thin, one / thin, *(times / LONG for times in held)))
    return report


async def _one_by_one(ours: Ours, bare: Bare, runs: int) -> list[tuple[float, float]]:
    """The median and the 99th percentile of a round trip of each, in microseconds."""
    trips: dict[Ours | Bare, list[float]] = {ours: [], bare: []}

    async def several(side: Ours | Bare) -> float:
        for _ in range(ONE_BY_ONE):
            trips[side].append(await _seconds(side.trip()))
        return 0.0

    await in_turn(runs, ours=lambda: several(ours), bare=lambda: several(bare))
    cuts = (statistics.quantiles(taken, n=100) for taken in trips.values())
    return [(cut[49] * 1e6, cut[98] * 1e6) for cut in cuts]


async def _all_at_once(ours: Ours, bare: Bare, count: int, runs: int) -> dict[str, float]:
    """Seconds until so many are answered that were asked at once."""
    return medians(
        await in_turn(
            runs,
            ours=lambda: _seconds(ours.many(count)),
            bare=lambda: _seconds(bare.many(count)),
        )
    )


async def _seconds(work: Awaitable[None]) -> float:
    begin = time.perf_counter()
    await work
    return time.perf_counter() - begin


async def _held(side: Ours | Bare) -> int:
    """Bytes of memory at the most while one is asked and answered, beyond those after it."""
    tracemalloc.start()
    try:
        await side.trip()
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return most - after


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=RUNS, help=f"in place of {RUNS}")
    run(__doc__, measure, parser)
