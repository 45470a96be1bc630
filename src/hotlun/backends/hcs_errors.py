"""What the service's errors say, in the words of what was asked of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from hotlun.errors import (
    BackendError,
    HotlunError,
    OutcomeUnknownError,
    SlotTakenError,
    VMGoneError,
)
from hotlun.hcs.results import Meaning, understand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun.backends.errand import Errand

_KINDS: dict[Meaning, type[HotlunError]] = {
    Meaning.SLOT_TAKEN: SlotTakenError,
    Meaning.VM_GONE: VMGoneError,
}


@contextmanager
def told_of(errand: Errand, *, fine: Meaning | None = None) -> Iterator[None]:
    """Have the service's errors say what they are about, and mean what they mean there.

    Args:
        errand: what they are about.
        fine: what is no error: there was nothing to undo.
    """
    try:
        yield
    except (BackendError, OutcomeUnknownError) as error:
        if fine is None or meaning_of(error) is not fine:
            raise told_as(errand, error) from error


def told_as(errand: Errand, error: BackendError | OutcomeUnknownError) -> HotlunError:
    """The error for the caller: what was asked, and what the service says."""
    kind: type[HotlunError] = OutcomeUnknownError
    if isinstance(error, VMGoneError):  # found out by asking, and without a code
        kind = VMGoneError
    elif isinstance(error, BackendError):
        kind = _KINDS.get(meaning_of(error), BackendError)
        if kind is SlotTakenError and errand.operation != "attach":
            kind = BackendError
    return errand.error(kind, str(error), code=error.code, detail=error.detail)


def meaning_of(error: BaseException | None) -> Meaning:
    """What an error of the service means; of one without a code, that it refused."""
    code = error.code if isinstance(error, BackendError) else None
    return understand(code).meaning if isinstance(code, int) else Meaning.REFUSED
