"""A part of the fuzz on each run of the suite, and that it would notice what it looks for."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fuzz import oracle, vm
from fuzz.grammar import KEYS
from fuzz.guest.errors import StrayError
from fuzz.guest.machine import PROFILE, Guest
from fuzz.inputs import Input, make
from fuzz.loading import Agent

from hotlun.bridge import messages
from hotlun.bridge.documents import encode_request, encode_response
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    from collections.abc import Iterator

COUNT = 50_000
"""Inputs; scripts/fuzz has a million."""

TESTS = Path(__file__).parent.parent

START = encode(Frame(MessageType.START, 7, b'{"ActivityId":"a"}'))


@pytest.fixture
def strays() -> Iterator[list[str]]:
    """What the guest was asked for and does not know; forgotten afterwards."""
    yield StrayError.seen
    StrayError.seen.clear()


@pytest.mark.timeout(900)
def test_fifty_thousand_inputs_end_nothing_and_leave_nothing() -> None:
    """No crash, no growth, every answer well-formed; in processes of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--count", str(COUNT)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{COUNT} inputs in" in done.stdout


def test_an_input_can_be_made_again() -> None:
    """From its seed and index alone; other seeds and indices make others."""
    again = [make(seed, index, PROFILE) for seed in (1, 2) for index in range(20)]
    assert again == [make(seed, index, PROFILE) for seed in (1, 2) for index in range(20)]
    assert len({given.data for given in again}) > 30


def answer(kind: int = MessageType.START, number: int = 7, **more: Any) -> bytes:
    document = {"Result": 0, "ActivityId": "a", **more}
    payload = encode_response(document)
    return encode(Frame(messages.response_type(kind), number, payload))


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (b"", "no answer"),
        (answer() * 2, "nobody asked"),
        (answer(number=8), "nobody asked"),
        (answer(MessageType.CREATE), "nobody asked"),
        (answer()[:-1], "no frames"),
        (answer() + b"x", "no frames"),
        (answer(Result=1 << 31), "Result"),
        (answer(Result=True), "Result"),
        (answer(Result=-1), "without words"),
        (answer(ErrorMessage="but"), "without words"),
        (answer(ActivityId="b"), "ActivityId"),
        (answer(Padding="x"), "members"),
        (answer(Properties="x" * (1 << 16)), "bytes"),
        (encode(Frame(0x20100201, 7, b"{")), "JSON"),
    ],
)
def test_an_answer_that_is_not_as_it_should_be_is_noticed(answers: bytes, words: str) -> None:
    """Each in its own words; the right one is not."""
    debt = oracle.owed(START, drops=False)
    assert oracle.check(debt, answer())[0] == []
    wrong, _ = oracle.check(debt, answers)
    assert words in " ".join(wrong)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"Device": "Own", "Mounts": [False, True]}, ""),
        ({}, ""),
        ({"Device": "Mine"}, "no such device"),
        ({"Mounts": [False, True]}, "without their disk"),
        ({"Device": "Other", "Mounts": [False, True]}, "without their disk"),
        ({"Device": "Own", "Mounts": [True]}, "other mounts"),
        ({"Device": "Own", "Mounts": [False, False]}, "left out"),
        ({"Device": "Own", "Mounts": [1, 0]}, "not an array of booleans"),
        (7, "not an array of objects"),
    ],
)
def test_a_survey_that_is_not_as_it_should_be_is_noticed(told: Any, words: str) -> None:
    """Of two mounts of one disk, when they were asked for."""
    mounts = [{"MountPath": "/a"}, {"MountPath": "/b"}]
    document = messages.properties_request({"Hotlun": {"Disks": [{"Mounts": mounts}]}})
    kind = MessageType.GET_PROPERTIES
    frame = Frame(kind, 7, encode_request({**document, "ActivityId": "a"}))
    debt = oracle.owed(encode(frame), drops=False)
    properties = json.dumps({"Hotlun": {"Disks": [told]}})
    wrong, _ = oracle.check(debt, answer(kind, Properties=properties))
    assert words in " ".join(wrong)
    assert bool(wrong) == bool(words)
    assert oracle.check(debt, answer(kind))[0]
    assert oracle.check(debt, answer(kind, Properties="{}"))[0]
    assert oracle.check(oracle.owed(START, drops=False), answer(Properties="{}"))[0]


def test_what_is_owed_depends_on_how_the_link_ends() -> None:
    """A host that hangs up is owed nothing; behind what is no frame nothing is read."""
    assert oracle.owed(START, drops=False).must.total() == 1
    assert oracle.owed(START, drops=True).must.total() == 0
    broken = oracle.owed(START + bytes(16) + START, drops=False)
    assert (broken.breaks, broken.may.total()) == (True, 1)
    assert oracle.owed(encode(Frame(0x20100A01, 7, b"{}")), drops=False).may.total() == 0


def test_a_key_that_is_told_is_noticed() -> None:
    """As bytes or in base64, unless the input had it where it is repeated."""
    text = base64.b64encode(KEYS[0]).decode()
    member = oracle.Cut(0, 0, f'{{"Settings":{{"Key":"{text}"}}}}'.encode())
    path = oracle.Cut(0, 0, f'{{"Settings":{{"MountPath":"/{text}"}}}}'.encode())
    for told in (text, KEYS[0], repr(KEYS[0]), f"x{text[:-4]}y".encode()):
        assert oracle.leaks([told], [member])
        assert not oracle.leaks([told], [member, path])
    assert not oracle.leaks(["nothing", b"of it"], [member])


def asking(**settings: Any) -> Input:
    """An input that asks for a mount like this."""
    request = {"RequestType": "Add", "ResourceType": "MappedVirtualDisk", "Settings": settings}
    payload = encode_request(messages.modify_request(request))
    data = encode(Frame(MessageType.MODIFY_SETTINGS, 2, payload))
    return Input(number=1, writes=(data,), drops=False, by_socket=False, faults={}, luck=0)


def test_a_real_guest_is_asked_for_nothing_outside_of_the_sandbox() -> None:
    """Nor to wait for long. What makes no request at all can do nothing."""
    path = vm.SANDBOX + "a"
    assert vm.is_harmless(asking(MountPath=path, TimeoutInMs=50))
    assert vm.is_harmless(asking(MountPath="/etc/passwd", TimeoutInMs=50))
    assert vm.is_harmless(asking(MountPath="/etc", TimeoutInMs="soon"))
    for other in ("/etc", "/run/fuzz", "/proc/x", "/run//hotlun/x"):
        assert not vm.is_harmless(asking(MountPath=other, TimeoutInMs=50))
        assert not vm.is_harmless(asking(mountpath=other, TIMEOUTINMS=50))
    assert not vm.is_harmless(asking(MountPath=path, TimeoutInMs=5000))
    assert not vm.is_harmless(asking(MountPath=path))


def test_the_agent_has_no_way_out_of_the_fuzzs_guest(strays: list[str]) -> None:
    """A call that the guest does not know is an error of its own kind, and is remembered."""
    agent = Agent(Guest())
    for name in ("disks", "mounts", "mappings", "programs", "links"):
        module = agent[name]
        for foreign in ("os", "ctypes", "fcntl", "subprocess", "socket", "select", "time"):
            assert vars(module).get(foreign) is not sys.modules.get(foreign, module)
    system = vars(agent["kernel"])["os"]
    for call in ("system", "execv", "fork", "rename", "remove"):
        with pytest.raises(StrayError):
            getattr(system, call)
    with pytest.raises(StrayError):
        agent["syscalls"]._syscall(999)()
    assert len(strays) == 6
