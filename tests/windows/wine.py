"""A Windows: a folder with all that Wine keeps of one, and programs that are run in it."""

from __future__ import annotations

import contextlib
import filecmp
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_VERSION = "win10"
"""Python 3.13 is made for it; what Wine chooses by itself here is Windows 7."""

_OWN = "/usr/lib/*/wine/x86_64-windows"
"""Where Debian's libwine has the libraries that every new Windows gets a copy of."""


class WineError(Exception):
    """A program of the rig's has failed."""


@dataclass(frozen=True)
class Windows:
    """One in a folder of its own (a "prefix").

    Args:
        folder: of it.
        without: libraries that are not there for what is run, by their names without `.dll`.
    """

    folder: str
    without: tuple[str, ...] = ()

    @property
    def system32(self) -> str:
        return os.path.join(self.folder, "drive_c", "windows", "system32")

    @classmethod
    @contextlib.contextmanager
    def copied(cls, folder: str, without: tuple[str, ...] = ()) -> Iterator[Self]:
        """Another one of that folder, for once: all that was begun in it ends with the block."""
        with tempfile.TemporaryDirectory(prefix="hotlun-windows-") as scratch:
            windows = cls(os.path.join(scratch, "wine"), without)
            shutil.copytree(folder, windows.folder, symlinks=True)
            try:
                yield windows
            finally:
                windows.end()

    def install(self) -> None:
        """Make it, and be gone from it, so that it can be moved.

        Raises:
            WineError: Wine failed.
        """
        os.mkdir(self.folder)
        checked(["wineboot", "--init"], env=self._environment())
        key = r"HKEY_CURRENT_USER\Software\Wine"
        setting = ["/v", "Version", "/d", _VERSION, "/f"]
        checked(["wine", "reg", "add", key, *setting], env=self._environment())
        checked(["wineserver", "--wait"], env=self._environment())
        self._share_libraries()

    def end(self) -> None:
        """End all that runs there, and wait until nothing does."""
        for order in ("--kill", "--wait"):  # the former fails where there is nothing to end
            subprocess.run(["wineserver", order], env=self._environment(), check=False)

    def run(self, arguments: list[str], variables: Mapping[str, str]) -> int:
        """Run a program, its output on ours, and end what it leaves; its exit status."""
        # Windows' Python takes neither a file of Unix nor a closed one for its standard streams.
        with subprocess.Popen(
            ["wine", *arguments],
            env={**self._environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            telling = threading.Thread(target=_tell, args=(process.stdout,))
            telling.start()
            try:
                process.wait()
            finally:
                self.end()  # else a program that outlives the other would keep the pipe open
                telling.join()
        return process.returncode

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
        return environment | {
            "WINEPREFIX": self.folder,
            "WINEARCH": "win64",
            "WINEDEBUG": "-all",
            # Never .NET, nor a browser: Wine would ask for them to be installed.
            "WINEDLLOVERRIDES": ",".join(("mscoree", "mshtml", *self.without)) + "=",
        }

    def _share_libraries(self) -> None:
        """Links in place of copies: 10 MB in place of 700."""
        [own] = glob.glob(_OWN)
        for folder, _, names in os.walk(os.path.join(self.folder, "drive_c", "windows")):
            for name in names:
                copy, original = os.path.join(folder, name), os.path.join(own, name)
                with contextlib.suppress(FileNotFoundError):
                    if filecmp.cmp(copy, original, shallow=False):
                        os.unlink(copy)
                        os.symlink(original, copy)


def _tell(output: IO[bytes]) -> None:
    while data := os.read(output.fileno(), 65536):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def windows_path(path: str) -> str:
    """What a file of ours is called there: Wine has our root as drive Z:."""
    return "Z:" + os.path.abspath(path).replace("/", "\\")


def checked(arguments: list[str], env: Mapping[str, str] | None = None) -> str:
    """Run a program that has to succeed; its output.

    Raises:
        WineError: it failed; with what it said.
    """
    done = subprocess.run(
        arguments,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = done.stdout[-4000:]
        raise WineError(f"{' '.join(arguments)} ended with {done.returncode}:\n{said}")
    return done.stdout
