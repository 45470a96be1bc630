"""What becomes of a good conversation: wrong members, wrong bytes, wrong order, wrong times.

Documents are changed before they are written down, so that what was not touched
stays good, and bytes and frames after that.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any

from fuzz.grammar import ACTIVITY, Embedded, Message
from hotlun.bridge.frames import DEFAULT_LIMIT, HEADER
from hotlun.bridge.messages import MessageType

if TYPE_CHECKING:
    import random
    from collections.abc import Callable


class Raw(str):
    """JSON that is written down as it is."""

    __slots__ = ()


class Pairs(list[tuple[str, Any]]):
    """An object whose members may come twice."""


_CONSTANTS = {None: "null", True: "true", False: "false"}

NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 63, 64, 255, 256, 511, 512, 4095, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 32, (1 << 62) + 512, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63)),
    *(Raw("1e400"), Raw("-0"), Raw("1.0"), Raw("1E2"), Raw("0.1"), Raw("9" * 22), Raw("9" * 5000)),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("01"), Raw("+1"), Raw("0x10")),
)
STRINGS: tuple[Any, ...] = (
    *("", " ", "\0", "a\0b", "\ud800", "\udc80\udcff", "\ud83d\ude00", "\u202e\u2028\x7f\x1b[31m"),
    *(
        "/",
        "//",
        "/.",
        "/..",
        "/run/../etc",
        "/a\n/b",
        "relative",
        "/" + "x" * 255,
        "/" + "x" * 256,
    ),
    *("/" + "y/" * 2047, "/" + "z/" * 2100, "%s%n{}{0}", "\u00e9xt4", "../ext4", "a,b", '\\"', "'"),
    *(Raw('"\\ud800\\u0000"'), Raw('"\\x"'), Raw('"\n"'), Raw("'a'"), Raw('"'), ACTIVITY.upper()),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [None], [[]], {"a": {}}, [1, "x", None], {"": ""}),
    *(Raw(""), Raw("undefined"), Raw("[,]"), Raw("{,}"), Raw('{"a":}'), Raw("}"), Raw("tRue")),
)
_NAMES = ("ContainerId", "Request", "Settings", "MountPath", "Lun", "Key", "Options", "Result", "")

_SIZES = (0, 1, 15, 16, 17, 64, 1 << 16, DEFAULT_LIMIT, DEFAULT_LIMIT + 1, 1 << 31, (1 << 32) - 1)
_KINDS = (
    *(0, 1, 0x10000000, 0x10100A00, 0x10100A02, 0x10200A01, 0x20100A01, 0x30100101, 0x40100A01),
    *(0xFFFFFFFF, 0x80000000, *MessageType),
)
_IDS = (0, 1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def written(value: Any) -> str:
    """JSON, compact."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Embedded):
        return encode_basestring_ascii(written(value.document))
    if isinstance(value, Pairs):
        inner = ",".join(f"{encode_basestring_ascii(name)}:{written(part)}" for name, part in value)
        return f"{{{inner}}}"
    if isinstance(value, dict):
        inner = ",".join(
            f"{encode_basestring_ascii(name)}:{written(part)}" for name, part in value.items()
        )
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    return (
        _CONSTANTS.get(value, "")
        if value is None or value is True or value is False
        else repr(value)
    )


def encoded(message: Message) -> bytes:
    """The frame, its numbers cut to what fits."""
    payload = message.payload
    if payload is None:
        payload = written(message.document).encode("utf-8", "surrogatepass")
    size = HEADER.size + len(payload) if message.size is None else message.size
    return HEADER.pack(message.kind & 0xFFFFFFFF, size, message.id & ((1 << 64) - 1)) + payload


def mutate_document(choose: random.Random, message: Message) -> None:
    """Change a member somewhere; which one, the deeper the likelier."""
    message.document = _changed(choose, message.document)


def _changed(choose: random.Random, value: Any) -> Any:
    if isinstance(value, Embedded) and choose.random() < 0.9:
        return Embedded(_changed(choose, value.document))
    if isinstance(value, list) and value and choose.random() < 0.8:
        index = choose.randrange(len(value))
        return [*value[:index], _changed(choose, value[index]), *value[index + 1 :]]
    if isinstance(value, dict) and value:
        inner = [name for name, part in value.items() if _has_inner(part)]
        if inner and choose.random() < 0.9:
            name = choose.choice(inner)
            return {**value, name: _changed(choose, value[name])}
        return choose.choice(_OF_OBJECTS)(choose, value)
    return _value(choose, value)


def _has_inner(part: Any) -> bool:
    """Whether there are members further down."""
    if isinstance(part, list):
        return any(isinstance(item, dict) and item for item in part)
    return isinstance(part, Embedded) or (isinstance(part, dict) and bool(part))


def _value(choose: random.Random, old: Any) -> Any:
    """Another value, mostly of the same kind."""
    dice = choose.random()
    if dice < 0.1:
        return _nested(choose)
    if dice < 0.6:
        if isinstance(old, bool):
            return not old
        if isinstance(old, int):
            return choose.choice(NUMBERS)
        if isinstance(old, str):
            return _string(choose, old)
        if isinstance(old, list):
            return [*old, choose.choice(STRINGS + OTHERS)]
    return choose.choice((NUMBERS, STRINGS, OTHERS)[choose.randrange(3)])


def _string(choose: random.Random, old: str) -> Any:
    dice = choose.random()
    if dice < 0.6:
        return choose.choice(STRINGS)
    if dice < 0.64:
        return choose.choice(("x", "/y", "\u00e9", "\x01", "\ud801", "%41")) * choose.choice(
            (300, 5000, 70000)
        )
    if dice < 0.8 and old:
        at = choose.randrange(len(old))
        return (
            old[:at] + chr(choose.choice((0, 10, 34, 47, 92, 127, 233, 0xD900, 0x1F600))) + old[at:]
        )
    return choose.choice((old.upper(), old + "/", "/" + old, old[:-1], old * 2, old + "\0"))


def _nested(choose: random.Random) -> Raw:
    depth = choose.choice((2, 27, 30, 32, 33, 40, 1000, 20000))
    opening, closing = choose.choice((("[", "]"), ('{"a":', "}")))
    middle = "1" if opening != "[" else ""
    return Raw(opening * depth + middle + (closing * depth if choose.random() < 0.9 else ""))


def _without(choose: random.Random, old: dict[str, Any]) -> Any:
    gone = choose.choice([*old])
    return {name: value for name, value in old.items() if name != gone}


def _with_another(choose: random.Random, old: dict[str, Any]) -> Any:
    name = choose.choice([*old])
    return {**old, name: _value(choose, old[name])}


def _with_twice(choose: random.Random, old: dict[str, Any]) -> Any:
    """A member twice, in other letters or the same, before or behind."""
    name = choose.choice([*old])
    again = (
        choose.choice((name, name.lower(), name.upper(), name.swapcase())),
        choose.choice((old[name], _value(choose, old[name]))),
    )
    pairs = Pairs(old.items())
    pairs.insert(choose.choice((0, len(pairs))), again)
    return pairs


def _in_other_letters(choose: random.Random, old: dict[str, Any]) -> Any:
    change: Callable[[str], str] = choose.choice((str.lower, str.upper, str.swapcase))
    return {change(name): value for name, value in old.items()}


def _with_more(choose: random.Random, old: dict[str, Any]) -> Any:
    name = choose.choice((*_NAMES, *old, "Unheard", "\ud800", "x" * 1000))
    return {**old, name: choose.choice(NUMBERS + STRINGS + OTHERS)}


def _with_swapped(choose: random.Random, old: dict[str, Any]) -> Any:
    one, other = choose.choice([*old]), choose.choice([*old])
    return {**old, one: old[other], other: old[one]}


_OF_OBJECTS: tuple[Callable[[random.Random, dict[str, Any]], Any], ...] = (
    *(_with_another, _with_another, _with_another, _without, _with_twice, _in_other_letters),
    *(_with_more, _with_swapped, lambda choose, old: _value(choose, old)),
)


def mutate_frame(choose: random.Random, message: Message) -> None:
    """Another type, id or size, or a payload that is none."""
    dice = choose.random()
    if dice < 0.3:
        message.kind = choose.choice(_KINDS)
    elif dice < 0.5:
        message.id = choose.choice((*_IDS, choose.getrandbits(64)))
    elif dice < 0.7:
        message.size = choose.choice(_SIZES)
    else:
        message.payload = choose.choice(
            (b"", b"\0", b"{}", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{" * 999, b'{"a":1}x')
        )


def mutate_bytes(choose: random.Random, data: bytes) -> bytes:
    """Flips, cuts, doubles and insertions, wherever."""
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            break
        at = choose.randrange(len(changed))
        end = min(len(changed), at + choose.choice((1, 1, 2, 4, 16, 64)))
        dice = choose.random()
        if dice < 0.4:
            changed[at] ^= 1 << choose.randrange(8)
        elif dice < 0.55:
            changed[at] = choose.choice(b'\x00\xff\x80"{}[]:,\\/0-')
        elif dice < 0.7:
            del changed[at:end]
        elif dice < 0.8:
            changed[at:at] = changed[at:end]
        elif dice < 0.9:
            changed[at:at] = choose.randbytes(end - at)
        else:
            del changed[at:]
    return bytes(changed)


def mutate_order(choose: random.Random, talk: list[Message]) -> list[Message]:
    """No greeting, or a late one, or two; a request again; all of it the other way round."""
    dice = choose.random()
    if dice < 0.25:
        return talk[1:]
    if dice < 0.45:
        return [talk[0], *talk]
    if dice < 0.6:
        return [*talk[1:], talk[0]]
    if dice < 0.75:
        again = choose.choice(talk)
        return [*talk, *[again] * choose.choice((1, 1, 2, 2, 3, 40))]
    return choose.sample(talk, len(talk))


def split(choose: random.Random, data: bytes) -> tuple[bytes, ...]:
    """As writes: mostly one, else in pieces, down to single bytes."""
    dice = choose.random()
    if dice < 0.6 or len(data) < 2:
        return (data,)
    if dice < 0.62 and len(data) < 800:
        return tuple(data[at : at + 1] for at in range(len(data)))
    cuts = sorted({choose.randrange(1, len(data)) for _ in range(choose.choice((1, 2, 5)))})
    return tuple(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True))
