"""Which Debian packages the guest is made of, and how they are fetched.

The list is written out, dependencies included: a resolver takes ten seconds and
brings perl. Versions are whatever this machine's apt sources offer today. Apt is
run on lists and a status file of our own, so neither root, nor a recent
`apt-get update`, nor what happens to be installed here, plays a part.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from hotlun.errors import UnsupportedError
from hotlun.vm.cache import cache_directory
from hotlun.vm.errors import MachineError

KERNEL = "linux-image-cloud-amd64"
"""The meta-package; what it depends on is the kernel."""

GUEST = (
    # programs
    "base-files", "bash", "btrfs-progs", "coreutils", "cryptsetup-bin", "dash", "dmsetup",
    "e2fsprogs", "findutils", "grep", "kmod", "mount", "procps", "python3.11-minimal",
    "qemu-guest-agent", "sed", "util-linux", "xfsprogs",
    # Python's library
    "libpython3.11-minimal", "libpython3.11-stdlib",
    # libraries
    "libacl1", "libargon2-1", "libattr1", "libaudit1", "libblkid1", "libbsd0", "libbz2-1.0",
    "libc6", "libcap-ng0", "libcap2", "libcom-err2", "libcrypt1", "libcryptsetup12",
    "libdevmapper1.02.1", "libedit2", "libexpat1", "libext2fs2", "libfdisk1", "libffi8",
    "libgcc-s1", "libgcrypt20", "libglib2.0-0", "libgmp10", "libgpg-error0", "libinih1",
    "libjson-c5", "libkmod2", "liblz4-1", "liblzma5", "liblzo2-2", "libmd0", "libmount1",
    "libncursesw6", "libnuma1", "libpam0g", "libpcre2-8-0", "libpopt0", "libproc2-0",
    "libreadline8", "libselinux1", "libsmartcols1", "libsqlite3-0", "libss2", "libssl3",
    "libsystemd0", "libtinfo6", "libudev1", "liburcu8", "liburing2", "libuuid1", "libzstd1",
    "zlib1g",
)  # fmt: skip
"""What is in the guest's root (xfs_scrub alone would want libicu72, 36 MB)."""

TOOLS = ("busybox-static", "erofs-utils", "libfuse2")
"""What only the building needs. Their other libraries are in GUEST."""

FETCH_TIMEOUT = 900.0
"""Seconds for apt-get to bring about 65 MB."""


@dataclass(frozen=True)
class Packages:
    """Fetched packages: paths of .deb files."""

    kernel: str
    guest: tuple[str, ...]
    tools: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """File names, each with its version: what decides what is in the image."""
        paths = (self.kernel, *self.guest, *self.tools)
        return tuple(sorted(os.path.basename(path) for path in paths))


def fetch() -> Packages:
    """Download what is not in the cache yet.

    Raises:
        UnsupportedError: there is no apt here, or its sources are not Debian 12's.
        MachineError: the download failed; apt-get's words are in `detail`.
    """
    apt = _Apt(os.path.join(cache_directory(), "apt"))
    apt.update()
    kernel = apt.kernel()
    files = apt.download((kernel, *GUEST, *TOOLS))
    return Packages(
        kernel=files[kernel],
        guest=tuple(files[name] for name in GUEST),
        tools=tuple(files[name] for name in TOOLS),
    )


def extract(packages: tuple[str, ...], directory: str) -> None:
    """Unpack .deb files into one tree; owners are not kept, nobody needs root for that."""
    for package in packages:
        run(["dpkg-deb", "--extract", package, directory])


class _Apt:
    """apt-get with this machine's sources and keys, and a state of its own."""

    def __init__(self, directory: str) -> None:
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise UnsupportedError(
                    f"the guest is built from Debian packages, and {tool} is not here: "
                    "build on Debian 12 (packages apt, dpkg)"
                )
        self._debs = os.path.join(directory, "debs")
        lists = os.path.join(directory, "lists")
        status = os.path.join(directory, "status")
        for needed in (self._debs, os.path.join(lists, "partial")):
            os.makedirs(needed, exist_ok=True)
        with open(status, "a", encoding="ascii"):
            pass  # an empty status file: nothing is installed
        self._options = [
            "-qq",
            f"-oDir::State::Lists={lists}",
            f"-oDir::State::status={status}",
            f"-oDir::Cache={directory}",
            "-oAPT::Architecture=amd64",
            "-oAPT::Sandbox::User=root",  # the cache is private: apt's own user could not write it
            "-oDPkg::Use-Pty=0",
        ]

    def update(self) -> None:
        """Read the sources. One source that fails is no matter, as long as the packages are had."""
        run(["apt-get", *self._options, "update"], check=False)

    def kernel(self) -> str:
        """The package that the kernel's meta-package stands for today."""
        text = run(["apt-cache", *self._options, "show", "--no-all-versions", KERNEL], check=False)
        found = re.search(r"^Depends:.*?\b(linux-image-[0-9]\S*-cloud-amd64)\b", text, re.MULTILINE)
        if found is None:
            raise UnsupportedError(
                f"apt offers no {KERNEL} here: the guest is built from Debian 12; "
                "check the network and that Debian's sources are configured"
            )
        return found[1]

    def download(self, names: tuple[str, ...]) -> dict[str, str]:
        """Package name -> path of the .deb; older versions are thrown away."""
        listing = run(["apt-get", *self._options, "download", "--print-uris", *names])
        run(["apt-get", *self._options, "download", *names], cwd=self._debs)
        wanted = re.findall(r"^'[^']*' (\S+\.deb) ", listing, re.MULTILINE)
        files = {name.split("_")[0]: os.path.join(self._debs, name) for name in wanted}
        missing = [name for name in names if not os.path.isfile(files.get(name, ""))]
        if missing:
            raise MachineError(f"apt-get did not bring {', '.join(missing)}; try again")
        for name in set(os.listdir(self._debs)) - set(wanted):
            os.unlink(os.path.join(self._debs, name))
        return files


def run(
    argv: list[str],
    *,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    check: bool = True,
) -> str:
    """Run a build step and return what it printed.

    Raises:
        MachineError: it failed, and `check` was asked for.
    """
    done = subprocess.run(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=FETCH_TIMEOUT,
        check=False,
    )
    if check and done.returncode != 0:
        words = (done.stderr or done.stdout).strip()[-2000:]
        raise MachineError(
            f"building the guest failed in {os.path.basename(argv[0])} "
            f"(exit status {done.returncode}): {words}",
            operation="build",
            code=done.returncode,
            detail=words,
        )
    return done.stdout
