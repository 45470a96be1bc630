"""What must survive this process: documents, replaced before and after each step.

A journal is a dumb and durable table. What stands in the documents, and when they are
written, is for `journal_documents` and `recorder`; here it is only made sure that what is
written together is there whole or not at all, whenever the process is killed, and that
nobody else writes.

The SQLite file is written without waiting for the storage (WAL, `synchronous=NORMAL`):
what a killed process has written is the kernel's already, and if the host itself goes
down, so do its VMs. After that the file is an older, consistent one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import urllib.parse
from typing import TYPE_CHECKING, Final, Protocol

from hotlun.errors import JournalError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping


class Journal(Protocol):
    """A table of documents, by name; synchronous, since each call takes microseconds.

    Every method raises `JournalError`, and nothing else, if it cannot be done.
    """

    def open(self) -> list[str]:
        """Take the journal for oneself; its documents, oldest first."""

    def write(self, changes: Mapping[str, str | None]) -> None:
        """Replace these documents, or remove what is None. All when this returns, or none."""

    def close(self) -> None:
        """Let others have it. Closing twice is fine."""


class MemoryJournal:
    """A journal that lives as long as this object: for tests, and for a Manager after another."""

    def __init__(self) -> None:
        self._documents: dict[str, str] = {}
        self._is_open = False

    def open(self) -> list[str]:
        if self._is_open:
            raise JournalError("this journal is in use by another Manager: leave that one first")
        self._is_open = True
        return list(self._documents.values())

    def write(self, changes: Mapping[str, str | None]) -> None:
        if not self._is_open:
            raise JournalError("this journal is not open: enter a Manager on it")
        for name, document in changes.items():
            if document is None:
                self._documents.pop(name, None)
            else:
                self._documents[name] = document

    def close(self) -> None:
        self._is_open = False


MIGRATIONS: Final = ("CREATE TABLE disks (name TEXT NOT NULL UNIQUE, document TEXT NOT NULL)",)
"""What makes each version of the schema (`PRAGMA user_version`) out of the one before."""

_APPLICATION_ID: Final = 0x484F544C
"""`HOTL`, in the file's header, so that `file` and we can tell it from other databases."""

_UPSERT: Final = (
    "INSERT INTO disks (name, document) VALUES (?, ?)"
    " ON CONFLICT (name) DO UPDATE SET document = excluded.document"
)


class SQLiteJournal:
    """A journal in a file, one for each VM; `PATH.lock` beside it says who has it open.

    Args:
        path: of the file, which is made if it is not there; the folder must be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.realpath(os.fspath(path))  # one file has one lock, by any name
        self._database: sqlite3.Connection | None = None
        self._lock: int | None = None

    def open(self) -> list[str]:
        """Take the journal for this process.

        Raises:
            JournalError: another Manager has it, and which process's; it is of a newer
                hotlun, or no journal; the file cannot be made or read.
        """
        if self._database is not None:
            raise self._error("is in use by another Manager of this process: leave that one first")
        self._lock = self._take_lock()
        try:
            with self._translated():
                self._database = self._connect()
                return self._documents(self._database)
        except BaseException:
            self.close()
            raise

    def peek(self) -> list[str]:
        """The documents, oldest first, without taking the journal from whoever has it.

        Raises:
            JournalError: it cannot be read.
        """
        import sqlite3

        with self._translated():
            uri = f"file:{urllib.parse.quote(self._path)}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
                return self._documents(database) if self._check(database) else []

    def write(self, changes: Mapping[str, str | None]) -> None:
        """Replace or remove documents, in one transaction.

        Raises:
            JournalError: that cannot be written; what was there before still is.
        """
        database = self._database
        if database is None:
            raise self._error("is not open: enter a Manager on it")
        with self._translated():
            if len(changes) == 1:  # a statement is a transaction of its own
                self._replace(database, changes)
                return
            with database:  # commits, or rolls back
                database.execute("BEGIN IMMEDIATE")
                self._replace(database, changes)

    def close(self) -> None:
        """Let the next one have it."""
        if self._database is not None:
            self._database.close()
            self._database = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        # Made here, so that nobody else can read it: it names disks and paths. On Windows the
        # folder's access list says who can, and the mode says nothing.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(self._path, isolation_level=None)
        try:
            # Documents are small, and WAL writes whole pages. Files that are there keep theirs.
            database.execute("PRAGMA page_size = 1024")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            self._migrate(database)
        except BaseException:
            database.close()
            raise
        return database

    def _migrate(self, database: sqlite3.Connection) -> None:
        version = self._check(database)
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            database.executescript(
                f"BEGIN IMMEDIATE; {script};"
                f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT"
            )

    def _check(self, database: sqlite3.Connection) -> int:
        """The version of its schema, if the database is a journal, or an empty one."""
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application != _APPLICATION_ID and (application or tables):
            raise self._error("is some other program's database: give another path")
        if version > len(MIGRATIONS):
            raise self._error(
                f"was written by a newer hotlun (its schema is {version}, this one knows "
                f"{len(MIGRATIONS)}): use that one"
            )
        return int(version)

    @staticmethod
    def _replace(database: sqlite3.Connection, changes: Mapping[str, str | None]) -> None:
        for name, document in changes.items():
            if document is None:
                database.execute("DELETE FROM disks WHERE name = ?", (name,))
            else:
                database.execute(_UPSERT, (name, document))

    @staticmethod
    def _documents(database: sqlite3.Connection) -> list[str]:
        rows = database.execute("SELECT document FROM disks ORDER BY rowid")
        return [document for (document,) in rows]

    def _take_lock(self) -> int:
        """The descriptor that holds the lock; the kernel lets go of it when the process ends."""
        path = f"{self._path}.lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise self._error(f"cannot be locked by {path} ({error.strerror})") from error
        try:
            if not _lock(file):
                os.lseek(file, 0, os.SEEK_SET)
                holder = os.read(file, 256).decode(errors="replace").strip()
                raise self._error(
                    f"is in use by {holder or 'another process'}: end that, or leave its Manager"
                )
            os.lseek(file, 0, os.SEEK_SET)
            os.ftruncate(file, 0)
            name = os.path.basename(sys.argv[0]) if sys.argv else ""
            os.write(file, os.fsencode(f"process {os.getpid()} ({name})\n"))
        except OSError as error:
            os.close(file)
            raise self._error(f"cannot be locked by {path} ({error.strerror})") from error
        except BaseException:
            os.close(file)
            raise
        return file

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        import sqlite3

        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._error(
                f"cannot be read or written ({error}): see to its file system and rights"
            ) from error

    def _error(self, problem: str) -> JournalError:
        return JournalError(f"the journal {self._path} {problem}", operation="journal")

    def __repr__(self) -> str:
        return f"<SQLiteJournal {self._path}>"


if sys.platform == "win32":

    def _lock(file: int) -> bool:
        """Whether the file is ours alone now.

        What is locked there nobody else can read: so it is a byte far behind the text.
        """
        import msvcrt

        os.lseek(file, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, 0):  # 0 is Wine's, which gives no reason
                raise
            return False
        return True

else:

    def _lock(file: int) -> bool:
        """Whether the file is ours alone now."""
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
