"""The first connection at a listening socket, in the loop and in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from support.dialling import Place, check_nothing_is_left, in_turns
from support.peer import DEADLINE

from hotlun.bridge import accepting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Accept = Callable[[socket.socket, accepting.Wanted], Awaitable[socket.socket]]

WAYS = (
    [accepting.in_thread] if sys.platform == "win32" else [accepting.in_thread, accepting.in_loop]
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Of threads and sockets."""
    yield
    check_nothing_is_left()


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def accept(request: pytest.FixtureRequest) -> Accept:
    """The way to accept."""
    way: Accept = request.param
    return way


class Windows(socket.socket):
    """A listening socket as Windows has them: to shut it down is refused, to close it wakes."""

    @classmethod
    def listening(cls) -> Windows:
        listener = cls(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        return listener

    def shutdown(self, how: int) -> None:
        raise OSError(errno.ENOTCONN, "not connected")

    def close(self) -> None:
        if self.fileno() != -1 and sys.platform != "win32":
            super().shutdown(socket.SHUT_RDWR)
        super().close()


def anybody(_: object) -> bool:
    return True


def is_accepting() -> bool:
    return any(thread.name == "hotlun bridge accept" for thread in threading.enumerate())


async def until_nobody_accepts() -> None:
    async with asyncio.timeout(DEADLINE):
        while is_accepting():
            await asyncio.sleep(0.01)


async def test_the_first_is_taken_and_no_other(accept: Accept) -> None:
    """The listening socket is closed by then."""
    listener = Place().listen()
    with socket.create_connection(listener.getsockname()) as guest:
        with await accept(listener, anybody) as connection:
            assert connection.getpeername() == guest.getsockname()
        assert listener.fileno() == -1


async def test_one_who_comes_later_is_taken(accept: Accept) -> None:
    """It is waited for."""
    listener = Place().listen()
    waiting = asyncio.ensure_future(accept(listener, anybody))
    await in_turns(5)
    with (
        socket.create_connection(listener.getsockname()) as guest,
        await asyncio.wait_for(waiting, DEADLINE) as connection,
    ):
        assert connection.getpeername() == guest.getsockname()


async def test_the_wrong_ones_are_hung_up_on(accept: Accept) -> None:
    """And the right one is taken behind them."""
    listener = Place().listen()
    address = listener.getsockname()
    with socket.socket() as right:
        right.bind(("127.0.0.1", 0))
        port = right.getsockname()[1]
        wrong = [socket.create_connection(address) for _ in range(3)]
        right.connect(address)
        with await accept(listener, lambda peer: bool(peer[1] == port)) as connection:
            assert connection.getpeername()[1] == port
            for guest in wrong:
                with guest:
                    guest.settimeout(DEADLINE)
                    assert guest.recv(1) == b""


@pytest.mark.parametrize("turns", range(8))
async def test_cancelled_around_the_moment_when_somebody_comes(accept: Accept, turns: int) -> None:
    """The connection is closed, unless it was given to the caller before."""
    listener = Place().listen()
    waiting = asyncio.ensure_future(accept(listener, anybody))
    await in_turns(3)
    with socket.create_connection(listener.getsockname()) as guest:
        await in_turns(turns)
        if waiting.cancel():
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            waiting.result().close()
        await until_nobody_accepts()
        guest.settimeout(DEADLINE)
        with contextlib.suppress(ConnectionResetError):  # it had not been accepted
            assert guest.recv(1) == b""
        assert listener.fileno() == -1


async def test_cancelled_before_anybody_comes(accept: Accept) -> None:
    """At once, and nobody listens any more."""
    for turns in range(5):
        listener = Place().listen()
        address = listener.getsockname()
        waiting = asyncio.ensure_future(accept(listener, anybody))
        await in_turns(1 + turns)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until_nobody_accepts()
        with pytest.raises(ConnectionError):
            socket.create_connection(address)


class Refusing(socket.socket):
    """A listening socket at which the first to dial have hung up before they were accepted."""

    hung_up: tuple[type[ConnectionError], ...] = (ConnectionAbortedError, ConnectionResetError)

    def accept(self) -> tuple[socket.socket, object]:
        if self.hung_up:
            error, *others = self.hung_up
            self.hung_up = tuple(others)
            raise error
        return super().accept()


async def test_who_hangs_up_first_is_not_the_end(accept: Accept) -> None:
    """Linux calls that aborted, Windows reset; a guest dials again."""
    listener = Refusing(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with (
        socket.create_connection(listener.getsockname()) as guest,
        await asyncio.wait_for(accept(listener, anybody), DEADLINE) as connection,
    ):
        assert connection.getpeername() == guest.getsockname()
    assert not listener.hung_up


class TestWhereOnlyClosingWakes:
    async def test_it_is_closed_once_the_thread_is_inside(self) -> None:
        """Then its number cannot be met as another's."""
        listener = Windows.listening()
        waiting = asyncio.ensure_future(accepting.in_thread(listener, anybody))
        await in_turns(3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert listener.fileno() != -1  # it may be on its way there
        await until_nobody_accepts()
        assert listener.fileno() == -1

    @pytest.mark.skipif(sys.platform == "win32", reason="there every stack that can be said fits")
    async def test_it_is_closed_without_another_thread_too(self) -> None:
        """None may be to be had; who is cancelled hears nothing of that."""
        listener = Windows.listening()
        waiting = asyncio.ensure_future(accepting.in_thread(listener, anybody))
        await in_turns(3)
        usual = threading.stack_size(1 << 46)  # more than there is
        try:
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        finally:
            threading.stack_size(usual)
        await until_nobody_accepts()
        assert listener.fileno() == -1

    async def test_it_is_closed_at_once_when_it_must_be_inside(self) -> None:
        """As at a deadline: the address is free for who listens again."""
        listener = Windows.listening()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await accepting.in_thread(listener, anybody)
        assert listener.fileno() == -1
        await until_nobody_accepts()


async def test_a_socket_that_does_not_listen(accept: Accept) -> None:
    """It is closed, and the error is told."""
    idle = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with pytest.raises(OSError, match="argument"):
        await accept(idle, anybody)
    assert idle.fileno() == -1


def test_the_loop_is_closed_meanwhile() -> None:
    """What comes then is closed: nobody will ask for it."""
    listener = Place().listen()
    loop = asyncio.new_event_loop()
    task = loop.create_task(accepting.in_thread(listener, anybody))
    loop.run_until_complete(in_turns(3))
    loop.set_exception_handler(lambda *_: None)  # of the task that is left, which is the point
    loop.close()
    with socket.create_connection(listener.getsockname()) as guest:
        guest.settimeout(DEADLINE)
        assert guest.recv(1) == b""
    del task
