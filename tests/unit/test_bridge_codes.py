"""Result codes: how they are written, and their names."""

from __future__ import annotations

import pytest

from hotlun.bridge.codes import HResult, code_name, is_failure, signed
from hotlun.bridge.responses import Response


@pytest.mark.parametrize(
    ("decimal", "code"),
    [
        (-2147467263, HResult.NOT_IMPLEMENTED),
        (-2147467259, HResult.FAIL),
        (-2147023728, HResult.NOT_FOUND),
        (-2147024809, HResult.INVALID_ARGUMENT),
        (-1070137079, HResult.TIMEOUT),
        (-1070137077, HResult.UNKNOWN_MESSAGE),
        (-1070137076, HResult.UNSUPPORTED_PROTOCOL_VERSION),
        (-1070137075, HResult.INVALID_JSON),
        (-1070137074, HResult.SYSTEM_NOT_FOUND),
        (-1070137073, HResult.SYSTEM_ALREADY_EXISTS),
        (-1070137072, HResult.SYSTEM_ALREADY_STOPPED),
        (-2143878907, HResult.INVALID_STATE),
        (-2144272345, HResult.WRONG_KEY),
    ],
)
def test_codes_are_signed_on_the_wire_and_unsigned_here(decimal: int, code: HResult) -> None:
    """Both ways of writing a result are the same code, and a failure."""
    assert signed(code) == decimal
    for written in (decimal, int(code)):
        assert Response.read(b'{"Result":%d}' % written).code == code
    assert is_failure(code)
    assert code_name(code) == f"{int(code):#010x} ({code.name})"


def test_code_without_a_name() -> None:
    """An unknown code is still a code."""
    assert code_name(0x80040001) == "0x80040001"
    assert not is_failure(0)
    assert not is_failure(1)
