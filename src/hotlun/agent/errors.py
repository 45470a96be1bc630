"""What the agent answers when it does not do what was asked: a code and words."""

from __future__ import annotations

import os

from hotlun.bridge.codes import HResult


class RequestError(Exception):
    """The request was refused or failed, and left nothing behind.

    Args:
        message: what happened, to which device or path.
        code: the result for the host; the words tell more, as nearly every
            failure of the original agent is the general one too.
    """

    def __init__(self, message: str, code: HResult = HResult.FAIL) -> None:
        super().__init__(message)
        self.code = code


class AbandonedError(RequestError):
    """The connection that the request came by is gone: nobody waits for it any more."""


def words(error: OSError) -> str:
    """The errno in words, without the path that Python adds."""
    if error.errno is None:
        return str(error)
    return os.strerror(error.errno)
