"""The library's log on the terminal: what takes long, always; every step, with --debug."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    _Command = TypeVar("_Command", bound=Callable[..., Any])

_DEBUG = "hotlun.debug"
_HANDLER = "hotlun.log"


def debug_option(command: _Command) -> _Command:
    """Give a command `--debug`, wherever on the command line it is written."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_log_to_terminal,
        help="Log every step, and show tracebacks.",
    )(command)


def is_debugging(ctx: click.Context) -> bool:
    """Whether `--debug` was given."""
    return bool(ctx.meta.get(_DEBUG))


class _TerminalHandler(logging.Handler):
    """Writes to whatever standard error is at the time, dimmed if that is a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            click.secho(self.format(record), dim=record.levelno < logging.WARNING, err=True)
        except Exception:
            self.handleError(record)


def _log_to_terminal(ctx: click.Context, _option: click.Parameter, debug: bool) -> None:
    if _HANDLER not in ctx.meta:
        ctx.meta[_HANDLER] = handler = _TerminalHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("hotlun").addHandler(handler)
        _set_levels(ctx, logging.WARNING, logging.INFO)
        ctx.find_root().call_on_close(lambda: logging.getLogger("hotlun").removeHandler(handler))
    if debug and not is_debugging(ctx):
        ctx.meta[_DEBUG] = True
        ctx.meta[_HANDLER].setFormatter(logging.Formatter("%(relativeCreated)6d ms %(message)s"))
        _set_levels(ctx, logging.DEBUG, logging.DEBUG)


def _set_levels(ctx: click.Context, library: int, vm: int) -> None:
    """Of everything, and of `hotlun.vm`, whose news is worth a line: it builds and boots."""
    for name, level in (("hotlun", library), ("hotlun.vm", vm)):
        logger = logging.getLogger(name)
        ctx.find_root().call_on_close(lambda it=logger, was=logger.level: it.setLevel(was))
        logger.setLevel(level)
