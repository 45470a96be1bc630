"""How hosts come, go and come again, on each kind of channel."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.guest import DEADLINE

from hotlun.agent import links
from hotlun.agent.kernel import Kernel
from hotlun.bridge import messages
from hotlun.bridge.documents import encode_request
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GREETING = encode(
    Frame(MessageType.NEGOTIATE_PROTOCOL, 5, encode_request(messages.negotiate_request()))
)
REQUEST = encode(Frame(MessageType.START, 6, encode_request(messages.start_request())))


class FakePort:
    """Two pipes with names, which hosts can open and close as they do a virtio-serial port.

    To the guest they look alike: without a host there is end-of-file and a hang-up.
    """

    def __init__(self, directory: Path) -> None:
        self._to_guest, self._to_host = directory / "to-guest", directory / "to-host"
        for path in (self._to_guest, self._to_host):
            os.mkfifo(path)
        source = os.open(self._to_guest, os.O_RDONLY | os.O_NONBLOCK)
        sink = os.open(self._to_host, os.O_RDWR | os.O_NONBLOCK)
        self.port = links.Port(source, sink)
        self.links = self.port.links()

    def connect(self) -> int:
        return os.open(self._to_guest, os.O_WRONLY)

    def read(self, size: int) -> bytes:
        with self._to_host.open("rb", buffering=0) as file:
            return file.read(size) or b""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakePort]:
    fake = FakePort(tmp_path)
    yield fake
    fake.port.close()


def test_a_port_gives_a_link_for_each_host(fake: FakePort) -> None:
    """It ends when the host leaves, and the next begins with the next one's first word."""
    for turn in range(3):
        host = fake.connect()
        os.write(host, GREETING)
        link = next(fake.links)
        assert link.receive() == GREETING
        link.send(b"answer %d" % turn)
        assert fake.read(100) == b"answer %d" % turn
        os.write(host, REQUEST)
        assert link.receive() == REQUEST
        os.close(host)
        assert link.receive() == b""
        assert link.receive() == b""


def test_a_port_without_a_host_is_waited_at_without_work(fake: FakePort) -> None:
    """After a hang-up poll(2) does not wait, and the agent must not spin for that."""
    host = fake.connect()
    os.write(host, GREETING)
    link = next(fake.links)
    link.receive()
    os.close(host)
    assert link.receive() == b""
    found: list[links.Link] = []
    waiting = threading.Thread(target=lambda: found.append(next(fake.links)), daemon=True)
    before = time.process_time()
    waiting.start()
    waiting.join(0.5)
    assert time.process_time() - before < 0.2
    host = fake.connect()
    os.write(host, GREETING)
    waiting.join(DEADLINE)
    assert found[0].receive() == GREETING
    os.close(host)


def test_a_greeting_begins_a_new_link_though_nobody_was_seen_to_leave(fake: FakePort) -> None:
    """With the VM paused meanwhile, one host's half frame is followed by another's greeting."""
    host = fake.connect()
    os.write(host, GREETING)
    old = next(fake.links)
    assert old.receive() == GREETING
    os.write(host, REQUEST[:20])
    assert old.receive() == REQUEST[:20]
    os.write(host, GREETING)
    assert old.receive() == b""
    new = next(fake.links)
    assert new.receive() == GREETING
    with pytest.raises(OSError, match="gone"):
        old.send(b"a late answer")
    new.send(b"mine")
    assert fake.read(100) == b"mine"
    os.close(host)


def test_the_hangup_of_a_host_before_does_not_end_the_new_link(fake: FakePort) -> None:
    """The kernel may get to it only after the new host's first word."""
    host = fake.connect()
    os.write(host, GREETING)
    old = next(fake.links)
    old.receive()
    os.write(host, GREETING)
    assert old.receive() == b""
    new = next(fake.links)
    new.receive()
    os.close(host)
    hosts: list[int] = []
    returned = threading.Timer(0.02, lambda: hosts.append(fake.connect()))
    returned.start()
    received: list[bytes] = []
    reading = threading.Thread(target=lambda: received.append(new.receive()), daemon=True)
    reading.start()
    returned.join(DEADLINE)
    os.write(hosts[0], REQUEST)
    reading.join(DEADLINE)
    assert received == [REQUEST]
    os.close(hosts[0])
    assert new.receive() == b""


def test_what_is_sent_to_nobody_is_dropped(fake: FakePort) -> None:
    """A writer does not wait for ever for room that nobody makes."""
    host = fake.connect()
    os.write(host, GREETING)
    link = next(fake.links)
    link.receive()
    os.close(host)
    with pytest.raises(OSError, match="does not read"):
        for _ in range(100):
            link.send(bytes(4096))
    assert link.receive() == b""


def test_a_host_that_does_not_read_is_given_up() -> None:
    """Its socket is full: nothing more fits, and the request's thread is needed elsewhere."""
    host, guest_end = socket.socketpair()
    link = links.SocketLink(guest_end, send_timeout=0.2)
    with pytest.raises(OSError, match="temporarily unavailable"):
        for _ in range(1000):
            link.send(bytes(1 << 16))
    assert link.receive() == b""
    link.close()
    host.close()


def test_a_port_is_found_by_its_name(tmp_path: Path) -> None:
    """It may come late; udev's links in /dev are not needed."""
    kernel = Kernel(sys=str(tmp_path / "sys"), dev=str(tmp_path))
    found: list[bytes] = []

    def serve() -> None:
        link = next(links.port_links(kernel, "org.hotlun.agent.0"))
        found.append(link.receive())

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    for number, name in ((1, "another"), (2, "org.hotlun.agent.0")):
        os.mkfifo(tmp_path / f"vport0p{number}")
        (tmp_path / f"sys/class/virtio-ports/vport0p{number}").mkdir(parents=True)
        (tmp_path / f"sys/class/virtio-ports/vport0p{number}/name").write_text(f"{name}\n")
    host = os.open(tmp_path / "vport0p2", os.O_WRONLY)
    os.write(host, GREETING)
    serving.join(DEADLINE)
    assert found == [GREETING]
    os.close(host)


def test_a_unix_socket_takes_one_host_after_another(tmp_path: Path) -> None:
    """Also where an earlier agent's socket was left."""
    path = str(tmp_path / "socket")
    for _ in range(2):
        listening = links.listening_links(path)
        accepted: list[links.Link] = []
        accepting = threading.Thread(
            target=lambda into, source: into.append(next(source)),
            args=(accepted, listening),
            daemon=True,
        )
        accepting.start()
        with connected(path) as host:
            accepting.join(DEADLINE)
            host.sendall(GREETING)
            assert accepted[0].receive() == GREETING
            accepted[0].send(b"answer")
            assert host.recv(100) == b"answer"
            accepted[0].close()
            assert host.recv(100) == b""


def test_only_a_socket_makes_way_for_a_socket(tmp_path: Path) -> None:
    """A file at the path given stays, and is what is wrong."""
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(OSError, match="in use"):
        next(links.listening_links(str(path)))
    assert path.read_text() == "precious"


def connected(path: str) -> socket.socket:
    end = time.monotonic() + DEADLINE
    while True:
        host = socket.socket(socket.AF_UNIX)
        try:
            host.connect(path)
        except OSError:
            host.close()
            assert time.monotonic() < end
            time.sleep(0.01)
        else:
            return host


def test_a_host_that_listens_is_dialled_again_and_again(tmp_path: Path) -> None:
    """Before it listens, and after it is gone: as over vsock, whose sockets are the same."""
    path = str(tmp_path / "socket")
    dialled = links.dialled_links(socket.AF_UNIX, path)
    for _ in range(2):
        found: list[links.Link] = []
        dialling = threading.Thread(
            target=lambda into: into.append(next(dialled)),
            args=(found,),
            daemon=True,
        )
        dialling.start()
        time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            host, _ = listener.accept()
        dialling.join(DEADLINE)
        host.sendall(GREETING)
        assert found[0].receive() == GREETING
        host.close()
        assert found[0].receive() == b""
        found[0].close()
        os.unlink(path)
