"""A program is run to its end, and neither its words nor its death can hurt the agent."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest
from support.guest import DEADLINE, image_of

from hotlun.agent import programs
from hotlun.agent.errors import RequestError
from hotlun.agent.programs import ProgramError
from hotlun.bridge.codes import HResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A mounted filesystem that keeps who writes to it in the kernel, until it is thawed."""
    image = image_of(tmp_path / "image", 16, "mkfs.ext4", "-F", "-q")
    path = tmp_path / "frozen"
    path.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(path)], check=True)
    subprocess.run(["fsfreeze", "--freeze", str(path)], check=True)
    yield path
    subprocess.run(["fsfreeze", "--unfreeze", str(path)], check=False, capture_output=True)
    subprocess.run(["umount", str(path)], check=True)


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_both_streams_are_returned() -> None:
    """In the order in which they were written."""
    assert programs.run("disk", shell("echo out; echo err >&2")) == b"out\nerr\n"


def test_input_is_given_and_nothing_else_can_be_read() -> None:
    """Without any there is /dev/null, and never the agent's own."""
    assert programs.run("disk", ["/bin/cat"], input=b"\0secret\n") == b"\0secret\n"
    assert programs.run("disk", ["/bin/cat"]) == b""


def test_input_that_nobody_reads_is_no_error() -> None:
    """The program has ended well without it."""
    assert programs.run("disk", ["/bin/true"], input=bytes(4096)) == b""


def test_more_input_than_a_pipe_takes_is_refused() -> None:
    """It might wait for ever, before the time is taken."""
    with pytest.raises(ValueError, match="4097 bytes"):
        programs.run("disk", ["/bin/cat"], input=bytes(4097))


def test_a_failure_is_in_the_programs_words() -> None:
    """On one line, printable, without its usage; with its exit status."""
    script = "echo too small; printf 'for \\033this\\nUsage: it [-x]\\n'; exit 3"
    with pytest.raises(
        ProgramError, match=r"^disk 0:1: sh failed \(3\): too small; for \\x1bthis$"
    ) as caught:
        programs.run("disk 0:1", shell(script))
    assert caught.value.status == 3


def test_a_failure_without_words_says_so() -> None:
    """A signal is one, too."""
    with pytest.raises(ProgramError, match=r"sh failed \(-9\): no words"):
        programs.run("disk", shell("kill -9 $$"))


def test_words_are_bounded() -> None:
    """A program may say a gigabyte: neither the memory nor the error grows by it."""
    with pytest.raises(ProgramError) as caught:
        programs.run("disk", shell("head -c 8388608 /dev/zero | tr '\\0' x; exit 1"))
    assert len(str(caught.value)) < 1200
    assert len(programs.run("disk", shell("head -c 8388608 /dev/zero"))) == 1 << 16


def test_words_are_english(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the guest speaks; the rest of the environment stays."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("MINE", "kept")
    monkeypatch.delenv("PATH")
    done = programs.run("disk", shell("echo $LC_ALL $MINE $PATH"))
    assert done == b"C kept /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"


def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    """The error says that it is gone."""
    script = f"sleep 1000 & echo $! > {tmp_path}/child; wait"
    with pytest.raises(RequestError, match=r"not done after 2 s and was stopped") as caught:
        programs.run("disk", shell(script), timeout=2)
    assert caught.value.code == HResult.TIMEOUT
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not os.path.exists(f"/proc/{child}") or is_zombie(child))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) needs root")
def test_a_program_that_cannot_be_killed_is_given_up(
    frozen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in the kernel; the request does not, and nothing is left when it wakes."""
    monkeypatch.setattr(programs, "_DYING", 0.2)
    with pytest.raises(RequestError, match=r"process \d+ is stuck in the kernel") as caught:
        programs.run("disk", ["/bin/mkdir", f"{frozen}/new"], timeout=1)
    process = int(str(caught.value).split("process ")[1].split()[0])
    os.kill(process, 0)
    subprocess.run(["fsfreeze", "--unfreeze", str(frozen)], check=True)
    wait_until(lambda: not os.path.exists(f"/proc/{process}"))


def test_what_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    """As what the kernel says."""
    with pytest.raises(RequestError, match="disk: none cannot be run: No such file"):
        programs.run("disk", [str(tmp_path / "none")])


def test_programs_run_side_by_side() -> None:
    """Each with output of its own."""
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(programs.run("disk", shell("echo $$"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


def test_programs_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In PATH alone if there is one; what cannot be executed is none."""
    assert programs.find("sh") in ("/usr/bin/sh", "/bin/sh")
    monkeypatch.setenv("PATH", f":{tmp_path}")
    assert programs.find("sh") is None
    (tmp_path / "sh").write_text("")
    assert programs.find("sh") is None
    (tmp_path / "sh").chmod(0o755)
    assert programs.find("sh") == str(tmp_path / "sh")
    monkeypatch.delenv("PATH")
    assert programs.find("sh") in ("/usr/bin/sh", "/bin/sh")


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_zombie(process: int) -> bool:
    """Orphans are for init to reap, which a container may not have."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return ") Z " in file.read()
    except FileNotFoundError:
        return True
