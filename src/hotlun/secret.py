"""A key that can be carried everywhere and is read nowhere by accident.

Configs are printed, logged, compared, put into errors and copied; so what must not
be seen is not text there, but a value that shows itself only when asked to.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, NamedTuple, NoReturn, Self, final

_LONGEST = 4096
"""Bytes; a passphrase or a key, not a file. cryptsetup reads keyfiles of up to 8 MiB."""

_SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}
"""16 MiB and some 40 ms a guess (RFC 7914): a journal is no easier to guess from than the
volume's own header."""


class Seal(NamedTuple):
    """What may be written down of a secret: enough to know it again, not to use it."""

    salt: bytes
    digest: bytes


@final
class Secret:
    """Bytes that no `repr`, `str`, pickle or error shows; `reveal()` does.

    Equal secrets are told in a time that does not depend on where they differ.

    One made by `sealed` stands for a secret of an earlier process: it equals that secret,
    and cannot be revealed.

    Args:
        value: 1 to 4096 bytes; a string stands for its UTF-8.

    Raises:
        ValueError: it is empty, too long, or a string that UTF-8 cannot hold.
        TypeError: it is neither bytes nor a string.
    """

    __slots__ = ("_seals", "_value")
    _value: bytes
    """Empty if it is not known."""
    _seals: dict[bytes, bytes]
    """Salt -> digest, as far as they have been worked out."""

    def __init__(self, value: bytes | str) -> None:
        if not isinstance(value, (bytes, str)):
            raise TypeError(f"a secret is bytes or str, not {type(value).__name__}")
        data = _utf8(value) if isinstance(value, str) else bytes(value)
        if data is None:
            raise ValueError("a secret's text cannot be written as UTF-8: give its bytes")
        if not 1 <= len(data) <= _LONGEST:
            raise ValueError(f"a secret is 1 to {_LONGEST} bytes long")
        object.__setattr__(self, "_value", data)
        object.__setattr__(self, "_seals", {})

    @classmethod
    def sealed(cls, seal: Seal) -> Self:
        """The secret that had this seal."""
        secret = cls.__new__(cls)
        object.__setattr__(secret, "_value", b"")
        object.__setattr__(secret, "_seals", {seal.salt: seal.digest})
        return secret

    @property
    def is_sealed(self) -> bool:
        """Whether it is only known again, and cannot be revealed."""
        return not self._value

    @property
    def salt(self) -> bytes | None:
        """What it was sealed with; None if it is not sealed."""
        return next(iter(self._seals)) if self.is_sealed else None

    def reveal(self) -> bytes:
        """The bytes themselves, for whoever has to use them.

        Raises:
            ValueError: it is sealed.
        """
        if not self._value:
            raise ValueError("only the seal of this secret is known: give the secret itself again")
        return self._value

    def has_seal(self, salt: bytes) -> bool:
        """Whether `seal` answers at once."""
        return self.is_sealed or salt in self._seals

    def seal(self, salt: bytes) -> Seal:
        """What may be written down of it. The first time takes some 40 ms: not for a loop.

        One that is sealed has a seal already, whatever the salt.
        """
        if not self._value:
            salt = next(iter(self._seals))
        elif salt not in self._seals:
            self._seals[salt] = hashlib.scrypt(self._value, salt=salt, **_SCRYPT)
        return Seal(salt, self._seals[salt])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        if self._value and other._value:
            return hmac.compare_digest(self._value, other._value)
        sealed, known = (self, other) if self.is_sealed else (other, self)
        seal = sealed.seal(b"")
        told = known.seal(seal.salt)
        return told.salt == seal.salt and hmac.compare_digest(told.digest, seal.digest)

    def __hash__(self) -> int:
        return hash(Secret)  # one and its seal are equal

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
