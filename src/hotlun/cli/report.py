"""What the demo says while it goes: chapters, what was done, what was checked, how long it took."""

from __future__ import annotations

import inspect
import textwrap
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from hotlun.cli.failures import explain
from hotlun.errors import HotlunError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from rich.console import RenderableType

_INDENT = 3


class CheckFailedError(HotlunError):
    """What was read from the VM is not what the demo claims."""


class Report:
    """A report to a terminal, or to a file as plain text.

    Args:
        show_code: print each chapter's source before it runs.
        console: where to; standard output if None.
    """

    def __init__(self, *, show_code: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, emoji=False)
        self._show_code = show_code
        self._chapters = 0
        self._checks = 0
        self._began = time.monotonic()
        self._tick = "+" if self._console.options.ascii_only else "✓"

    async def chapter(self, tell: Callable[[], Awaitable[None]]) -> None:
        """Run a part of the story: its docstring is the title, its source the manual."""
        with self.titled(inspect.getdoc(tell) or ""):
            if self._show_code:
                self.show(Syntax(_body(tell), "python", theme="ansi_dark"))
            await tell()

    @contextmanager
    def titled(self, title: str) -> Iterator[None]:
        """A block under a numbered title, with the time it took at its end."""
        self._chapters += 1
        self._console.print(Text(f"\n{self._chapters:>2} {title}", style="bold"))
        with self._timed():
            yield

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """A block that takes a moment: says so while it does and, when it is done, how long."""
        began = time.monotonic()
        with self._console.status(Text(what)):
            yield
        self._say(f"{_seconds(began)}  {what}")

    def check(self, holds: object, claim: str) -> None:
        """Say that something was found to be so.

        Raises:
            CheckFailedError: it is not so.
        """
        if not holds:
            raise CheckFailedError(f"this should be so, and is not: {claim}")
        self._checks += 1
        self._say(Text.assemble((f"{self._tick} ", "green"), claim))

    def show(self, picture: RenderableType) -> None:
        """Print a picture, indented."""
        self._console.print(Padding(picture, (0, 0, 0, _INDENT), expand=False))

    def refused(self, error: HotlunError) -> None:
        """Show an error as the command line shows it to its users."""
        for explanation in explain(error):
            self._say(Text(f"error: {explanation.message}", style="red"))
            for line in explanation.more:
                self._say(line)

    def end(self, words: str) -> None:
        """The last line: what it all comes to, and the time it took."""
        summary = f"\n{self._checks} checks, {_seconds(self._began)}: {words}"
        self._console.print(Text(summary, style="bold green"))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._console.print(Text(_seconds(began), style="dim"), justify="right")

    def _say(self, words: str | Text) -> None:
        self.show(words if isinstance(words, Text) else Text(words))


def _seconds(since: float) -> str:
    return f"{time.monotonic() - since:.2f} s"


def _body(function: Callable[..., object]) -> str:
    """The source of a function, less its first line and its docstring."""
    lines = inspect.getsource(function).splitlines()
    return textwrap.dedent("\n".join(lines[2:]))
