"""Calls that block, each in a thread of its own that sees it through.

A call that is inside computecore.dll cannot be taken back, and a handle that is closed under it
ends the process (so hcsshim found out). So who waits may be cancelled or run out of time, and the
thread goes on, and frees what came. How it ended is there for whoever kept the
`StillRunningError`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, cast

from hotlun.errors import BackendError
from hotlun.hcs.computecore import CallError
from hotlun.hcs.results import failure
from hotlun.hcs.system import StillRunningError

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")
_log = logging.getLogger("hotlun.hcs")


def _nothing(*_: object) -> None:
    """Is to be done."""


async def in_thread(
    name: str,
    timeout: float,
    function: Callable[[], _T],
    *,
    after: Callable[[], None] = _nothing,
    discard: Callable[[_T], None] = _nothing,
) -> _T:
    """Run a function in a thread, and wait for it as long as that is allowed.

    Args:
        name: of the call, for logs and errors.
        timeout: seconds.
        function: what blocks.
        after: is called once, behind it in the thread, or here if there is none to be had.
        discard: is given a result that came too late for the caller; in a thread, or here as well.

    Raises:
        StillRunningError: the time is over.
        BackendError, OutcomeUnknownError: the call failed; in the service's words.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_Outcome[_T]] = loop.create_future()

    def run() -> None:
        outcome = _outcome_of(function)
        after()
        try:
            loop.call_soon_threadsafe(ended.set_result, outcome)
        except RuntimeError:  # the loop is closed: nobody waits any more
            _log.debug("%s has ended after the event loop", name)
            if outcome.error is None:
                discard(cast("_T", outcome.result))

    def give_up() -> asyncio.Future[Exception | None]:
        late: asyncio.Future[Exception | None] = loop.create_future()

        def settle(done: asyncio.Future[_Outcome[_T]]) -> None:
            outcome = done.result()
            _log.info("%s has ended late: %s", name, outcome.error or "done")
            if outcome.error is None and discard is not _nothing:
                throw_away = partial(discard, cast("_T", outcome.result))
                try:
                    _start(name, throw_away)
                except RuntimeError:  # there is none to be had
                    throw_away()
            if not late.done():
                late.set_result(outcome.error)

        ended.add_done_callback(settle)
        return late

    try:
        _start(name, run)
    except RuntimeError as error:
        after()
        raise BackendError(
            f"there is no thread to be had for it ({error}); end some, or raise the limit"
        ) from error
    try:
        await asyncio.wait((ended,), timeout=timeout)
    except asyncio.CancelledError:
        give_up()
        raise
    if not ended.done():
        raise StillRunningError(
            f"no answer within {timeout:g} s; it goes on, and may or may not be done: see whether "
            "the VM hangs, then undo or retry",
            give_up(),
        )
    outcome = ended.result()
    if outcome.error is not None:
        raise outcome.error
    return cast("_T", outcome.result)


class _Outcome(NamedTuple, Generic[_T]):
    """What a call has come to."""

    result: _T | None
    error: Exception | None


def _outcome_of(function: Callable[[], _T]) -> _Outcome[_T]:
    try:
        return _Outcome(function(), None)
    except CallError as error:
        translated = failure(error.code, error.document)
        translated.__cause__ = error
        return _Outcome(None, translated)
    except Exception as error:  # for whoever waits, not for the thread
        return _Outcome(None, error)


def _start(name: str, function: Callable[[], None]) -> None:
    # A daemon: a call that Windows never ends does not keep the process.
    threading.Thread(target=function, name=f"hotlun {name}", daemon=True).start()
