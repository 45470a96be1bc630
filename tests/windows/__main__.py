"""`scripts/test-windows`: the suite's Windows part, by Windows' own Python on Wine."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from windows import parts, suite
from windows.wine import Windows, WineError, checked, windows_path

from hotlun.vm.cache import Shelf, fingerprint

KEPT = 3
"""Windows in the cache, of 50 MB each."""

WITH_SERVICE = ("-p", "windows.unix_sockets")
"""More of pytest's options, but for what shows what a Windows lacks."""

SERVICE = ("computecore", "vmcompute")
"""The compute service's libraries."""

OPTIONS = (
    # A place in the source for every task, which asyncio's debugging notes, is a dozen calls of
    # stat(); on Wine these take 40 of 44 seconds. The suite on Linux has it on.
    "--override-ini=asyncio_debug=false",
    "-p", "no:cacheprovider",  # that cache is the suite's on Linux
    "-m", "not qemu and not root and not vm",
)  # fmt: skip


async def installed() -> str:
    """The folder of a Windows with all that it needs; made if it is not in the cache."""
    shelf = Shelf("windows", keep=KEPT)
    key = fingerprint(checked(["wine", "--version"]), *parts.sources())
    async with shelf.lock(key):
        if found := shelf.find(key):
            return found
        began = time.monotonic()
        print("test-windows: making a Windows", file=sys.stderr)
        with shelf.building(key) as folder:
            windows = Windows(os.path.join(folder, "wine"))
            windows.install()
            parts.install_python(os.path.join(folder, "python"))
            parts.install_packages(os.path.join(folder, "packages"))
            parts.install_service(windows)
            made = shelf.finish(key, folder)
        print(f"test-windows: made in {time.monotonic() - began:.0f} s", file=sys.stderr)
        return made


def pytest(folder: str, arguments: list[str], *, without: tuple[str, ...] = ()) -> int:
    """Run pytest there, and return its exit status."""
    search = [parts.ROOT / "src", os.path.join(folder, "packages"), parts.ROOT / "tests"]
    variables = {
        "PYTHONPATH": ";".join(windows_path(str(path)) for path in search),
        "PYTHONPYCACHEPREFIX": windows_path(os.path.join(folder, "bytecode")),
        "PYTHONIOENCODING": "utf-8",
    }
    python = os.path.join(folder, "python", "python.exe")
    with Windows.copied(os.path.join(folder, "wine"), without) as windows:
        return windows.run([python, "-m", "pytest", *OPTIONS, *arguments], variables)


def main(arguments: list[str]) -> int:
    """Run the suite's part, or what the arguments name."""
    try:
        folder = asyncio.run(installed())
    except WineError as error:
        print(f"test-windows: {error}", file=sys.stderr)
        return 1
    named = {argument.partition("::")[0] for argument in arguments}
    if not any(map(os.path.exists, named)):
        arguments = ["-q", *arguments]
        missing = pytest(folder, [*arguments, suite.WITHOUT_SERVICE], without=SERVICE)
        return pytest(folder, [*WITH_SERVICE, *arguments, *suite.FILES]) or missing
    if suite.WITHOUT_SERVICE in named:
        return pytest(folder, arguments, without=SERVICE)
    return pytest(folder, [*WITH_SERVICE, f"--ignore={suite.WITHOUT_SERVICE}", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
