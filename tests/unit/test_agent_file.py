"""The agent's single file: the same each time, and enough by itself."""

from __future__ import annotations

import fnmatch
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from support.guest import DEADLINE

from hotlun.agent_file import agent_bytes, build_agent
from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import Document, encode_request
from hotlun.bridge.frames import Frame, FrameDecoder, encode
from hotlun.bridge.messages import MessageType
from hotlun.bridge.responses import Response

OLDEST = (3, 9)


@pytest.fixture(params=["ours", "oldest"])
def interpreter(request: pytest.FixtureRequest) -> str:
    """Ours, and the oldest Python that the agent is for, where there is one."""
    if request.param == "ours":
        return sys.executable
    version = ".".join(map(str, OLDEST))
    # on the PATH, or installed beside ours, a folder a version
    beside = Path(os.path.realpath(sys.executable)).parent.parent.parent
    for candidate in (shutil.which(f"python{version}"), *beside.glob(f"{version}.*/bin/python")):
        if candidate is not None:
            command = [candidate, "-c", "import sys; print(sys.version_info[:2])"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.stdout.strip() == str(OLDEST):
                return str(candidate)
    pytest.skip(f"no Python {version} is installed; lint and mypy alone speak for it here")


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    """In another process, with other hashes, at another time."""
    command = [
        sys.executable,
        "-c",
        "import sys; from hotlun.agent_file import build_agent; build_agent(sys.argv[1])",
        str(tmp_path / "agent"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert (tmp_path / "agent").read_bytes() == agent_bytes()


def test_it_holds_what_the_guest_needs_and_no_more(tmp_path: Path) -> None:
    """The agent, the shared part of the bridge, and a package root that imports nothing."""
    with zipfile.ZipFile(build_agent(tmp_path / "agent")) as file:
        names = set(file.namelist())
        assert file.read("hotlun/__init__.py") == b""
    assert {"__main__.py", "hotlun/agent/__main__.py", "hotlun/bridge/frames.py"} <= names
    assert {name for name in names if fnmatch.fnmatch(name, "hotlun/bridge/*.py")} == {
        f"hotlun/bridge/{name}.py"
        for name in ("__init__", "codes", "documents", "frames", "messages", "transport")
    }
    assert {name.split("/")[1] for name in names if name.count("/") > 1} == {"agent", "bridge"}
    assert {name.rstrip("c") for name in names if name.endswith(".pyc")} == {
        name for name in names if name.endswith(".py")
    }


def test_it_is_executable(tmp_path: Path) -> None:
    """With a first line that finds Python, and its path given back."""
    path = build_agent(str(tmp_path / "agent"))
    assert os.access(path, os.X_OK)
    assert path.read_bytes().startswith(b"#!/usr/bin/env python3\n")


def test_it_serves_by_itself(interpreter: str, tmp_path: Path) -> None:
    """Without site packages; a second host is served like the first.

    No machine has a controller 255: what is asked goes all the way and finds nothing.
    """
    negotiation = messages.negotiate_request()
    nowhere = {"MountPath": str(tmp_path / "mount"), "Controller": 255, "Options": ["noatime"]}
    agent = build_agent(tmp_path / "agent")
    path = str(tmp_path / "socket")
    command = [interpreter, "-I", "-S", str(agent), "--unix", path, "--log-level", "error"]
    process = subprocess.Popen(command, cwd=tmp_path / "..", stderr=subprocess.PIPE)
    try:
        for _ in range(2):
            with connect(path) as host:
                assert ask(host, MessageType.NEGOTIATE_PROTOCOL, negotiation) == HResult.OK
                for kind, resource, code in (
                    (messages.ADD, messages.MAPPED_VIRTUAL_DISK, HResult.NOT_FOUND),
                    (messages.REMOVE, messages.MAPPED_VIRTUAL_DISK, HResult.OK),
                    (messages.REMOVE, messages.SCSI_DEVICE, HResult.OK),
                ):
                    request = {"RequestType": kind, "ResourceType": resource, "Settings": nowhere}
                    document = messages.modify_request(request)
                    assert ask(host, MessageType.MODIFY_SETTINGS, document) == code
        assert process.poll() is None
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=DEADLINE)
    assert errors == b""


def ask(host: socket.socket, kind: MessageType, document: Document) -> int:
    """The code of the answer to one request."""
    host.sendall(encode(Frame(kind, 9, encode_request(document))))
    decoder = FrameDecoder()
    frames: list[Frame] = []
    while not frames:
        data = host.recv(1 << 16)
        assert data
        frames = decoder.feed(data)
    assert frames[0].id == 9
    return Response.read(frames[0].payload).code


def connect(path: str) -> socket.socket:
    end = time.monotonic() + DEADLINE
    while True:
        host = socket.socket(socket.AF_UNIX)
        host.settimeout(DEADLINE)
        try:
            host.connect(path)
        except OSError:
            host.close()
            assert time.monotonic() < end, "the agent does not listen"
            time.sleep(0.02)
        else:
            return host


@pytest.mark.parametrize(
    "arguments",
    [[], ["--unix", "a", "--vsock"], ["--unix", "a", "--device-timeout", "0"], ["--port"]],
)
def test_a_wrong_command_line_is_explained(arguments: list[str], tmp_path: Path) -> None:
    """And nothing is served."""
    command = [sys.executable, str(build_agent(tmp_path / "agent")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: hotlun-agent" in done.stderr


def test_a_socket_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """In one line."""
    command = [sys.executable, str(build_agent(tmp_path / "agent"))]
    command += ["--unix", str(tmp_path / "missing/socket")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
