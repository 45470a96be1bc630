"""The journal: whole documents or none, for one Manager at a time, who is named."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hotlun import JournalError, journal
from hotlun.journal import MemoryJournal, SQLiteJournal

if TYPE_CHECKING:
    from pathlib import Path

    from hotlun.journal import Journal


@pytest.fixture(params=["memory", "sqlite"])
def any_journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    return MemoryJournal() if request.param == "memory" else SQLiteJournal(tmp_path / "journal")


def test_documents_outlive_who_wrote_them(any_journal: Journal) -> None:
    """In the order in which they first came; one that is replaced keeps its place."""
    assert any_journal.open() == []
    for name in ("a", "b", "c"):
        any_journal.write({name: f"{name}1"})
    any_journal.write({"a": "a2"})
    any_journal.write({"b": None, "never": None, "d": "d1"})
    any_journal.close()
    any_journal.close()
    assert any_journal.open() == ["a2", "c1", "d1"]
    any_journal.close()


def test_a_journal_is_one_managers(any_journal: Journal) -> None:
    """A second one is told so, and nothing is written while it is closed."""
    any_journal.open()
    with pytest.raises(JournalError, match="another Manager"):
        any_journal.open()
    any_journal.write({"a": "1"})
    any_journal.close()
    with pytest.raises(JournalError, match="enter a Manager"):
        any_journal.write({"a": "2"})
    assert any_journal.open() == ["1"]
    any_journal.close()


def test_another_process_is_named(tmp_path: Path) -> None:
    """By pid and program; when it has ended, however, the journal is free, with all it wrote."""
    path = tmp_path / "journal"
    script = (
        "import sys; from hotlun.journal import SQLiteJournal as J\n"
        "j = J(sys.argv[1]); j.open(); j.write({'a': 'theirs'})\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().rstrip() == b"ready"
        said = f"{path} is in use by process {other.pid} (-c)"
        with pytest.raises(JournalError, match=re.escape(said)):
            SQLiteJournal(path).open()
        other.kill()
    ours = SQLiteJournal(path)
    assert ours.open() == ["theirs"]
    ours.close()


def test_two_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    """Two objects for one file are two users."""
    one, other = SQLiteJournal(tmp_path / "journal"), SQLiteJournal(tmp_path / "journal")
    one.open()
    with pytest.raises(JournalError, match=f"process {os.getpid()}"):
        other.open()
    one.close()
    assert other.open() == []
    other.close()


_WRITE_UNTIL_KILLED = """
import itertools, sys
from hotlun.journal import SQLiteJournal

journal = SQLiteJournal(sys.argv[1])
journal.open()
for number in itertools.count():
    text = f"{number:09}" + "x" * 3000
    for name in ("a", "b"):
        journal.write({name: text, "with " + name: text})
    if number == 20:
        print("begun", flush=True)
"""


def test_a_killed_writer_leaves_whole_documents(tmp_path: Path) -> None:
    """Whenever it is killed: each is the one before or the one after, and `b` follows `a`.

    What is written together is there together.
    """
    path = tmp_path / "journal"
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITE_UNTIL_KILLED, path], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            said = writer.stdout.readline()
            writer.kill()
        assert said.rstrip() == b"begun"
        reader = SQLiteJournal(path)
        documents = reader.open()
        assert {len(document) for document in documents} == {3009}
        a, with_a, b, with_b = (int(document[:9]) for document in documents)
        assert (a, b) == (with_a, with_b)
        assert a - b in (0, 1)
        reader.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has access lists")
def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    """It names disks and paths; so does what SQLite keeps beside it."""
    ours = SQLiteJournal(tmp_path / "journal")
    ours.open()
    ours.write({"a": "1"})
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    ours.close()


@pytest.mark.skipif(os.name == "nt", reason="Wine makes no symbolic links")
def test_one_file_has_one_lock(tmp_path: Path) -> None:
    """By whatever name it is opened."""
    ours = SQLiteJournal(tmp_path / "journal")
    ours.open()
    (tmp_path / "link").symlink_to(tmp_path / "journal")
    with pytest.raises(JournalError, match="is in use"):
        SQLiteJournal(tmp_path / "link").open()
    ours.close()


class TestBadFiles:
    @pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
    @pytest.mark.parametrize("call", ["fcntl.flock", "os.ftruncate"])
    def test_one_that_cannot_be_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """By a file system without locks, or without room: nobody is blamed, and nothing kept."""

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks or room")

        ours = SQLiteJournal(tmp_path / "journal")
        files = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patched:
            patched.setattr(call, refuse)
            with pytest.raises(JournalError, match=r"cannot be locked .*no locks or room"):
                ours.open()
        assert len(os.listdir("/proc/self/fd")) == files
        assert ours.open() == []
        ours.close()

    def test_no_database(self, tmp_path: Path) -> None:
        """Something else's file is left as it is."""
        path = tmp_path / "journal"
        path.write_text("dear diary, " * 100)
        with pytest.raises(JournalError, match="not a database"):
            SQLiteJournal(path).open()
        assert path.read_text().startswith("dear diary")

    def test_some_other_database(self, tmp_path: Path) -> None:
        """Nothing is added to it."""
        path = tmp_path / "journal"
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE disks (music TEXT)")
        other.close()
        with pytest.raises(JournalError, match="some other program's"):
            SQLiteJournal(path).open()

    def test_one_of_a_newer_hotlun(self, tmp_path: Path) -> None:
        """It is refused by its schema's version, and stays."""
        path = tmp_path / "journal"
        newer = SQLiteJournal(path)
        newer.open()
        newer.close()
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
        with pytest.raises(JournalError, match=r"newer hotlun \(its schema is 99"):
            SQLiteJournal(path).open()

    @pytest.mark.parametrize("name", ["missing/journal", "."])
    def test_no_place_for_one(self, tmp_path: Path, name: str) -> None:
        """The error names the path and what the system says."""
        with pytest.raises(JournalError, match=re.escape(str(tmp_path))):
            SQLiteJournal(tmp_path / name).open()

    @pytest.mark.parametrize("others", [{}, {"b": "with it"}, {"a": None, "b": "with it"}])
    def test_no_room(self, tmp_path: Path, others: dict[str, str | None]) -> None:
        """A document that cannot be written leaves the one before, and so do those with it."""
        ours = SQLiteJournal(tmp_path / "journal")
        ours.open()
        ours.write({"a": "before"})
        assert ours._database is not None
        (pages,) = ours._database.execute("PRAGMA page_count").fetchone()
        ours._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(JournalError, match="full"):
            ours.write({**others, "c": "x" * 100_000})
        ours.write({"a": "before"})  # and the journal is as good as ever
        ours.close()
        assert ours.open() == ["before"]
        ours.close()


def test_an_older_schema_is_brought_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each migration once, in order, each with its number in one transaction; documents stay."""
    path = tmp_path / "journal"
    old = SQLiteJournal(path)
    old.open()
    old.write({"a": "1"})
    old.close()
    column = "ALTER TABLE disks ADD COLUMN note TEXT NOT NULL DEFAULT 'none'"
    mark = "UPDATE disks SET document = document || '{}'"
    more = (f"{column}; {mark.format('+')}", mark.format("!"))
    monkeypatch.setattr(journal, "MIGRATIONS", (*journal.MIGRATIONS, *more))
    for _ in range(2):
        new = SQLiteJournal(path)
        assert new.open() == ["1+!"]
        new.close()


def test_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is still what the older hotlun can use."""
    path = tmp_path / "journal"
    old = SQLiteJournal(path)
    old.open()
    old.write({"a": "1"})
    old.close()
    with monkeypatch.context() as patch:
        broken = "UPDATE disks SET document = 'gone'; SELECT nonsense"
        patch.setattr(journal, "MIGRATIONS", (*journal.MIGRATIONS, broken))
        with pytest.raises(JournalError, match="nonsense"):
            SQLiteJournal(path).open()
    assert old.open() == ["1"]
    old.close()
