"""The guest's programs: `subprocess` and `selectors` of the guest. None of them runs."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING, Any, Self

from fuzz.grammar import SECRET
from fuzz.guest.errors import StrayError
from fuzz.guest.files import File
from fuzz.guest.tree import failure

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from fuzz.guest.blocks import Blocks
    from fuzz.guest.files import Files
    from fuzz.guest.mapper import Mapper
    from fuzz.guest.tree import Tree

_GARBAGE = b"\xff\x00 mkfs: \x1b[2J no\nUsage: x\n" + b"y" * 9000


class Programs:
    """Stands in for `subprocess`."""

    PIPE, DEVNULL, STDOUT = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(
        self,
        tree: Tree,
        files: Files,
        mapper: Mapper,
        step: Callable[[str], None],
        claimed: Callable[[Blocks], bool],
    ) -> None:
        self.tree = tree
        self.files = files
        self.mapper = mapper
        self.claimed = claimed
        self._step = step
        self.luck: random.Random | None = None

    def __getattr__(self, name: str) -> object:
        raise StrayError(f"subprocess.{name}")

    def Popen(  # noqa: N802 - as in subprocess
        self, command: Sequence[str], *, stdin: int, env: dict[str, str], **_: Any
    ) -> Process:
        self._step("exec")
        if not self.files.path.isfile(command[0]):
            raise failure(errno.ENOENT, command[0])
        for word in (*command, *env.values()):
            if SECRET.decode() in word or "\0" in word:
                raise StrayError(f"an argument that must not be: {word!r}")
        return Process(self, [*command], has_input=stdin == self.PIPE)


class Process:
    """One that is over as soon as anybody looks."""

    pid = 4711

    def __init__(self, programs: Programs, command: list[str], *, has_input: bool) -> None:
        self._programs = programs
        self._command = command
        self._input = b""
        self._status: int | None = None
        self.stdin = self if has_input else None
        self.stdout = Output(programs.files, self)

    # Its standard input.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: bytes) -> int:
        self._programs._step("write to a program")
        self._input += data
        return len(data)

    # Its end.

    def wait(self, timeout: float | None = None) -> int:
        status, _ = self.ended()
        if timeout is not None and status == -1000:
            raise subprocess.TimeoutExpired(self._command, timeout)
        return status

    def ended(self) -> tuple[int, bytes]:
        """How, and what it printed."""
        if self._status is None:
            luck = self._programs.luck
            dice = luck.random() if luck else 1.0
            if dice < 0.04:
                self._status, self._output = luck.choice((1, 4, -9)) if luck else 1, _GARBAGE
            elif dice < 0.05:
                self._status, self._output = -1000, b""
            else:
                self._status, self._output = self._run()
        return self._status, self._output

    def _run(self) -> tuple[int, bytes]:
        name, arguments = os.path.basename(self._command[0]), self._command[1:]
        if name == "modprobe":
            self._programs.mapper.is_loaded = True
            return 0, b""
        if name == "cryptsetup":
            return self._cryptsetup(arguments)
        if not name.startswith("mkfs."):
            raise StrayError(f"program {name}")
        node = self._programs.tree.walk(arguments[-1]).node
        if node.blocks is None or self._programs.claimed(node.blocks) or node.blocks.read_only:
            return 1, b"is in use\n"
        blocks = self._programs.tree.touch(node).blocks
        if blocks is None or blocks.broken:
            return 1, b"Input/output error\n"
        try:
            blocks.fill(name.removeprefix("mkfs."))
        except OSError as error:
            return 1, f"mkfs: {error}\n".encode()
        return 0, b""

    def _cryptsetup(self, arguments: list[str]) -> tuple[int, bytes]:
        tree = self._programs.tree
        paths = [word for word in arguments if word.startswith("/dev/")]
        node = tree.walk(paths[0]).node
        if node.blocks is None or node.blocks.broken:
            return 4, b"Device cannot be read.\n"
        if arguments[0] == "luksFormat":
            blocks = tree.touch(node).blocks
            if blocks is None or blocks.read_only:
                return 4, b"Cannot write.\n"
            blocks.fill("half LUKS" if "hotlun: unfinished" in arguments else "crypto_LUKS")
            blocks.key = self._input
            return 0, b""
        if arguments[0] == "config":
            if node.blocks.read_only:
                return 4, b"Cannot write.\n"
            self._programs.tree.touch(node)
            node.blocks.write(208, bytes(48))
            return 0, b""
        if node.blocks.filesystem != "crypto_LUKS":
            return 1, b"Device is not a valid LUKS device.\n"
        if self._input != node.blocks.key:
            return 2, b"No key available with this passphrase.\n"
        if "--test-passphrase" not in arguments:
            try:
                self._programs.mapper.open_luks(arguments[-1], node.blocks)
            except OSError:
                return 5, b"Device already exists.\n"
        return 0, b""


class Output:
    """What it prints; a file, and its own selector."""

    def __init__(self, files: Files, process: Process) -> None:
        self._files = files
        self._process = process
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            self._files.close(self._descriptor)

    def fileno(self) -> int:
        if self._descriptor < 0:
            _, output = self._process.ended()
            self._descriptor = self._files.add(File(self._files.no_file, 0, output))
        return self._descriptor


class Selectors:
    """Stands in for `selectors`."""

    EVENT_READ = 1

    def __getattr__(self, name: str) -> object:
        raise StrayError(f"selectors.{name}")

    def DefaultSelector(self) -> _Selector:  # noqa: N802 - as in selectors
        return _Selector()


class _Selector:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def register(self, file: object, events: int) -> None:
        pass

    def select(self, timeout: float) -> bool:
        return True
