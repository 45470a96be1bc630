"""The agent's server over a socket: who is answered what, in which order, on which link."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from support.guest import DEADLINE

from hotlun.agent.errors import RequestError
from hotlun.agent.links import SocketLink
from hotlun.agent.queries import Found
from hotlun.agent.server import FEATURES, Server
from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import encode_request
from hotlun.bridge.frames import DEFAULT_LIMIT, HEADER, Frame, FrameDecoder, encode
from hotlun.bridge.messages import NULL_ID, MessageType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hotlun.agent.queries import DiskQuery
    from hotlun.agent.settings import DiskSettings, Slot


class ScriptedDisks:
    """Notes what it is asked for, and does what the test put at the path."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.at: dict[str, Callable[[], None]] = {}
        self.wanted: Callable[[], bool] = lambda: True

    def mount(self, settings: DiskSettings, wanted: Callable[[], bool]) -> None:
        self.wanted = wanted
        self._do("mount", settings.path, settings.slot)

    def unmount(self, settings: DiskSettings) -> None:
        self._do("unmount", settings.path, settings.slot)

    def unplug(self, slot: Slot, timeout: float | None) -> None:
        self._do("unplug", "" if timeout is None else f"within {timeout:g} s", slot)

    def survey(self, asked: list[DiskQuery]) -> list[Found]:
        for disk in asked:
            self._do("survey", disk.serial, disk.slot)
        return [
            Found(messages.OWN, [mount.path == "/there" for mount in disk.mounts]) for disk in asked
        ]

    def _do(self, verb: str, path: str, slot: Slot) -> None:
        self.at.get(path, lambda: None)()
        self.done.append(f"{verb} {slot} {path}".rstrip())


class Host:
    """A host's end of one link to the server."""

    def __init__(self, server: Server) -> None:
        self.socket, guest_end = socket.socketpair()
        self.socket.settimeout(DEADLINE)
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []
        self._ids = itertools.count(7)
        self.thread = threading.Thread(
            target=server.serve, args=(SocketLink(guest_end),), daemon=True
        )
        self.thread.start()

    def send(self, kind: int, document: Any = None, *, payload: bytes | None = None) -> int:
        number = next(self._ids)
        if payload is None:
            payload = json.dumps(document).encode()
        self.socket.sendall(encode(Frame(kind, number, payload)))
        return number

    def receive(self) -> tuple[Frame, dict[str, Any]]:
        while not self._frames:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._frames += self._decoder.feed(data)
        frame = self._frames.pop(0)
        return frame, json.loads(frame.payload)

    def ask(self, kind: int, document: Any = None, *, payload: bytes | None = None) -> Any:
        number = self.send(kind, document, payload=payload)
        frame, answer = self.receive()
        assert (frame.type, frame.id) == (messages.response_type(kind), number)
        return answer

    def code(self, kind: int, document: Any = None, *, payload: bytes | None = None) -> HResult:
        return HResult(self.ask(kind, document, payload=payload)["Result"] & 0xFFFFFFFF)

    def negotiate(self) -> Host:
        assert self.ask(MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request())["Result"] == 0
        return self

    def modify(self, kind: str, resource: str, **settings: Any) -> int:
        return self.send(MessageType.MODIFY_SETTINGS, modification(kind, resource, settings))

    def hang_up(self) -> None:
        self.socket.close()
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()


def modification(kind: str, resource: str, settings: Any) -> dict[str, Any]:
    request = {"RequestType": kind, "ResourceType": resource, "Settings": settings}
    return messages.modify_request(request)


@pytest.fixture
def disks() -> ScriptedDisks:
    return ScriptedDisks()


@pytest.fixture
def server(disks: ScriptedDisks) -> Server:
    return Server(disks)


@pytest.fixture
def host(server: Server) -> Iterator[Host]:
    host = Host(server)
    yield host
    host.hang_up()


def test_negotiate_announces_what_is_there(host: Host) -> None:
    """Linux, schema 2.1, version 4, and our extension with its features."""
    answer = host.ask(MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request())
    assert answer == {
        "Result": 0,
        "ActivityId": NULL_ID,
        "Version": 4,
        "Capabilities": {
            "SupportedSchemaVersions": [{"Major": 2, "Minor": 1}],
            "RuntimeOsType": "Linux",
            "GuestDefinedCapabilities": {"Hotlun": {"Version": 1, "Features": FEATURES}},
        },
    }


@pytest.mark.parametrize(
    ("lowest", "highest", "code"),
    [
        (4, 4, HResult.OK),
        (3, 9, HResult.OK),
        (0, 1 << 31, HResult.OK),
        (5, 5, HResult.UNSUPPORTED_PROTOCOL_VERSION),
        (1, 3, HResult.UNSUPPORTED_PROTOCOL_VERSION),
        (9, 3, HResult.UNSUPPORTED_PROTOCOL_VERSION),
        (-1, 4, HResult.INVALID_JSON),
        (4, 1 << 32, HResult.INVALID_JSON),
        ("4", 4, HResult.INVALID_JSON),
    ],
)
def test_negotiate_takes_ranges_with_four_in_them(
    host: Host, lowest: Any, highest: Any, code: HResult
) -> None:
    """Others get the code for that, and may try again."""
    document = {"MinimumVersion": lowest, "MaximumVersion": highest}
    assert host.code(MessageType.NEGOTIATE_PROTOCOL, document) == code
    again = host.code(MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request())
    assert (again == HResult.OK) == (code != HResult.OK)


def test_negotiate_comes_first_and_once(host: Host, disks: ScriptedDisks) -> None:
    """Before it nothing is served, and after it no other."""
    modify = modification("Add", "MappedVirtualDisk", {"MountPath": "/m"})
    early = host.ask(MessageType.MODIFY_SETTINGS, modify)
    assert early["Result"] & 0xFFFFFFFF == HResult.NOT_IMPLEMENTED
    assert "before Negotiate" in early["ErrorMessage"]
    assert host.code(MessageType.CREATE, messages.create_request()) == HResult.NOT_IMPLEMENTED
    host.negotiate()
    again = host.ask(MessageType.NEGOTIATE_PROTOCOL, messages.negotiate_request())
    assert again["Result"] & 0xFFFFFFFF == HResult.NOT_IMPLEMENTED
    assert "again" in again["ErrorMessage"]
    assert host.code(MessageType.MODIFY_SETTINGS, modify) == HResult.OK
    assert disks.done == ["mount 0:0 /m"]


def test_every_feature_has_its_word_once() -> None:
    """A host asks for nothing that is not in the list, so what the agent has must be."""
    words = {value for name, value in vars(messages).items() if name.startswith("FEATURE_")}
    assert set(FEATURES) <= words
    assert len(FEATURES) == len(set(FEATURES))


def test_each_link_negotiates_for_itself(server: Server, host: Host) -> None:
    """Nothing of one connection is true of the next."""
    host.negotiate()
    other = Host(server)
    assert other.code(MessageType.START, messages.start_request()) == HResult.NOT_IMPLEMENTED
    other.hang_up()


def test_the_three_verbs_reach_the_disk(host: Host, disks: ScriptedDisks) -> None:
    """With zero members missing, names in any case, unknown members, no RequestType."""
    host.negotiate()
    for kind, resource, settings in (
        ("Add", "MappedVirtualDisk", {"MountPath": "/run/m0", "Lun": 1, "Controller": 3}),
        ("", "MappedVirtualDisk", {"mountpath": "//run/./m1/", "LUN": 2, "Unheard": {"of": [1]}}),
        ("Remove", "MappedVirtualDisk", {"MountPath": "/run/m0", "Encrypted": True}),
        ("Remove", "SCSIDevice", {}),
        ("Remove", "SCSIDevice", {"Lun": 3, "TimeoutInMs": 1500}),
    ):
        document = modification(kind, resource, settings)
        assert host.code(MessageType.MODIFY_SETTINGS, document) == HResult.OK
    assert disks.done == [
        "mount 3:1 /run/m0",
        "mount 0:2 /run/m1",
        "unmount 0:0 /run/m0",
        "unplug 0:0",
        "unplug 0:3 within 1.5 s",
    ]


@pytest.mark.parametrize(
    ("document", "code"),
    [
        ({"ContainerId": NULL_ID}, HResult.INVALID_JSON),
        ({"ContainerId": NULL_ID, "Request": 7}, HResult.INVALID_JSON),
        (modification("Add", "MappedVirtualDisk", None), HResult.INVALID_JSON),
        (modification("Add", "MappedVirtualDisk", {"Lun": 300}), HResult.INVALID_JSON),
        (modification("Add", "MappedVirtualDisk", {"Lun": -1}), HResult.INVALID_JSON),
        (modification("Add", "MappedVirtualDisk", {"Lun": 1.5}), HResult.INVALID_JSON),
        (modification("Add", "MappedVirtualDisk", {"Options": "ro"}), HResult.INVALID_JSON),
        (modification("Add", "MappedVirtualDisk", {"MountPath": "m"}), HResult.INVALID_ARGUMENT),
        (
            modification("Add", "MappedVirtualDisk", {"Options": ["\ud800"]}),
            HResult.INVALID_ARGUMENT,
        ),
        (
            modification("Add", "MappedVirtualDisk", {"Filesystem": "\ud800"}),
            HResult.INVALID_ARGUMENT,
        ),
        (modification("Add", "MappedVirtualDisk", {"Encrypted": True}), HResult.INVALID_ARGUMENT),
        (modification("Add", "MappedVirtualDisk", {"Key": "c2VjcmV0!"}), HResult.INVALID_ARGUMENT),
        (modification("Remove", "MappedVirtualDisk", {"Key": 7}), HResult.INVALID_JSON),
        (
            modification("Remove", "MappedVirtualDisk", {"Verity": {"RootHash": "no"}}),
            HResult.INVALID_ARGUMENT,
        ),
        (modification("Add", "MappedVirtualDisk", {"Size": 1 << 64}), HResult.INVALID_JSON),
        (modification("Remove", "SCSIDevice", {"TimeoutInMs": -1}), HResult.INVALID_JSON),
        (modification("Update", "MappedVirtualDisk", {}), HResult.FAIL),
        (modification("Add", "SCSIDevice", {}), HResult.FAIL),
        (modification("Add", "CombinedLayers", {}), HResult.FAIL),
        (modification("Add", "", {}), HResult.FAIL),
        (
            {**modification("Remove", "SCSIDevice", {}), "ContainerId": "another"},
            HResult.SYSTEM_NOT_FOUND,
        ),
        ({**modification("Remove", "SCSIDevice", {}), "ContainerId": 3}, HResult.INVALID_JSON),
    ],
)
def test_a_request_that_makes_no_sense_has_its_code(
    host: Host, disks: ScriptedDisks, document: Any, code: HResult
) -> None:
    """And words, and touches nothing."""
    answer = host.negotiate().ask(MessageType.MODIFY_SETTINGS, document)
    assert answer["Result"] & 0xFFFFFFFF == code
    assert answer["ErrorMessage"]
    assert answer["ErrorRecords"][0]["Result"] == answer["Result"]
    assert disks.done == []


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff", b"[]", b"7", b"{" * 9999, b"\0" * 99])
def test_a_payload_that_is_no_document_has_its_code(host: Host, payload: bytes) -> None:
    """The link goes on."""
    host.negotiate()
    assert host.code(MessageType.MODIFY_SETTINGS, payload=payload) == HResult.INVALID_JSON
    assert host.code(MessageType.START, messages.start_request()) == HResult.OK


@pytest.mark.parametrize(
    "kind",
    [
        MessageType.SHUTDOWN_GRACEFUL,
        MessageType.EXECUTE_PROCESS,
        MessageType.DUMP_STACKS,
        MessageType.MODIFY_SERVICE_SETTINGS,
        MessageType.MODIFY_SETTINGS + 1,
        0,
        0xFFFFFFFF,
        0x40000000,
    ],
)
def test_what_is_not_served_is_said_so(host: Host, kind: int) -> None:
    """With the matching response type, before and after Negotiate, whatever is in it."""
    document = messages.start_request()
    assert host.code(kind, document) == HResult.NOT_IMPLEMENTED
    assert host.negotiate().code(kind, document) == HResult.NOT_IMPLEMENTED
    assert host.code(kind, payload=b"\xff") == HResult.NOT_IMPLEMENTED


def test_the_vm_itself_can_be_created_started_and_asked(host: Host) -> None:
    """Politely: there is nothing to do. Containers there are none."""
    host.negotiate()
    assert host.code(MessageType.CREATE, messages.create_request()) == HResult.OK
    assert host.code(MessageType.START, messages.start_request()) == HResult.OK
    answer = host.ask(MessageType.GET_PROPERTIES, {"ContainerId": NULL_ID, "Query": "{}"})
    assert answer == {"Result": 0, "Properties": "{}"}
    document = {"ContainerId": "1f1", "ActivityId": NULL_ID}
    for kind in (MessageType.CREATE, MessageType.START, MessageType.GET_PROPERTIES):
        answer = host.ask(kind, document)
        assert answer["Result"] & 0xFFFFFFFF == HResult.SYSTEM_NOT_FOUND
        assert answer["ActivityId"] == NULL_ID


def survey(*disks: Any, **more: Any) -> dict[str, Any]:
    return {**messages.properties_request({"Hotlun": {"Disks": list(disks)}}), **more}


def test_a_survey_is_answered_disk_by_disk(host: Host, disks: ScriptedDisks) -> None:
    """In the order of the question, as a document in a string."""
    host.negotiate()
    mounts = [{"MountPath": "/there"}, {"MountPath": "/elsewhere"}]
    document = survey({"Lun": 1, "Serial": "h1", "Mounts": mounts}, {"Controller": 2})
    answer = host.ask(MessageType.GET_PROPERTIES, document)
    assert answer == {
        "Result": 0,
        "ActivityId": NULL_ID,
        "Properties": '{"Hotlun":{"Disks":[{"Device":"Own","Mounts":[true,false]},'
        '{"Device":"Own"}]}}',
    }
    assert disks.done == ["survey 0:1 h1", "survey 2:0"]


@pytest.mark.parametrize(
    ("document", "code"),
    [
        (survey(7), HResult.INVALID_JSON),
        (survey({"Lun": 300}), HResult.INVALID_JSON),
        (survey(*[{}] * 1025), HResult.INVALID_JSON),
        (survey({"Mounts": [{"MountPath": "relative"}]}), HResult.INVALID_ARGUMENT),
        (survey(Query=7), HResult.INVALID_JSON),
        (survey(Query={"Hotlun": {}}), HResult.INVALID_JSON),
        (survey(Query='{"Hotlun":7}'), HResult.INVALID_JSON),
        (survey(Query='{"Hotlun":'), HResult.INVALID_JSON),
        (survey(Query="[" * 9999), HResult.INVALID_JSON),
        (survey(Query="\ud800"), HResult.INVALID_JSON),
        (survey(ContainerId="1f1"), HResult.SYSTEM_NOT_FOUND),
    ],
)
def test_a_survey_that_makes_no_sense_has_its_code(
    host: Host, disks: ScriptedDisks, document: Any, code: HResult
) -> None:
    """And looks at nothing."""
    answer = host.negotiate().ask(MessageType.GET_PROPERTIES, document)
    assert answer["Result"] & 0xFFFFFFFF == code
    assert answer["ErrorMessage"]
    assert "Properties" not in answer
    assert disks.done == []


@pytest.mark.parametrize(
    "query", ["", "{}", '{"PropertyTypes":["Memory"]}', '{"Hotlun":null}', None]
)
def test_properties_that_are_not_ours_are_none(
    host: Host, disks: ScriptedDisks, query: str | None
) -> None:
    """A host that asks as hcsshim's does is answered as before."""
    document = {"ContainerId": NULL_ID, "Query": query}
    answer = host.negotiate().ask(MessageType.GET_PROPERTIES, document)
    assert answer == {"Result": 0, "Properties": "{}"}
    assert disks.done == []


def test_a_survey_waits_for_no_disk(host: Host, disks: ScriptedDisks) -> None:
    """It says which are busy; nor does a disk wait for a survey."""
    host.negotiate()
    busy, slow = threading.Event(), threading.Event()
    disks.at["/busy"] = lambda: assert_set(busy)
    disks.at["slow"] = lambda: assert_set(slow)
    mounting = host.modify("Add", "MappedVirtualDisk", MountPath="/busy")
    answer = host.ask(MessageType.GET_PROPERTIES, survey({"Serial": "quick"}, {"Lun": 5}))
    quick, idle = json.loads(answer["Properties"])["Hotlun"]["Disks"]
    assert quick["Busy"]
    assert "Busy" not in idle
    surveying = host.send(MessageType.GET_PROPERTIES, survey({"Serial": "slow"}))
    busy.set()
    assert host.receive()[0].id == mounting
    slow.set()
    assert host.receive()[0].id == surveying


def assert_set(event: threading.Event) -> None:
    assert event.wait(DEADLINE)


def test_a_survey_that_fails_is_told_in_words(host: Host, disks: ScriptedDisks) -> None:
    """As any request, and the next one is served."""

    def fail() -> None:
        raise OSError(24, "Too many open files")

    disks.at["bad"] = fail
    answer = host.negotiate().ask(MessageType.GET_PROPERTIES, survey({"Serial": "bad"}))
    assert answer["Result"] & 0xFFFFFFFF == HResult.FAIL
    assert "Too many open files" in answer["ErrorMessage"]
    assert host.code(MessageType.GET_PROPERTIES, survey({"Serial": "good"})) == HResult.OK


def test_the_largest_survey_has_an_answer_that_a_host_takes(host: Host) -> None:
    """64 KiB with hcsshim's, whatever is found."""
    disks = messages.MAX_SURVEYED_DISKS
    mounts = [{"MountPath": "/there"}] + [{"MountPath": "/m"}] * (
        messages.MAX_SURVEYED_MOUNTS // disks - 1
    )
    number = host.negotiate().send(
        MessageType.GET_PROPERTIES, survey(*[{"Serial": "x", "Mounts": mounts}] * disks)
    )
    frame, answer = host.receive()
    assert (frame.id, answer["Result"]) == (number, 0)
    assert HEADER.size + len(frame.payload) <= 1 << 16


@pytest.mark.parametrize("character", ["x", "\0", "\ud800", "\U0001f4be"])
def test_no_answer_is_larger_than_a_host_takes(host: Host, character: str) -> None:
    """64 KiB with hcsshim's: neither an id that is given back nor words that quote make it so."""
    host.negotiate()
    for activity, code in (
        (character * messages.MAX_ACTIVITY, HResult.INVALID_ARGUMENT),
        (character * (messages.MAX_ACTIVITY + 1), HResult.INVALID_JSON),
        (character * 70_000, HResult.INVALID_JSON),
    ):
        document = modification("Add", "MappedVirtualDisk", {"MountPath": character * 70_000})
        number = host.send(MessageType.MODIFY_SETTINGS, {**document, "ActivityId": activity})
        frame, answer = host.receive()
        assert (frame.id, answer["Result"] & 0xFFFFFFFF) == (number, code)
        assert HEADER.size + len(frame.payload) <= 1 << 16
        assert answer.get("ActivityId", "") == (activity if code != HResult.INVALID_JSON else "")


def test_what_only_guests_send_is_not_answered(host: Host) -> None:
    """An answer to an answer would go round for ever."""
    host.negotiate()
    for kind in (0x20100A01, MessageType.CONTAINER_NOTIFICATION):
        host.send(kind, {})
    assert host.code(MessageType.START, messages.start_request()) == HResult.OK


def test_a_failure_is_told_in_code_and_words(host: Host, disks: ScriptedDisks) -> None:
    """A refusal with its own, a bug with its name; both leave the agent alive."""

    def refuse() -> None:
        raise RequestError("disk 0:1 (sda) is in use", HResult.TIMEOUT)

    def blunder() -> None:
        raise ZeroDivisionError("by nought")

    disks.at = {"/refuse": refuse, "/blunder": blunder}
    host.negotiate()
    for path, code, words in (
        ("/refuse", HResult.TIMEOUT, "disk 0:1 (sda) is in use"),
        ("/blunder", HResult.FAIL, "ZeroDivisionError: by nought"),
    ):
        host.modify("Add", "MappedVirtualDisk", MountPath=path)
        _, answer = host.receive()
        assert answer["Result"] & 0xFFFFFFFF == code
        assert answer["ErrorMessage"] == words
        assert answer["ActivityId"] == NULL_ID


def test_disks_do_not_wait_for_each_other(host: Host, disks: ScriptedDisks) -> None:
    """Another disk's answer, and one about no disk, come while the first is still at it."""
    released = threading.Event()
    disks.at["/slow"] = lambda: wait(released)
    host.negotiate()
    slow = host.modify("Add", "MappedVirtualDisk", MountPath="/slow", Lun=1)
    quick = host.modify("Add", "MappedVirtualDisk", MountPath="/quick", Lun=2)
    assert host.receive()[0].id == quick
    assert host.code(MessageType.START, messages.start_request()) == HResult.OK
    released.set()
    assert host.receive()[0].id == slow


def test_requests_for_one_disk_are_done_in_order(host: Host, disks: ScriptedDisks) -> None:
    """Though the first takes longest; other partitions and paths are the same disk."""
    released = threading.Event()
    disks.at["/a"] = lambda: wait(released)
    host.negotiate()
    for path in ("/a", "/b", "/c"):
        host.modify("Add", "MappedVirtualDisk", MountPath=path, Lun=1, Partition=len(disks.done))
    host.modify("Remove", "MappedVirtualDisk", MountPath="/a", Lun=1)
    last = host.modify("Remove", "SCSIDevice", Lun=1)
    released.set()
    ids = [host.receive()[0].id for _ in range(5)]
    assert ids == sorted(ids)
    assert ids[-1] == last
    order = ["mount 0:1 /a", "mount 0:1 /b", "mount 0:1 /c", "unmount 0:1 /a", "unplug 0:1"]
    assert disks.done == order


def test_many_disks_at_once_each_have_their_answer(host: Host, disks: ScriptedDisks) -> None:
    """Every slot that there can be, a request each, then another."""
    host.negotiate()
    sent = {
        host.modify(kind, "MappedVirtualDisk", MountPath="/m", Controller=controller, Lun=lun)
        for kind in ("Add", "Remove")
        for controller in range(4)
        for lun in range(64)
    }
    answered = {host.receive()[0].id for _ in sent}
    assert answered == sent
    for controller in range(4):
        for lun in range(64):
            mine = [line for line in disks.done if f" {controller}:{lun} " in line]
            assert [line.split()[0] for line in mine] == ["mount", "unmount"]


def test_a_disk_outlives_its_host(server: Server, disks: ScriptedDisks) -> None:
    """What a host that is gone had begun is seen through before the next one's turn.

    The answer goes nowhere, what waited behind it is dropped, and who waits for the
    device is told that nobody wants it any more.
    """
    begun, released = threading.Event(), threading.Event()

    def slowly() -> None:
        begun.set()
        wait(released)

    disks.at["/slow"] = slowly
    first = Host(server).negotiate()
    first.modify("Add", "MappedVirtualDisk", MountPath="/slow", Lun=1)
    first.modify("Add", "MappedVirtualDisk", MountPath="/never", Lun=1)
    wait(begun)
    assert disks.wanted()
    first.hang_up()
    assert not disks.wanted()
    second = Host(server).negotiate()
    number = second.modify("Remove", "MappedVirtualDisk", MountPath="/slow", Lun=1)
    released.set()
    assert second.receive()[0].id == number
    assert disks.done == ["mount 0:1 /slow", "unmount 0:1 /slow"]
    assert second.code(MessageType.START, messages.start_request()) == HResult.OK
    second.hang_up()


def test_who_waits_is_woken_when_a_host_is_gone(disks: ScriptedDisks) -> None:
    """So that a wait for a device ends with the link, and not at its deadline."""
    woken = threading.Event()
    Host(Server(disks, woken.set)).hang_up()
    wait(woken)


def wait(event: threading.Event) -> None:
    assert event.wait(DEADLINE)


def test_frames_may_come_byte_by_byte(host: Host) -> None:
    """And many at once."""
    frames = [
        encode(
            Frame(
                MessageType.NEGOTIATE_PROTOCOL,
                1,
                encode_request(messages.negotiate_request()),
            )
        ),
        encode(Frame(MessageType.START, 2, encode_request(messages.start_request()))),
    ]
    for byte in frames[0]:
        host.socket.sendall(bytes((byte,)))
    assert host.receive()[0].id == 1
    host.socket.sendall(frames[1] * 100)
    assert [host.receive()[0].id for _ in range(100)] == [2] * 100


@pytest.mark.parametrize("size", [0, 15, DEFAULT_LIMIT + 1, 0xFFFFFFFF])
def test_a_size_that_cannot_be_ends_the_link(server: Server, size: int) -> None:
    """What came before it is answered; the next host is served."""
    host = Host(server)
    good = encode(
        Frame(MessageType.NEGOTIATE_PROTOCOL, 1, encode_request(messages.negotiate_request()))
    )
    host.socket.sendall(good + HEADER.pack(MessageType.START, size, 2))
    assert host.receive()[1]["Result"] == 0
    with pytest.raises(EOFError):
        host.receive()
    host.hang_up()
    Host(server).negotiate().hang_up()


@pytest.mark.parametrize("half", [1, 15, 16, 17, 60])
def test_half_a_frame_is_forgotten_with_its_link(server: Server, half: int) -> None:
    """It is no beginning of what the next host says."""
    data = encode(
        Frame(MessageType.NEGOTIATE_PROTOCOL, 1, encode_request(messages.negotiate_request()))
    )
    host = Host(server)
    host.socket.sendall(data[:half])
    host.hang_up()
    Host(server).negotiate().hang_up()


def test_a_large_request_is_read_whole(host: Host, disks: ScriptedDisks) -> None:
    """Up to the limit."""
    host.negotiate()
    document = modification("Add", "MappedVirtualDisk", {"MountPath": "/m"})
    document["Padding"] = "x" * (DEFAULT_LIMIT - 1000)
    assert host.code(MessageType.MODIFY_SETTINGS, document) == HResult.OK


def test_a_host_that_leaves_without_reading_harms_nobody(server: Server) -> None:
    """Its answers have nowhere to go."""
    host = Host(server).negotiate()
    for _ in range(200):
        host.send(MessageType.DUMP_STACKS, {})
    host.hang_up()
    Host(server).negotiate().hang_up()


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    strategies.lists(
        strategies.one_of(
            strategies.binary(max_size=64),
            strategies.builds(
                lambda kind, size, number, payload: (
                    struct.pack("<IIQ", kind, size, number) + payload
                ),
                strategies.sampled_from([*MessageType, 0, 7, 0xFFFFFFFF]),
                strategies.sampled_from([0, 16, 18, 40, 0xFFFFFFFF]),
                strategies.integers(0, (1 << 64) - 1),
                strategies.binary(max_size=32),
            ),
            strategies.builds(
                lambda kind, payload: encode(Frame(kind, 1, payload)),
                strategies.sampled_from([*MessageType]),
                strategies.one_of(
                    strategies.binary(max_size=40),
                    strategies.recursive(
                        strategies.none() | strategies.booleans() | strategies.text(max_size=4),
                        lambda inner: strategies.dictionaries(
                            strategies.sampled_from(
                                ["Request", "Settings", "ContainerId", "MinimumVersion"]
                            ),
                            inner,
                        ),
                    ).map(lambda value: json.dumps(value).encode()),
                ),
            ),
        ),
        max_size=8,
    )
)
def test_no_bytes_end_the_agent(parts: list[bytes]) -> None:
    """Whatever a host sends, the next host is served."""
    server = Server(ScriptedDisks())
    host = Host(server)
    try:
        for part in parts:
            host.socket.sendall(part)
    except OSError:  # it was dropped at an earlier part
        pass
    host.hang_up()
    Host(server).negotiate().hang_up()
