"""The one place that turns errors into words for a terminal, and into exit codes.

The library's messages say what happened and what a program can do about it; the
hints added here say what somebody at a terminal can do.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import click

from hotlun.cli.logs import is_debugging
from hotlun.cli.running import TerminatedError
from hotlun.errors import HotlunError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HINTS: dict[str, str] = {
    "CheckFailedError": "run it again with --debug, and report what it says: this is a bug",
    "MachineError": "'hotlun vm list' shows the VMs that run; --debug shows each step",
    "UnsupportedError": "if something is missing on this machine, scripts/setup installs it",
    "OutcomeUnknownError": "it may have happened: look before you try again",
    "DiskConflictError": "use the disk as it is in use already, or release it everywhere first",
    "GuestPathConflictError": "choose another guest path, or leave it out: one is generated",
    "JournalError": "'hotlun journal show PATH' shows what stands in a journal",
    "NoAvailableLocationError": "release a disk, or start the VM with more --controllers",
    "BackendError": "--debug shows what was asked for, and what the other side answered",
}
"""By the name of the error's class: some are in modules that only their commands import."""


class Explanation(NamedTuple):
    """An error for a person: what happened, what is known besides, what to do."""

    message: str
    details: tuple[str, ...]
    hint: str

    @property
    def more(self) -> tuple[str, ...]:
        """All lines after the message."""
        hint = (f"hint: {self.hint}",) if self.hint else ()
        return (*(f"  {line}" for line in self.details), *hint)


def explain(error: BaseException) -> list[Explanation]:
    """What there is to say of an error; of a group of errors, of each in it."""
    if isinstance(error, BaseExceptionGroup):
        return [explanation for one in error.exceptions for explanation in explain(one)]
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    details: list[str] = []
    detail = getattr(error, "detail", "")
    if detail and detail not in message:
        details += detail.splitlines()
    for note in getattr(error, "__notes__", ()):
        details += note.splitlines()
    names = (kind.__name__ for kind in type(error).mro())
    hint = next((_HINTS[name] for name in names if name in _HINTS), "")
    return [Explanation(message, tuple(details), hint)]


@contextmanager
def translated(ctx: click.Context) -> Iterator[None]:
    """A block whose errors are told to whoever is at the terminal, and end with an exit code.

    The library's and the system's errors, that is. All others are mistakes in
    hotlun: they pass, with their traceback.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    try:
        yield
    except KeyboardInterrupt:
        _tell_interruption(ctx, "interrupted", signal.SIGINT)
    except TerminatedError as error:
        _tell_interruption(ctx, str(error), error.number)
    except BrokenPipeError:
        raise  # nobody reads on: click ends without a word
    except (HotlunError, OSError, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup) and error.split((HotlunError, OSError))[1]:
            raise
        if is_debugging(ctx):
            import traceback

            click.echo("".join(traceback.format_exception(error)), err=True)
        for explanation in explain(error):
            click.secho(f"error: {explanation.message}", fg="red", err=True)
            for line in explanation.more:
                click.echo(line, err=True)
        ctx.exit(1)


def _tell_interruption(ctx: click.Context, words: str, number: signal.Signals) -> None:
    click.secho(f"{words}; what was begun has been undone", fg="yellow", err=True)
    ctx.exit(128 + number)  # as a shell reports a program that a signal has ended
