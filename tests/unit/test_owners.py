"""Owners: text is anybody, a process is somebody who can be seen to have ended."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hotlun import UnsupportedError
from hotlun.owners import NOBODY, Owner

if TYPE_CHECKING:
    from pathlib import Path


PROCESSES = pytest.mark.skipif(os.name == "nt", reason="Windows shows no processes in /proc")


def test_free_text_lives_for_ever() -> None:
    """Nobody can tell whether the build is over."""
    assert Owner.named("build 7").name == "build 7"
    assert not Owner.named("build 7").has_ended()
    assert Owner.named("") == NOBODY
    assert not NOBODY.has_ended()


@PROCESSES
def test_this_process_has_a_short_name() -> None:
    """`pid:` is whoever says it."""
    assert Owner.named("pid:") == Owner.named(f"pid:{os.getpid()}")
    assert Owner.named("pid:").name == f"pid:{os.getpid()}"
    assert not Owner.named("pid:").has_ended()


@PROCESSES
def test_a_process_ends() -> None:
    """From the moment that it has exited, reaped or not."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        owner = Owner.named(f"pid:{process.pid}")
        assert not owner.has_ended()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert owner.has_ended()
    assert owner.has_ended()
    with pytest.raises(ValueError, match="no process"):
        Owner.named(owner.name)


@PROCESSES
def test_another_process_with_the_number_is_another() -> None:
    """Numbers are used again; the moment of birth is not."""
    owner = Owner.named("pid:")
    assert owner.born is not None
    assert Owner(owner.name, owner.born - 1).has_ended()


@pytest.mark.parametrize("name", ["pid:x", "pid:-1", "pid:1 ", "pid: 1"])
def test_what_is_no_process(name: str) -> None:
    """A name that looks like a process's and is none is a mistake."""
    with pytest.raises(ValueError, match="process"):
        Owner.named(name)


@PROCESSES
def test_a_process_that_is_not_there() -> None:
    """Its number may be anybody's next."""
    with pytest.raises(ValueError, match="no process 999999999"):
        Owner.named("pid:999999999")


def test_where_processes_are_not_to_be_seen(tmp_path: Path) -> None:
    """None can be an owner, and one that was written down elsewhere is not found to have ended."""
    nowhere = str(tmp_path / "proc")
    with pytest.raises(UnsupportedError, match="give an owner of another name"):
        Owner.named("pid:", nowhere)
    assert Owner.named("build 7", nowhere).name == "build 7"
    assert not Owner("pid:1", 5).has_ended(nowhere)


@pytest.mark.parametrize("name", [None, 5, b"pid:"])
def test_what_is_no_name(name: Any) -> None:
    """A number would be taken for a pid by some, and for text by others."""
    with pytest.raises(TypeError, match="owner is a string"):
        Owner.named(name)
