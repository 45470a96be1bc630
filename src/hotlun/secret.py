"""A key that can be carried everywhere and is read nowhere by accident.

Configs are printed, logged, compared, put into errors and copied; so what must not
be seen is not text there, but a value that shows itself only when asked to.
"""

from __future__ import annotations

import hmac
from typing import Any, NoReturn, Self, final

_LONGEST = 4096
"""Bytes; a passphrase or a key, not a file. cryptsetup reads keyfiles of up to 8 MiB."""


@final
class Secret:
    """Bytes that no `repr`, `str`, pickle or error shows; `reveal()` does.

    Equal secrets are told in a time that does not depend on where they differ.

    Args:
        value: 1 to 4096 bytes; a string stands for its UTF-8.

    Raises:
        ValueError: it is empty, too long, or a string that UTF-8 cannot hold.
        TypeError: it is neither bytes nor a string.
    """

    __slots__ = ("_value",)
    _value: bytes

    def __init__(self, value: bytes | str) -> None:
        if not isinstance(value, (bytes, str)):
            raise TypeError(f"a secret is bytes or str, not {type(value).__name__}")
        data = _utf8(value) if isinstance(value, str) else bytes(value)
        if data is None:
            raise ValueError("a secret's text cannot be written as UTF-8: give its bytes")
        if not 1 <= len(data) <= _LONGEST:
            raise ValueError(f"a secret is 1 to {_LONGEST} bytes long")
        object.__setattr__(self, "_value", data)

    def reveal(self) -> bytes:
        """The bytes themselves, for whoever has to use them."""
        return self._value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __repr__(self) -> str:
        return "Secret(...)"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a secret does not change: make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a secret does not change: make another one")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # so that dataclasses.asdict holds a Secret, too

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not pickled: whoever reads the pickle would have it")


def _utf8(text: str) -> bytes | None:
    """None if that cannot be: the codec's own error keeps the text."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None
