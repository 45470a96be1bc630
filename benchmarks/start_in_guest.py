#!/usr/bin/env python3
"""The part of `start.py` that runs in the guest: starts the agent, and a Python that does nothing.

    python3 -I start_in_guest.py AGENT.pyz RUNS

Prints the seconds that each took, in turns, as JSON. Standard library only.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

AGENT, RUNS = sys.argv[1], int(sys.argv[2])
sys.path.insert(0, AGENT)

from hotlun.bridge import messages  # noqa: E402
from hotlun.bridge.documents import encode_request  # noqa: E402
from hotlun.bridge.frames import HEADER, Frame, encode  # noqa: E402

SOCKET = "/run/hotlun/start.sock"
GREETING = encode(
    Frame(
        messages.MessageType.NEGOTIATE_PROTOCOL,
        1,
        encode_request(messages.negotiate_request()),
    )
)


def python() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-c", ""], check=True)
    return time.perf_counter() - begin


def agent() -> float:
    """From its fork to its first answer; it says when it listens."""
    command = [sys.executable, "-I", AGENT, "--unix", SOCKET]
    Path(SOCKET).unlink(missing_ok=True)
    begin = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            if b"listening" not in said:
                raise RuntimeError(f"the agent does not listen: {said!r}")
            with socket.socket(socket.AF_UNIX) as host:
                host.connect(SOCKET)
                host.sendall(GREETING)
                head = host.recv(HEADER.size, socket.MSG_WAITALL)
                took = time.perf_counter() - begin
            if HEADER.unpack(head)[2] != 1:
                raise RuntimeError(f"that is no answer: {head!r}")
        finally:
            process.kill()
    return took


samples: dict[str, list[float]] = {"python": [], "agent": []}
for number in range(RUNS):
    works = (python, agent) if number % 2 == 0 else (agent, python)
    for work in works:
        samples[work.__name__].append(work())
print(json.dumps(samples))
