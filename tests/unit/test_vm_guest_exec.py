"""The client of qemu-guest-agent, against a guest that says what it should not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from hotlun import OutcomeUnknownError
from hotlun.vm.errors import MachineError
from hotlun.vm.guest_exec import Completed, GuestExec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    Answer = Callable[[dict[str, Any]], bytes | None]

DEADLINE = 20.0


def line(message: dict[str, Any]) -> bytes:
    """A message as it is on the wire."""
    return json.dumps(message).encode() + b"\n"


def polite(request: dict[str, Any]) -> bytes | None:
    """What the real agent answers to `guest-exec` of a program that prints `out`."""
    reply: dict[str, Any] = {"pid": 7}
    if request["execute"] == "guest-exec-status":
        reply = {"exited": True, "exitcode": 0, "out-data": base64.b64encode(b"out\n").decode()}
    return line({"return": reply, "id": request["id"]})


@contextlib.asynccontextmanager
async def guest(path: Path, answer: Answer, greeting: bytes = b"") -> AsyncIterator[str]:
    """An agent that synchronises properly, after `greeting`, and then answers with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(greeting)
            while text := await reader.readline():
                request = json.loads(text.lstrip(b"\xff"))
                if request["execute"] == "guest-sync-delimited":
                    writer.write(b"\xff" + line({"return": request["arguments"]["id"]}))
                elif (reply := answer(request)) is None:
                    break
                else:
                    writer.write(reply)
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path / "guest.sock")
    try:
        yield str(path / "guest.sock")
    finally:
        server.close()
        await server.wait_closed()


async def run(path: str, *, timeout: float = DEADLINE) -> Completed:
    """Connect, run one command, hang up."""
    agent = await GuestExec.open(path, timeout=DEADLINE)
    try:
        return await agent.run(["/bin/true"], timeout=timeout)
    finally:
        await agent.close()


async def test_what_an_earlier_client_left_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    """Half a line and a late answer come first; neither disturbs."""
    late = b"half a li" + b"ne}\n" + line({"return": {"exited": True}, "id": 1})
    async with guest(tmp_path, polite, greeting=late) as path:
        assert await run(path) == Completed(0, "out\n", "")


async def test_answers_to_nobody_are_dropped(tmp_path: Path) -> None:
    """Garbage and unknown ids between the answers change nothing."""

    def noisy(request: dict[str, Any]) -> bytes | None:
        noise = b"[1, 2]\nnull\n\xfe\xff\n" + b"[" * 100_000 + b"\n" + line({"id": [], "return": 1})
        return noise + line({"id": 10**9, "return": {}}) + (polite(request) or b"")

    async with guest(tmp_path, noisy) as path:
        assert await run(path) == Completed(0, "out\n", "")


@pytest.mark.parametrize(
    "reply",
    [
        {"return": []},
        {"return": {}},
        {"return": {"pid": "7"}},
        {"return": {"pid": True}},
        {"return": {"pid": 7, "exited": True}},
        {"return": {"pid": 7, "exited": True, "exitcode": 0, "out-data": "!"}},
        {"return": {"pid": 7, "exited": True, "exitcode": 0, "out-data": 5}},
        {"error": {"class": "GenericError", "desc": "no such program"}},
        {"neither": 1},
    ],
)
async def test_an_answer_that_makes_no_sense_is_an_error(
    tmp_path: Path, reply: dict[str, Any]
) -> None:
    """Whatever the agent answers, it is a MachineError and nothing else."""
    async with guest(tmp_path, lambda request: line({**reply, "id": request["id"]})) as path:
        with pytest.raises(MachineError):
            await run(path)


async def test_a_command_that_never_ends_is_bounded(tmp_path: Path) -> None:
    """An agent that says "not yet" for ever does not keep its caller."""

    def never(request: dict[str, Any]) -> bytes | None:
        return line({"return": {"pid": 7, "exited": False}, "id": request["id"]})

    async with guest(tmp_path, never) as path:
        with pytest.raises(OutcomeUnknownError, match=r"0\.1 s"):
            await run(path, timeout=0.1)


async def test_a_connection_lost_in_between_is_an_unknown_outcome(tmp_path: Path) -> None:
    """The command was sent; whether it ran, nobody knows."""
    async with guest(tmp_path, lambda _request: None) as path:
        with pytest.raises(OutcomeUnknownError, match="went away"):
            await run(path)


async def test_a_connection_lost_between_two_polls_is_an_unknown_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was asked at that moment, but the command was running."""
    polled = asyncio.Event()
    monkeypatch.setattr("hotlun.vm.guest_exec.FIRST_POLL", 0.5)  # time enough to hang up in

    def running(request: dict[str, Any]) -> bytes | None:
        if request["execute"] == "guest-exec":
            return polite(request)
        polled.set()
        return line({"return": {"exited": False}, "id": request["id"]})

    async with guest(tmp_path, running) as path:
        agent = await GuestExec.open(path, timeout=DEADLINE)
        task = asyncio.create_task(agent.run(["/bin/true"], timeout=DEADLINE))
        await polled.wait()
        while agent._waiting:
            await asyncio.sleep(0.001)
        await agent.close()
        with pytest.raises(OutcomeUnknownError, match="went away"):
            await task


async def test_nobody_there_is_an_error_at_once(tmp_path: Path) -> None:
    """A socket that is not there, or one that nobody serves, names itself."""
    with pytest.raises(MachineError, match=r"guest\.sock"):
        await GuestExec.open(str(tmp_path / "guest.sock"), timeout=DEADLINE)
