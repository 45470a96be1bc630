"""The guest's image: kernel, initramfs and a read-only root, built once and kept.

No step needs root: packages are unpacked, not installed, no maintainer script
runs, nothing is mounted, and mkfs.erofs makes everything root's in the image.
"""

from __future__ import annotations

import asyncio
import glob
import json
import logging
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib import resources

from hotlun.errors import UnsupportedError
from hotlun.vm import packages
from hotlun.vm.cache import Shelf, fingerprint
from hotlun.vm.errors import MachineError
from hotlun.vm.initramfs import Archive
from hotlun.vm.toolbox import Toolbox

log = logging.getLogger("hotlun.vm")

EARLY_MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
    "crct10dif_generic", "crc-t10dif", "t10-pi", "scsi_common", "scsi_mod", "virtio_scsi", "sd_mod",
    "virtio_console", "crc32c_generic", "libcrc32c", "erofs", "virtio_blk", "overlay",
)  # fmt: skip
"""What must be there before the root is, in the order of its loading."""

ROOT_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\ndisk:x:6:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/hosts": "127.0.0.1 localhost hotlun\n",
    "etc/hostname": "hotlun\n",
}
"""What Debian's maintainer scripts would have written."""

UNUSED = (
    "boot", "lib/modules/*/kernel/net", "lib/modules/*/kernel/drivers/net",
    "usr/games", "usr/include", "usr/share/doc", "usr/share/info", "usr/share/locale",
    "usr/share/man", "usr/share/lintian", "usr/lib/python3*/lib-dynload/_dbm.*",
    "usr/lib/python3*/lib-dynload/nis.*",
)  # fmt: skip
"""What nobody will miss, and extension modules whose libraries are not in the guest."""


@dataclass(frozen=True)
class Image:
    """A built image: paths of its files, and its name, which stands for its content."""

    key: str
    directory: str

    @property
    def kernel(self) -> str:
        """The kernel, as QEMU's `-kernel` takes it."""
        return os.path.join(self.directory, "vmlinuz")

    @property
    def initramfs(self) -> str:
        """The initramfs less the agent."""
        return os.path.join(self.directory, "initramfs")

    @property
    def root(self) -> str:
        """The root file system, an erofs image."""
        return os.path.join(self.directory, "root.erofs")


async def built_image() -> Image:
    """The image from the cache; it is built (fetching about 65 MB) if it is not there.

    Its name is a hash of the recipe. The versions of the packages are those of
    the day it was built, and stand in its `manifest.json`.

    Raises:
        UnsupportedError: it cannot be built here.
        MachineError: a step of the building failed.
    """
    key = _recipe()
    shelf = Shelf("images", keep=2)
    if (directory := shelf.find(key)) is None:
        async with shelf.lock(key):
            if (directory := shelf.find(key)) is None:
                log.info("building the guest's image; this happens once and takes a minute")
                started = time.monotonic()
                # A thread, for all of it blocks. A caller who is cancelled takes its ground away.
                with shelf.building(key) as building:
                    await asyncio.to_thread(_build, building)
                    directory = shelf.finish(key, building)
                log.info("the guest's image was built in %.1f s", time.monotonic() - started)
    return Image(key, directory)


def _recipe() -> str:
    here = resources.files("hotlun.vm")
    sources = ("packages.py", "toolbox.py", "initramfs.py", "image.py")
    guest = sorted(here.joinpath("guest").iterdir(), key=lambda file: file.name)
    return fingerprint(
        *(here.joinpath(name).read_bytes() for name in sources),
        *(part for file in guest if file.is_file() for part in (file.name, file.read_bytes())),
    )


def _build(directory: str) -> None:
    if os.uname().machine != "x86_64":
        raise UnsupportedError(f"the guest is built on x86-64 only, this is {os.uname().machine}")
    fetched = packages.fetch()
    with tempfile.TemporaryDirectory(prefix="tree-", dir=directory) as scratch:
        root, tools = os.path.join(scratch, "root"), os.path.join(scratch, "tools")
        packages.extract((fetched.kernel, *fetched.guest), root)
        packages.extract(fetched.tools, tools)
        shutil.copyfile(_only(root, "boot/vmlinuz-*"), os.path.join(directory, "vmlinuz"))
        _prune(root)
        _merge_usr(root)
        _configure(root)
        toolbox = Toolbox(root, tools)
        _index_modules(root, toolbox)
        _compile_python(root, toolbox)
        with open(os.path.join(directory, "initramfs"), "wb") as file:
            file.write(_initramfs(root, tools))
        toolbox.run(
            os.path.join(tools, "usr/bin/mkfs.erofs"),
            "--all-root", "-T0", "-x-1", os.path.join(directory, "root.erofs"), root,
        )  # fmt: skip
    with open(os.path.join(directory, "manifest.json"), "w", encoding="utf-8") as manifest:
        json.dump({"packages": fetched.names}, manifest, indent=1)


def _prune(root: str) -> None:
    for pattern in UNUSED:
        for path in glob.glob(os.path.join(root, pattern)):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def _merge_usr(root: str) -> None:
    """Make /bin and the like symlinks into /usr, as on every Debian 12 (there by a script)."""
    for name in ("bin", "sbin", "lib", "lib64"):
        top = os.path.join(root, name)
        for parent, _, _ in os.walk(top):
            target = os.path.join(root, "usr", os.path.relpath(parent, root))
            os.makedirs(target, exist_ok=True)
            for entry in os.scandir(parent):
                if not entry.is_dir(follow_symlinks=False):
                    os.replace(entry.path, os.path.join(target, entry.name))
        shutil.rmtree(top)
        os.symlink(f"usr/{name}", top)


def _configure(root: str) -> None:
    for name, text in ROOT_FILES.items():
        with open(os.path.join(root, name), "w", encoding="utf-8") as file:
            file.write(text)
    os.symlink("/proc/self/mounts", os.path.join(root, "etc/mtab"))
    os.symlink("python3.11", os.path.join(root, "usr/bin/python3"))
    for needed in ("base", "upper", "mnt", "run", "tmp", "var/tmp"):
        os.makedirs(os.path.join(root, needed), exist_ok=True)
    scripts = os.path.join(root, "usr/lib/hotlun")
    os.makedirs(scripts)
    for name in ("init", "warm", "resume"):
        path = os.path.join(scripts, name)
        with open(path, "wb") as script:
            script.write(_guest_file(name))
        os.chmod(path, 0o755)  # noqa: S103 - the guest's, who has one user


def _guest_file(name: str) -> bytes:
    return resources.files("hotlun.vm").joinpath("guest", name).read_bytes()


def _index_modules(root: str, toolbox: Toolbox) -> None:
    version = os.path.basename(_only(root, "lib/modules/*"))
    toolbox.run(os.path.join(root, "usr/bin/kmod"), "-b", root, version, name="depmod")


def _compile_python(root: str, toolbox: Toolbox) -> None:
    """Compile the library ahead: the root is read-only, and compiling costs 0.7 s a start."""
    toolbox.run(
        os.path.join(root, "usr/bin/python3.11"),
        "-m", "compileall", "-q", "-j", "0", "-s", root, "-p", "/",
        "--invalidation-mode", "unchecked-hash",
        "-x", "lib2to3|pydoc_data|distutils|/test",
        os.path.join(root, "usr/lib/python3.11"),
        PYTHONHOME=os.path.join(root, "usr"),
    )  # fmt: skip


def _initramfs(root: str, tools: str) -> bytes:
    archive = Archive()
    for name in ("bin", "modules", "dev", "proc", "sys", "base", "upper", "root"):
        archive.directory(name)
    archive.file("bin/busybox", _read(os.path.join(tools, "bin/busybox")), executable=True)
    archive.file("init", _guest_file("early-init"), executable=True)
    for number, module in enumerate(EARLY_MODULES):
        path = _module(root, module)
        if path is not None:
            archive.file(f"modules/{number:02}-{module}.ko", _read(path))
    return archive.finished()


def _module(root: str, name: str) -> str | None:
    """The file of a module; None if this kernel has it built in."""
    directory = _only(root, "lib/modules/*")
    found = glob.glob(os.path.join(directory, "kernel", "**", f"{name}.ko"), recursive=True)
    if found:
        return found[0]
    builtin = _read(os.path.join(directory, "modules.builtin")).decode()
    if re.search(rf"/{re.escape(name)}\.ko$", builtin, re.MULTILINE):
        return None
    raise MachineError(f"the kernel package has no module {name}: the list in image.py is outdated")


def _only(root: str, pattern: str) -> str:
    found = glob.glob(os.path.join(root, pattern))
    if len(found) != 1:
        raise MachineError(f"expected one {pattern} in the kernel package, found {len(found)}")
    return found[0]


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
