"""A program that uses hotlun in a Python that lacks what Windows' lacks.

What that is was read from a Python 3.13 for Windows; the names are those that anybody might
use. It is taken away after asyncio, its loop and what else is not ours are there, which are
made for this system. Its arguments are a folder to work in, and the modules to import.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import types
from pathlib import Path

import click.testing
import qemu.qmp  # noqa: F401 - for this system

MODULES = "curses fcntl grp pty pwd readline resource syslog termios tty"
ATTRIBUTES = {
    os: """
        O_CLOEXEC O_DIRECT O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE
        SEEK_DATA SEEK_HOLE WEXITED WEXITSTATUS WIFEXITED WNOHANG WNOWAIT chown chroot
        copy_file_range eventfd fchdir fchown fdatasync fork forkpty fstatvfs getegid geteuid
        getgid getgrouplist getgroups getloadavg getpgid getpgrp getrandom getuid getxattr
        killpg lchown listxattr lockf major makedev memfd_create minor mkfifo mknod nice
        openpty pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn pread preadv pwrite
        pwritev readv removexattr sched_getaffinity sched_setaffinity sched_yield sendfile
        setgid setpgid setsid setuid setxattr statvfs sync sysconf ttyname uname wait wait3
        wait4 waitid writev""",
    socket: "AF_NETLINK AF_UNIX AF_VSOCK CMSG_LEN SCM_RIGHTS SOCK_CLOEXEC SOCK_NONBLOCK recv_fds",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2"
    " alarm pause pthread_kill pthread_sigmask setitimer sigwait",
    select: "PIPE_BUF epoll poll",
    asyncio: "open_unix_connection start_unix_server",
}


def locking(file: int, mode: int, size: int) -> None:
    """As `msvcrt.locking` does, of which this is all that is used."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(errno.EACCES, "locked") from error


def take_away() -> None:
    """From now on, this is no POSIX."""
    os.supports_dir_fd.clear()
    importlib.reload(shutil)  # that is how it decides what to remove folders with
    msvcrt = types.ModuleType("msvcrt")
    vars(msvcrt).update(locking=locking, LK_NBLCK=2)
    sys.modules["msvcrt"] = msvcrt
    sys.platform = "win32"
    refused: dict[str, None] = dict.fromkeys(MODULES.split())
    sys.modules.update(refused)  # type: ignore[arg-type]  # None there refuses an import
    for module, names in ATTRIBUTES.items():
        for name in names.split():
            delattr(module, name)


async def use(folder: Path) -> None:
    """A disk that is added, taken over by the next Manager, and released."""
    from hotlun import Manager, MountConfig, UnsupportedError
    from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
    from hotlun.backends.qemu import QEMUHostBackend
    from hotlun.bridge.client import BridgeConnection
    from hotlun.errors import JournalError
    from hotlun.journal import SQLiteJournal

    host = MemoryHostBackend()
    guest = MemoryGuestBackend(host)
    journal = folder / "vm.journal"
    async with Manager(host, guest, journal=SQLiteJournal(journal)) as manager:
        await manager.add_virtual_disk(folder / "a.vhdx", mount=MountConfig(), owner="test")
        try:
            SQLiteJournal(journal).open()
        except JournalError as error:
            assert f"process {os.getpid()}" in str(error)  # noqa: PT017 - no pytest here
        else:
            raise AssertionError("it has been opened twice")
    async with Manager(host, guest, journal=SQLiteJournal(journal)) as manager:
        (mount,) = manager.mounts
        await mount.release()
    try:
        async with QEMUHostBackend.connect("qmp.sock"):
            raise AssertionError("connected without unix sockets")
    except UnsupportedError as error:
        assert "unix socket" in str(error)  # noqa: PT017
    try:
        BridgeConnection.connect_unix("agent.sock")
    except UnsupportedError as error:
        assert "unix socket" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a connection without unix sockets")
    try:
        importlib.import_module("hotlun.vm")
    except ImportError as error:
        assert "on Linux alone" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a QEMU without unix sockets")


def command(*arguments: str) -> tuple[int, str]:
    """What `hotlun` says to these."""
    from hotlun.cli import main

    result = click.testing.CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def use_commands(folder: Path) -> None:
    """Those that make sense, and those that do not."""
    for arguments in (
        ("--version",),
        ("--help",),
        ("journal", "show", str(folder / "vm.journal")),
        ("journal", "forget", "--yes", str(folder / "vm.journal")),
        ("agent", "build", str(folder / "agent.pyz")),
    ):
        code, output = command(*arguments)
        assert code == 0, (arguments, output)
    assert (folder / "agent.pyz").read_bytes().startswith(b"#!")
    for words in ("demo", "vm list", "vm start"):
        code, output = command(*words.split())
        assert code == 1, (words, output)
        assert "run on Linux" in output, (words, output)


def main(folder: Path, names: list[str]) -> None:
    with asyncio.Runner() as runner:
        runner.get_loop()
        take_away()
        for name in names:
            importlib.import_module(name)
        runner.run(use(folder))
        use_commands(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    print("used", len(sys.argv) - 2, "modules")  # noqa: T201 - a program's output
