"""A transport whose socket blocks, as its protocol sees it."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from support.dialling import bridge_threads, check_nothing_is_left, in_turns
from support.peer import DEADLINE

from hotlun.bridge.threaded import ThreadTransport, open_streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

MUCH = b"much" * (1 << 20)
"""More than any socket takes at once."""


not_on_wine = pytest.mark.skipif(
    sys.platform == "win32", reason="on Wine 8 nothing wakes a thread inside send(), nor an error"
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of threads and sockets."""
    yield
    check_nothing_is_left()


class Heard(asyncio.Protocol):
    """Notes what a transport tells it, and lets tests wait for that."""

    def __init__(self, *, keeps_open: bool = False) -> None:
        self.events: list[str] = []
        self.data = bytearray()
        self.on_data: Callable[[], object] = lambda: None
        self.error: Exception | None = None
        self._keeps_open = keeps_open
        self._changed = asyncio.Event()

    def connection_made(self, _: asyncio.BaseTransport) -> None:
        self._note("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self._changed.set()
        self.on_data()

    def eof_received(self) -> bool:
        self._note("end")
        return self._keeps_open

    def pause_writing(self) -> None:
        self._note("pause")

    def resume_writing(self) -> None:
        self._note("resume")

    def connection_lost(self, error: Exception | None) -> None:
        self.error = error
        self._note("lost")

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, holds: Callable[[], object]) -> None:
        """Wait for the transport to have told that."""
        async with asyncio.timeout(DEADLINE):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def lost(self) -> None:
        await self.until(lambda: "lost" in self.events)


class Pair:
    """A transport, its protocol, and the other end of its socket."""

    def __init__(
        self, connection: socket.socket, other: socket.socket, *, keeps_open: bool = False
    ) -> None:
        self.socket, self.other = connection, other
        for each in (connection, other):  # else a pair of TCP may hold 40 MiB
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                each.setsockopt(socket.SOL_SOCKET, buffer, 1 << 16)
        self.heard = Heard(keeps_open=keeps_open)
        self.transport = ThreadTransport(
            asyncio.get_running_loop(), connection, self.heard, "the guest"
        )
        other.setblocking(False)

    async def read(self, size: int) -> bytes:
        """So many bytes at the other end, or all until its end."""
        data = bytearray()
        async with asyncio.timeout(DEADLINE):
            while len(data) < size:
                got = await asyncio.get_running_loop().sock_recv(self.other, size - len(data))
                if not got:
                    break
                data += got
        return bytes(data)

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE):
            await asyncio.get_running_loop().sock_sendall(self.other, data)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A pair, that is ended and closed."""
    pair = Pair(*socket.socketpair())
    yield pair
    pair.transport.abort()
    await pair.heard.lost()
    pair.other.close()


class TestWriting:
    async def test_goes_out_in_order(self, pair: Pair) -> None:
        """Piece behind piece."""
        pair.transport.writelines([b"one ", b"two ", b""])
        pair.transport.write(memoryview(b"three"))
        assert await pair.read(13) == b"one two three"

    async def test_is_paused_above_the_limit_and_resumed_below(self, pair: Pair) -> None:
        """Once each; the limits are asyncio's."""
        assert pair.transport.get_write_buffer_limits() == (1 << 14, 1 << 16)
        for _ in range(3):
            pair.transport.write(MUCH)
        assert pair.heard.events == ["made", "pause"]
        assert pair.transport.get_write_buffer_size() == 3 * len(MUCH)
        assert await pair.read(3 * len(MUCH)) == 3 * MUCH
        await pair.heard.until(lambda: "resume" in pair.heard.events)
        assert pair.heard.events == ["made", "pause", "resume"]
        assert not pair.transport.get_write_buffer_size()

    async def test_has_the_limits_that_are_set(self, pair: Pair) -> None:
        """And is paused and resumed by them from then on."""
        pair.transport.write(MUCH)
        pair.transport.set_write_buffer_limits(high=2 * len(MUCH))
        assert pair.transport.get_write_buffer_limits() == (len(MUCH) // 2, 2 * len(MUCH))
        pair.transport.set_write_buffer_limits(low=10)
        assert pair.transport.get_write_buffer_limits() == (10, 40)
        pair.transport.set_write_buffer_limits(2 * len(MUCH), len(MUCH))
        assert pair.heard.events == ["made", "pause", "resume"]
        with pytest.raises(ValueError, match="low <= high"):
            pair.transport.set_write_buffer_limits(high=1, low=2)

    async def test_never_blocks_the_loop(self, pair: Pair) -> None:
        """However much, though the other end reads nothing."""
        pair.transport.write(MUCH)
        await in_turns(10)
        assert pair.transport.get_write_buffer_size()

    @not_on_wine
    async def test_to_nobody_is_an_error(self, pair: Pair) -> None:
        """The protocol is told of it, once."""
        pair.other.close()
        pair.transport.write(MUCH)
        await pair.heard.lost()
        assert pair.heard.events.count("lost") == 1
        assert pair.socket.fileno() == -1

    async def test_after_the_end_is_of_no_consequence(self, pair: Pair) -> None:
        """As for any transport."""
        pair.transport.abort()
        pair.transport.write(b"late")
        assert not pair.transport.get_write_buffer_size()
        assert not pair.transport.can_write_eof()


class TestReading:
    async def test_stops_while_it_is_paused(self, pair: Pair) -> None:
        """Nothing is told then, and little is read; all is there afterwards."""
        pair.transport.pause_reading()
        assert not pair.transport.is_reading()
        sending = asyncio.create_task(pair.send(MUCH))
        done, _ = await asyncio.wait([sending], timeout=0.2)
        assert not done
        assert not pair.heard.data
        pair.transport.resume_reading()
        pair.transport.resume_reading()
        await sending
        await pair.heard.until(lambda: len(pair.heard.data) == len(MUCH))
        assert pair.heard.data == MUCH

    async def test_can_be_paused_and_resumed_at_each_piece(self, pair: Pair) -> None:
        """In order, and nothing is lost."""
        transport, loop = pair.transport, asyncio.get_running_loop()

        def one_piece() -> None:
            transport.pause_reading()
            loop.call_soon(transport.resume_reading)

        pair.heard.on_data = one_piece
        numbers = b"".join(number.to_bytes(4, "big") for number in range(1 << 18))
        await pair.send(numbers)
        await pair.heard.until(lambda: len(pair.heard.data) == len(numbers))
        assert pair.heard.data == numbers

    async def test_of_what_the_loop_has_no_time_for_is_bounded(self, pair: Pair) -> None:
        """The thread does not run ahead of a loop that is busy."""
        sending = threading.Thread(target=_send_all, args=(pair.other.dup(), MUCH))
        sending.start()
        sending.join(0.2)  # the loop does not go round meanwhile
        assert sending.is_alive()
        await pair.heard.until(lambda: len(pair.heard.data) == len(MUCH))
        sending.join(DEADLINE)

    async def test_of_the_end_is_told_behind_the_data(self, pair: Pair) -> None:
        """Then it is closed, and nothing more is told."""
        await pair.send(b"last words")
        pair.other.shutdown(socket.SHUT_WR)
        await pair.heard.lost()
        assert (bytes(pair.heard.data), pair.heard.error) == (b"last words", None)
        assert pair.heard.events == ["made", "end", "lost"]

    async def test_of_the_end_waits_while_it_is_paused(self, pair: Pair) -> None:
        """As the data before it does."""
        pair.transport.pause_reading()
        await pair.send(b"last words")
        pair.other.close()
        await in_turns(10)
        assert pair.heard.events == ["made"]
        pair.transport.resume_reading()
        await pair.heard.lost()
        assert bytes(pair.heard.data) == b"last words"

    async def test_ends_before_writing_does(self) -> None:
        """Where the protocol wants that: as streams do."""
        pair = Pair(*socket.socketpair(), keeps_open=True)
        pair.other.shutdown(socket.SHUT_WR)
        await pair.heard.until(lambda: "end" in pair.heard.events)
        pair.transport.write(b"an answer")
        pair.transport.close()
        with pair.other:
            assert await pair.read(100) == b"an answer"
            await pair.heard.lost()


class TestEnding:
    async def test_writes_what_was_to_be_written(self, pair: Pair) -> None:
        """Behind that the other end sees the end."""
        pair.transport.write(MUCH)
        pair.transport.close()
        assert pair.transport.is_closing()
        pair.transport.close()
        assert await pair.read(2 * len(MUCH)) == MUCH
        await pair.heard.lost()
        assert (pair.heard.error, pair.socket.fileno()) == (None, -1)

    async def test_at_once_when_it_is_aborted(self, pair: Pair) -> None:
        """Though the other end takes nothing."""
        pair.transport.write(MUCH)
        pair.transport.close()
        pair.transport.abort()
        pair.transport.abort()
        await pair.heard.lost()
        assert pair.heard.events.count("lost") == 1
        assert (pair.heard.error, pair.socket.fileno()) == (None, -1)

    async def test_while_it_is_paused(self, pair: Pair) -> None:
        """With pieces that nobody has had, and a thread that waits for room."""
        pair.transport.pause_reading()
        sending = asyncio.create_task(pair.send(MUCH))
        await asyncio.wait([sending], timeout=0.1)
        pair.transport.abort()
        await pair.heard.lost()
        assert not pair.heard.data
        with pytest.raises(ConnectionError):
            await sending

    async def test_is_complete_when_it_is_told(self) -> None:
        """`wait_closed` returns when the socket is closed, and the threads do no more."""
        for _ in range(20):
            ours, other = socket.socketpair()
            _, writer = open_streams(ours, "the guest")
            writer.write(b"x")
            writer.close()
            await writer.wait_closed()
            assert ours.fileno() == -1
            other.close()

    @not_on_wine
    @pytest.mark.parametrize("closing_wakes", [True, False])
    async def test_is_told_though_threads_are_stuck(self, closing_wakes: bool) -> None:
        """Once: where only closing wakes who is inside, and where nothing does."""
        ours, other = socket.socketpair()
        stubborn = Stubborn.of(ours)
        stubborn.closing_wakes = closing_wakes
        pair = Pair(stubborn, other)
        pair.transport.write(MUCH)
        await in_turns(5)
        pair.transport.abort()
        await pair.heard.lost()
        assert (pair.heard.error, stubborn.fileno()) == (None, -1)
        pair.other.close()
        async with asyncio.timeout(DEADLINE):
            while bridge_threads():
                await asyncio.sleep(0.01)
        await in_turns(3)
        assert pair.heard.events.count("lost") == 1


class Stubborn(socket.socket):
    """Nobody inside it is woken by shutting it down, as on Wine."""

    closing_wakes = True

    @classmethod
    def of(cls, other: socket.socket) -> Stubborn:
        return cls(other.family, other.type, other.proto, fileno=other.detach())

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None:
        if self.closing_wakes and self.fileno() != -1 and sys.platform != "win32":
            super().shutdown(socket.SHUT_RDWR)
        super().close()


def _send_all(connection: socket.socket, data: bytes) -> None:
    with connection:
        connection.settimeout(DEADLINE)
        connection.sendall(data)


class TestALoopThatIsClosed:
    @staticmethod
    def left_open() -> tuple[ThreadTransport, socket.socket]:
        """By a loop that was closed before it."""

        async def opened() -> Pair:
            pair = Pair(*socket.socketpair())
            await in_turns(3)
            return pair

        loop = asyncio.new_event_loop()
        pair = loop.run_until_complete(opened())
        loop.close()
        return pair.transport, pair.other

    def test_and_the_other_end_too(self) -> None:
        """Both threads end, though nobody can be told."""
        _, other = self.left_open()
        other.close()

    def test_and_then_the_transport(self) -> None:
        """It ends as ever."""
        transport, other = self.left_open()
        transport.abort()
        other.setblocking(True)
        other.settimeout(DEADLINE)
        assert other.recv(1) == b""
        other.close()


@pytest.mark.skipif(sys.platform == "win32", reason="there every stack that can be said fits")
async def test_there_can_be_no_more_threads() -> None:
    """The socket is closed, and the error is one of the connection's."""
    ours, other = socket.socketpair()
    usual = threading.stack_size(1 << 46)  # more than there is
    try:
        with other, pytest.raises(OSError, match="cannot have a thread"):
            open_streams(ours, "the guest")
    finally:
        threading.stack_size(usual)
    assert ours.fileno() == -1
