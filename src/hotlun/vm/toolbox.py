"""Runs programs out of the tree that is being built.

`depmod` must know the kernel's module format, `compileall` must be the guest's
very Python, and `mkfs.erofs` must write what the guest's kernel reads. All of
them are in the packages just unpacked; started through the dynamic loader that
came with them they need nothing of this machine, whatever it runs.
"""

from __future__ import annotations

import os

from hotlun.errors import UnsupportedError
from hotlun.vm.packages import run

LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
"""Not the one in /lib64: that is an absolute symlink, to this machine's loader."""
LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")


class Toolbox:
    """Programs of `root`, and of `tools` beside it, which has no libraries of its own to speak of.

    Raises:
        UnsupportedError: this machine cannot execute x86-64 programs.
    """

    def __init__(self, root: str, tools: str) -> None:
        if os.uname().machine != "x86_64":
            raise UnsupportedError(
                "the guest is built with programs of its own, which are x86-64: "
                f"this machine is {os.uname().machine}; build on an x86-64 one"
            )
        self._root = root
        self._library_path = ":".join(
            os.path.join(tree, path) for tree in (root, tools) for path in LIBRARIES
        )

    def run(self, program: str, *arguments: str, name: str = "", **environment: str) -> str:
        """Run `program` (a path) as `name`, with a small environment; returns what it printed."""
        return run(
            [
                os.path.join(self._root, LOADER),
                "--inhibit-cache",
                "--library-path",
                self._library_path,
                "--argv0",
                name or program,
                program,
                *arguments,
            ],
            env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", **environment},
        )
