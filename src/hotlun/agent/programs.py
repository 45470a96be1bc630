"""Running a program of the guest's, such as mkfs, without being at its mercy.

It gets no shell and no terminal, says what it has to say in English, and may neither
fill the agent's memory nor keep a request for ever: not even in a system call on a
dead disk, from which no signal wakes it.

One that outlives the agent goes on; `orphans` has the next agent wait for it. (To have
it die too, it would have to be started by another program, or by Python code between
fork and exec, which hangs in a process with threads.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import threading
import time
from typing import IO, TYPE_CHECKING

from hotlun.agent import orphans
from hotlun.agent.errors import RequestError, words
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import printable

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

TIMEOUT = 240.0
"""Seconds for a program: less than the five minutes after which hcsshim's host gives up."""

_DYING = 3.0
"""Seconds for a program to be gone after SIGKILL."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""For an agent that init started without one."""

_OUTPUT_KEPT = 1 << 16
_WORDS_KEPT = 1024
_INPUT_MOST = 1 << 12
"""Bytes that any pipe takes at once, read or not."""

_USAGE = r"(?im)^usage:"

_log = logging.getLogger("hotlun.agent")


class ProgramError(RequestError):
    """A program ran to its end and failed.

    Args:
        status: its exit status; negative if a signal ended it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def find(name: str) -> str | None:
    """The path of a program in PATH or, without that, where programs usually are."""
    for directory in (os.environ.get("PATH") or _PATH).split(":"):
        path = os.path.join(directory, name)
        if directory and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def run(
    device: object,
    command: Sequence[str],
    *,
    node: str = "",
    input: bytes = b"",  # noqa: A002  # as subprocess calls it
    timeout: float = TIMEOUT,
) -> bytes:
    """Run a program to its end; what it printed, the first 64 KiB of both streams together.

    Args:
        device: what errors say that it was about.
        command: its path and arguments.
        node: of the device, if it is to be known to be at work on that.
        input: what it can read, at most 4 KiB; without it /dev/null.
        timeout: seconds after which it is killed, with what it has started.

    Raises:
        ProgramError: it failed; in its own words, without its usage.
        RequestError: it cannot be started, or was killed as it was not done in time. Then
            it can still be there, if nothing in it can be killed.
    """
    if len(input) > _INPUT_MOST:
        raise ValueError(f"{len(input)} bytes of input are more than {_INPUT_MOST}")
    import subprocess  # here, as the agent is to serve before it runs anything

    name = os.path.basename(command[0])
    try:
        with orphans.marked(node) if node else contextlib.nullcontext(()) as inherited:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"PATH": _PATH, **os.environ, "LC_ALL": "C"},
                pass_fds=inherited,
                start_new_session=True,  # to be killed with its children
            )
    except OSError as error:
        raise RequestError(f"{device}: {name} cannot be run: {words(error)}") from error
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(input)
    end = time.monotonic() + timeout
    output = _read(process.stdout, end) if process.stdout is not None else b""
    status = _wait(process, end)
    if status is None:
        raise _killed(device, name, process, timeout)
    if status:
        raise ProgramError(f"{device}: {name} failed ({status}): {_reason(output)}", status)
    return output


def _read(pipe: IO[bytes], end: float) -> bytes:
    """What comes until all who could write are gone, or time is up; what is too much is lost."""
    output = bytearray()
    with pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, end - time.monotonic())):
            part = os.read(pipe.fileno(), _OUTPUT_KEPT)
            if not part:
                break
            output += part[: _OUTPUT_KEPT - len(output)]
    return bytes(output)


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """The exit status, None if it does not end in time."""
    import subprocess

    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def _killed(
    device: object, name: str, process: subprocess.Popen[bytes], timeout: float
) -> RequestError:
    """Kill it and say so."""
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if _wait(process, time.monotonic() + _DYING) is not None:
        fate = "was stopped"
    else:
        fate = f"cannot be stopped: process {process.pid} is stuck in the kernel"
        _log.error("%s: %s was not done after %g s and %s", device, name, timeout, fate)
        # Whenever it ends, somebody must take note of it.
        threading.Thread(target=process.wait, name=f"wait {process.pid}", daemon=True).start()
    return RequestError(
        f"{device}: {name} was not done after {timeout:g} s and {fate}", HResult.TIMEOUT
    )


def _reason(output: bytes) -> str:
    text = output.decode("utf-8", "replace")
    usage = re.search(_USAGE, text)
    return printable(text[: usage.start()] if usage else text, _WORDS_KEPT) or "no words"
