"""How the host is reached: a link is one connection, from its first byte to its end.

A stream socket tells where a connection begins and ends. A virtio-serial port does
not quite: the guest has one file for all the hosts that come and go. What is known
of it (drivers/char/virtio_console.c, Linux 6.1):

* Without a host, reading gives end-of-file and poll(2) does not wait (POLLHUP).
  But every change wakes those who wait, so an edge-triggered epoll sleeps until
  there is one.
* A host that leaves and returns quickly, or while the VM is paused, may leave no
  trace but its first message. One read never has bytes of two connections in it,
  and the first word of Negotiate cannot occur in JSON; so a read that begins with
  that word begins a new link.
* Such a link's predecessor may still be hung up on afterwards, when the kernel gets
  to it; that is over as soon as it began.
* Writing without a host would wait for ever, so it is done without waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Protocol

from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.agent.kernel import Kernel

_READ_SIZE = 1 << 16
_SEND_TIMEOUT = 30.0
"""Seconds for a host to take an answer; one that does not is given up."""
_NO_HOST_TIMEOUT = 1.0
"""Seconds for a host to be there again before an answer to it is dropped."""
_LATE_HANGUP = 1.0
"""Seconds in which a link that took over may hear its predecessor's end."""
_LATE_HANGUP_LENGTH = 0.1
_POLL_AGAIN = 0.01
_RETRY = 0.1
"""Seconds between attempts at what announces nothing: a port's or a host's appearance."""

_GREETING = struct.pack("<I", MessageType.NEGOTIATE_PROTOCOL)

_log = logging.getLogger("hotlun.agent")


class LinkClosedError(OSError):
    """The connection is over; what was to be sent was not."""


class Link(Protocol):
    """One connection to a host. `receive` is for one thread, `send` for any."""

    def receive(self) -> bytes:
        """Some bytes, as they come; none when the connection is over."""

    def send(self, data: bytes) -> None:
        """Send all of it, not mixed with another thread's.

        Raises:
            OSError: the connection is over.
        """

    def close(self) -> None:
        """End it: nothing is received or sent from here on."""


class SocketLink:
    """A stream socket.

    Args:
        connected: to the host.
        send_timeout: seconds for the host to take an answer.
    """

    def __init__(self, connected: socket.socket, send_timeout: float = _SEND_TIMEOUT) -> None:
        self._socket = connected
        self._sending = threading.Lock()
        # For sending alone, unlike settimeout(). A struct timeval is two longs.
        timeval = struct.pack("@ll", int(send_timeout), int(send_timeout % 1 * 1_000_000))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def receive(self) -> bytes:
        try:
            return self._socket.recv(_READ_SIZE)
        except OSError as error:
            _log.info("the host is gone: %s", error)
            return b""

    def send(self, data: bytes) -> None:
        with self._sending:
            try:
                self._socket.sendall(data)
            except OSError:  # some of it may be sent, so nothing can follow
                self._shut_down()
                raise

    def close(self) -> None:
        self._shut_down()
        with self._sending:
            self._socket.close()

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_RDWR)


class Port:
    """A virtio-serial port, open; its hosts' connections come out of `links`.

    Args:
        source, sink: descriptors to read from and to write to, usually the same.
    """

    def __init__(self, source: int, sink: int) -> None:
        os.set_blocking(source, False)
        os.set_blocking(sink, False)
        self._source = source
        self._sink = sink
        self._epoll = select.epoll()
        self._epoll.register(source, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self._sending = threading.Lock()
        self._first = b""
        self._hangup_due = 0.0

    def links(self) -> Iterator[PortLink]:
        """Each connection, once it has said something.

        Raises:
            OSError: the port is gone.
        """
        while True:
            if not self._first:
                data = self._read()
                if not data:
                    self._epoll.poll()
                    continue
                self._first = data
            yield PortLink(self)

    def close(self) -> None:
        self._epoll.close()
        for descriptor in {self._source, self._sink}:
            os.close(descriptor)

    def receive(self, link: PortLink) -> bytes:
        """For `link`, the one that came last from `links`."""
        if self._first:
            first, self._first = self._first, b""
            return first
        while not link.closed:
            data = self._read()
            if data is None:
                self._epoll.poll()
            elif data.startswith(_GREETING):
                _log.info("another host is here; the one before left unseen")
                self._first = data
                self._hangup_due = time.monotonic() + _LATE_HANGUP
                break
            elif data or not self._is_late_hangup():
                return data
        return b""

    def send(self, link: PortLink, data: bytes) -> None:
        """For any link; one that is over sends nothing."""
        rest = memoryview(data)
        now = time.monotonic()
        deadline, host_deadline = now + _SEND_TIMEOUT, now + _NO_HOST_TIMEOUT
        with self._sending:
            while rest:
                if link.closed:
                    raise LinkClosedError("the host is gone")
                try:
                    rest = rest[os.write(self._sink, rest) :]
                    continue
                except BlockingIOError:
                    pass
                now = time.monotonic()
                if now > deadline or (now > host_deadline and not self._has_host()):
                    link.closed = True
                    raise LinkClosedError("the host does not read")
                self._wait_for_room()

    def settle(self) -> None:
        """Return when no thread is sending."""
        with self._sending:
            pass

    def _read(self) -> bytes | None:
        """Bytes; none without a host; None if there is nothing yet."""
        try:
            return os.read(self._source, _READ_SIZE)
        except BlockingIOError:
            return None

    def _is_late_hangup(self) -> bool:
        """Whether the end just read was the predecessor's; then the host is there again."""
        due, self._hangup_due = self._hangup_due, 0.0
        if time.monotonic() > due:
            return False
        end = time.monotonic() + _LATE_HANGUP_LENGTH
        while not self._has_host():
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_AGAIN)
        return True

    def _has_host(self) -> bool:
        poll = select.poll()
        poll.register(self._source, 0)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    def _wait_for_room(self) -> None:
        """Wait a little for room to write; without a host poll(2) would not wait at all."""
        if not self._has_host():
            time.sleep(_POLL_AGAIN)
            return
        poll = select.poll()
        poll.register(self._sink, select.POLLOUT)
        poll.poll(_RETRY * 1000)


class PortLink:
    """One host's stay at a port."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self.closed = False

    def receive(self) -> bytes:
        data = b"" if self.closed else self._port.receive(self)
        if not data:
            self.closed = True
        return data

    def send(self, data: bytes) -> None:
        self._port.send(self, data)

    def close(self) -> None:
        self.closed = True
        self._port.settle()


def port_links(kernel: Kernel, name: str) -> Iterator[Link]:
    """The connections of a virtio-serial port, which may come late, go and come again.

    Args:
        name: as given to the device (`org.hotlun.agent.0`), or the path of its node.
    """
    complained = False
    while True:
        try:
            path = name if name.startswith("/") else _port_path(kernel, name)
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            if not complained:
                _log.warning("waiting for the port %s: %s", name, error)
                complained = True
            time.sleep(_RETRY)
            continue
        _log.info("serving %s", path)
        complained = False
        port = Port(descriptor, descriptor)
        try:
            yield from port.links()
        except OSError as error:
            _log.warning("the port %s is gone: %s", path, error)
        finally:
            port.close()


def _port_path(kernel: Kernel, name: str) -> str:
    ports = os.path.join(kernel.sys, "class/virtio-ports")
    for port in kernel.names(ports):
        if kernel.read(os.path.join(ports, port, "name")) == name:
            return os.path.join(kernel.dev, port)
    raise FileNotFoundError(2, "no virtio-serial port has this name", name)


def listening_links(path: str) -> Iterator[Link]:
    """The connections to a unix socket made at `path`; a socket left there is replaced.

    Raises:
        OSError: it cannot be made, where something else is for instance.
    """
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(16)
        _log.info("listening at %s", path)
        while True:
            yield SocketLink(listener.accept()[0])


def dialled_links(family: int, address: tuple[int, int] | str) -> Iterator[Link]:
    """A connection to a host that listens, dialled again whenever it is over."""
    complained = False
    while True:
        dialling = socket.socket(family, socket.SOCK_STREAM)
        try:
            dialling.connect(address)
        except OSError as error:
            dialling.close()
            if not complained:
                _log.warning("dialling the host: %s", error)
                complained = True
            time.sleep(_RETRY)
            continue
        complained = False
        yield SocketLink(dialling)
        time.sleep(_RETRY)  # a host that accepts only to hang up must not be kept busy
