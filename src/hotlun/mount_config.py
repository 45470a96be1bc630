"""How a disk is to be mounted inside the guest: a value that cannot contradict itself."""

from __future__ import annotations

import re
from collections.abc import Sequence  # noqa: TC003 - dataclass fields are read at run time
from dataclasses import dataclass, field, fields

from hotlun.secret import Secret

PROPAGATIONS = frozenset(
    prefix + word for word in ("private", "shared", "slave", "unbindable") for prefix in ("", "r")
)
"""The options that say how mounts below spread between namespaces, not how this one is."""
_OPPOSITES = (("ro", "rw"), ("sync", "async"), ("loud", "silent"))
_FILESYSTEM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ROOT_HASH = re.compile(r"(?:[0-9a-f]{2}){16,64}")
_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Verity:
    """What dm-verity checks every block of a read-only disk against.

    Args:
        root_hash: of the tree, 32 to 128 hexadecimal digits; kept in lower case.
        hash_offset: where on the disk or partition the tree begins, in bytes;
            0 is right behind the filesystem.

    Raises:
        ValueError: no tree has such a root or can begin there.
    """

    root_hash: str
    hash_offset: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "root_hash", self.root_hash.lower())
        if not _ROOT_HASH.fullmatch(self.root_hash):
            raise ValueError(
                f"a root hash is 32 to 128 hexadecimal digits, an even number: {self.root_hash!r}"
            )
        if not 0 <= self.hash_offset < 1 << 63 or self.hash_offset % _SECTOR:
            raise ValueError(
                f"hash_offset is in bytes, whole sectors of {_SECTOR}: {self.hash_offset}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig:
    """How (a partition of) a disk is mounted inside the guest.

    Two configs are equal when they would produce the same mount: order and
    repeats of `options` make no difference there, and are kept for the wire.

    Args:
        partition: which one, from 1; 0 is the whole disk.
        encrypted: with `key`, under that one; else under a random key that is thrown
            away on unmount.
        options: mount options, one an item (`"noatime"`, `"data=ordered"`, `"rshared"`).
        ensure_filesystem: format if there is no `filesystem` on it yet.
        filesystem: its type, or `""` to mount what is there.
        block_device: no mount; the guest path becomes a symlink to the device.
        preserve_data: never format over anything recognisable.
        key: opens the encrypted volume that is there; one is made only under
            `ensure_filesystem`, on a blank disk.
        verity: what the content of a read-only disk is checked against, so that
            reading what was changed fails; a string is a root hash. Kept as a `Verity`.
        lazy_unmount: on unmount, take it off its path even while it is in use.
        container_scratch: a confidential Windows guest formats the disk with ReFS, as it
            does for a container's scratch space, and mounts it; nothing else is said with it.

    Raises:
        ValueError: the parts contradict each other.
        TypeError: `options` is a single string, or holds something else than strings;
            `key` is no `Secret`; `verity` neither a `Verity` nor a string.
    """

    partition: int = 0
    encrypted: bool = False
    options: Sequence[str] = field(default=(), compare=False)
    ensure_filesystem: bool = False
    filesystem: str = ""
    block_device: bool = False
    preserve_data: bool = False
    key: Secret | None = None
    verity: Verity | str | None = None
    lazy_unmount: bool = False
    container_scratch: bool = False
    _option_set: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        if self.options != ():
            options = _checked_options(self.options)
            object.__setattr__(self, "options", options)
            object.__setattr__(self, "_option_set", frozenset(options))
        if self.key is not None and not isinstance(self.key, Secret):
            raise TypeError(f"key is a Secret, not {type(self.key).__name__}: wrap it in one")
        if isinstance(self.verity, str):
            object.__setattr__(self, "verity", Verity(self.verity))
        elif self.verity is not None and not isinstance(self.verity, Verity):
            raise TypeError(f"verity is a Verity or a root hash: {self.verity!r}")
        if self.partition < 0:
            raise ValueError(
                f"partitions are counted from 1, 0 is the whole disk: {self.partition}"
            )
        if self.filesystem and not _FILESYSTEM_NAME.fullmatch(self.filesystem):
            raise ValueError(f"no filesystem has this name: {self.filesystem!r}")
        problem = _contradiction(self)
        if problem:
            raise ValueError(problem)

    def __hash__(self) -> int:
        """Of what mostly differs: a config is looked for more often than two are alike."""
        return hash((self.filesystem, self.partition, self._option_set))

    @property
    def exclusive_use(self) -> str:
        """What it does to its sectors that no other mount of them can live beside.

        A verb and its company for a person, `""` for a mount that shares.
        """
        if self.ensure_filesystem or self.container_scratch:
            return "may format"
        if self.encrypted:
            return "decrypts"
        return "" if self.verity is None else "verifies"

    def overlaps(self, other: MountConfig) -> bool:
        """Whether both speak of some of the same sectors."""
        return not self.partition or not other.partition or self.partition == other.partition


def _contradiction(config: MountConfig) -> str:
    """The first of its parts' contradictions, and what to do about it; "" if there is none."""
    if config.block_device and (
        config.filesystem
        or config.options
        or config.ensure_filesystem
        or config.encrypted
        or config.preserve_data
        or config.lazy_unmount
    ):
        return (
            "block_device gives the bare device: it goes with no filesystem, options, "
            "ensure_filesystem, encrypted, preserve_data or lazy_unmount"
        )
    if config.container_scratch:
        others = [
            one.name
            for one in fields(config)
            if one.init and one.name != "container_scratch" and getattr(config, one.name)
        ]
        if others:
            return f"container_scratch leaves all to the guest: it goes with no {', '.join(others)}"
    if config.ensure_filesystem and not config.filesystem:
        return "ensure_filesystem needs to know which: give filesystem"
    if config.preserve_data and not config.ensure_filesystem:
        return "preserve_data guards a format: it goes with ensure_filesystem"
    if config.key is not None and not config.encrypted:
        return "key opens an encrypted volume: it goes with encrypted"
    if config.encrypted and config.key is None and not config.ensure_filesystem:
        return (
            "encrypted without a key throws its own away, so there is never a filesystem "
            "to find: it needs ensure_filesystem, or the key of a volume that is there"
        )
    if config.verity is not None and (config.ensure_filesystem or config.encrypted):
        return (
            "verity checks what nobody writes: it goes with no ensure_filesystem, "
            "preserve_data or encrypted"
        )
    return ""


def _checked_options(options: Sequence[str]) -> tuple[str, ...]:
    if isinstance(options, (str, bytes)):
        raise TypeError("options is a sequence of strings, one option an item")
    options = tuple(options)
    values: dict[str, str] = {}
    propagation = ""
    for option in options:
        if not isinstance(option, str):
            raise TypeError(f"a mount option is a string: {option!r}")
        if not option or "\0" in option or ("," in option and '"' not in option):
            raise ValueError(f"one mount option an item, not empty, no comma, no NUL: {option!r}")
        key, _, value = option.partition("=")
        if values.setdefault(key, value) != value:
            raise ValueError(f"the mount option {key} is given two values")
        if option in PROPAGATIONS:
            if propagation not in ("", option):
                raise ValueError(f"two propagations: {propagation} and {option}")
            propagation = option
    for option in options:
        if f"no{option}" in values:
            raise ValueError(f"mount options contradict each other: {option} and no{option}")
    for one, other in _OPPOSITES:
        if one in values and other in values:
            raise ValueError(f"mount options contradict each other: {one} and {other}")
    return options
