"""`hotlun journal`: what a journal says, and its end."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from support.memory import EXT4, A, B

from hotlun import Manager
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.cli import main
from hotlun.journal import SQLiteJournal
from hotlun.journal_documents import disk_name

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def hotlun(*arguments: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(main, ["journal", *map(str, arguments)], input=answer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with two disks, each with a holder."""

    async def fill() -> None:
        host = MemoryHostBackend()
        guest = MemoryGuestBackend(host)
        async with Manager(host, guest, journal=SQLiteJournal(tmp_path / "journal")) as manager:
            await manager.add_virtual_disk(A, mount=EXT4, owner="job", vm_id="65534")
            await manager.add_virtual_disk(B, read_only=True)

    asyncio.run(fill())
    return tmp_path / "journal"


def test_it_is_shown(path: Path) -> None:
    """Disks with what hangs on them; also while somebody has it open."""
    other = SQLiteJournal(path)
    other.open()
    result = hotlun("show", path)
    other.close()
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith(f"{A}: slot 0:0, serial h")
    assert lines[0].endswith("attached: yes")
    assert lines[1] == "  mounted at /run/mounts/scsi/m0: yes"
    assert lines[2] == "  access of 65534: yes"
    assert lines[3].endswith("for job: /run/mounts/scsi/m0")
    assert lines[4].startswith(f"{B}, read-only: slot 0:1")
    assert lines[5].endswith(": the disk alone")


def test_an_empty_one(tmp_path: Path) -> None:
    """Says so; so does a file that is no journal yet."""
    path = tmp_path / "journal"
    path.touch()
    assert "no disk is attached" in hotlun("show", path).output
    fresh = SQLiteJournal(path)
    fresh.open()
    fresh.close()
    assert "no disk is attached" in hotlun("show", path).output


def test_it_is_forgotten(path: Path) -> None:
    """When asked to, and not if the answer is no."""
    assert hotlun("forget", path, answer="n\n").exit_code == 1
    assert "2 disks" in hotlun("forget", path, answer="n\n").output
    assert len(SQLiteJournal(path).peek()) == 4
    result = hotlun("forget", path, "--yes")
    assert result.exit_code == 0, result.output
    assert "2 disks are forgotten" in result.output
    assert SQLiteJournal(path).peek() == []


@pytest.mark.skipif(os.name == "nt", reason="it may be there")
def test_access_of_the_compute_service_is_revoked_by_it(path: Path) -> None:
    """Which is not here: so nothing is forgotten, and it is said where that is to be done."""
    ours = SQLiteJournal(path)
    documents = [json.loads(document) for document in ours.open()]
    documents[0]["grants"] = [["my-vm", "yes", "hcs", 1]]
    ours.write({disk_name(documents[0]["identity"]): json.dumps(documents[0])})
    ours.close()
    result = hotlun("forget", path, "--yes")
    assert result.exit_code == 1
    assert "Host Compute Service is a part of Windows" in result.output
    assert len(SQLiteJournal(path).peek()) == 4


def test_one_in_use_is_not_forgotten(path: Path) -> None:
    """The error says who has it."""
    other = SQLiteJournal(path)
    other.open()
    result = hotlun("forget", path, "--yes")
    other.close()
    assert result.exit_code == 1
    assert f"process {os.getpid()}" in result.output
    assert len(SQLiteJournal(path).peek()) == 4


@pytest.mark.parametrize("command", ["show", "forget"])
def test_no_journal(tmp_path: Path, command: str) -> None:
    """No such file is wrong usage; another file is an error, and stays."""
    assert hotlun(command, tmp_path / "missing").exit_code == 2
    diary = tmp_path / "diary"
    diary.write_text("dear diary " * 100)
    result = hotlun(command, diary, *(["--yes"] if command == "forget" else []))
    assert result.exit_code == 1
    assert "not a database" in result.output
    assert diary.read_text().startswith("dear diary")
