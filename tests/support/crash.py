"""A process that ends between two changes of access control lists, as if it were killed there."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class Crash(BaseException):
    """Nobody catches this, as nobody survives being killed."""


_left: int | None = None
_is_hooked = False


def _before(event: str, _arguments: tuple[object, ...]) -> None:
    global _left
    if event == "os.setxattr" and _left is not None:
        if not _left:
            raise Crash
        _left -= 1


@contextmanager
def crash_before_write(number: int) -> Iterator[None]:
    """In the block, the `number`th write of a list (from 0) is not made: `Crash` comes instead."""
    global _left, _is_hooked
    if not _is_hooked:  # one cannot be taken away again
        sys.addaudithook(_before)
        _is_hooked = True
    _left = number
    try:
        yield
    finally:
        _left = None
