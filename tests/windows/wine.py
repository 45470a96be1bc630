"""A Windows: a folder with all that Wine keeps of one, and programs that are run in it."""

from __future__ import annotations

import contextlib
import filecmp
import glob
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERSION = "win10"
"""Wine's own choice, Windows 7, is one that this Python refuses to know."""

_OWN = "/usr/lib/*/wine/x86_64-windows"
"""Where Debian's libwine has the libraries that every new Windows gets a copy of."""


class WineError(Exception):
    """A program of the rig's has failed."""


@dataclass(frozen=True)
class Windows:
    """One in a folder of its own (a "prefix").

    Two programs may run in it at once, as on any Windows.

    Args:
        folder: of it.
        without: libraries that are not there for what is run, by their names without `.dll`.
    """

    folder: str
    without: tuple[str, ...] = ()

    @property
    def system32(self) -> str:
        return os.path.join(self.folder, "drive_c", "windows", "system32")

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

    def run(self, arguments: list[str], variables: Mapping[str, str]) -> int:
        """Run a program, its output on ours, until it ends; its exit status."""
        # Windows' Python takes neither a file of Unix nor a closed one for its standard streams.
        with subprocess.Popen(
            ["wine", *arguments],
            env={**self._environment(), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            try:
                while data := os.read(process.stdout.fileno(), 65536):
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
            except BaseException:
                process.terminate()
                raise
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
        _fail(arguments, done)
    return done.stdout


def _fail(arguments: list[str], done: subprocess.CompletedProcess[str]) -> NoReturn:
    raise WineError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
