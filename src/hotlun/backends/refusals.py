"""The one table that turns QEMU's refusals into ours.

Almost every error of QEMU is of class `GenericError` and tells itself only in
words (QEMU 7.2), so the words are what is looked up. The first pattern that is
found decides. Words that no row knows are passed on as they are.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import NamedTuple


class Meaning(Enum):
    """What a refusal means for what is to be done next."""

    SLOT_TAKEN = auto()
    DEVICE_ABSENT = auto()
    NODE_ABSENT = auto()
    NODE_IN_USE = auto()
    BEING_UNPLUGGED = auto()
    REFUSED = auto()
    """For a person to settle."""


class Refusal(NamedTuple):
    """A refusal understood: what it means, and what happened and should be done, in words."""

    meaning: Meaning
    words: str


_TABLE: tuple[tuple[str, Meaning, str], ...] = (
    (
        r"^lun already used by",
        Meaning.SLOT_TAKEN,
        "another device of the VM is there; reserve this slot and use another",
    ),
    (
        r"^Device '.*' not found",
        Meaning.DEVICE_ABSENT,
        "the VM has no such device; it has been removed already",
    ),
    (
        r"^Failed to find node with node-name",
        Meaning.NODE_ABSENT,
        "the VM has no such block node; it has been removed already",
    ),
    (
        r"^(Node|Block device) .* is (in use|busy)|is in use by",
        Meaning.NODE_IN_USE,
        "the VM is still using the disk; end the block job or export on it, then try again",
    ),
    (
        r"already in the process of unplug",
        Meaning.BEING_UNPLUGGED,
        "the device is on its way out; wait for it",
    ),
    (
        r'Failed to get (shared )?".*" lock|Permission conflict on node',
        Meaning.REFUSED,
        "another user has the disk open; end that use, or attach it read-only on both sides",
    ),
    (
        r"Could not open .*No such (file or directory|device)",
        Meaning.REFUSED,
        "the hypervisor finds no such file; give a path that exists where QEMU runs",
    ),
    (
        r"Could not open .*(Permission denied|Operation not permitted)",
        Meaning.REFUSED,
        "the VM's user may not open the disk; give that user as vm_id, or attach it read-only",
    ),
    (
        r"needs to be replayed",
        Meaning.REFUSED,
        "its log must be replayed first; attach it writable once, or run qemu-img check -r all",
    ),
    (
        r"[Rr]ead-only|not writable|without write permission",
        Meaning.REFUSED,
        "it cannot be written; attach it read-only",
    ),
    (
        r"Could not open .*Is a directory|driver requires '.*' to be",
        Meaning.REFUSED,
        "it is of another kind; attach a file as a virtual disk, a block device as a physical one",
    ),
    (
        (
            r"Could not (open|read) .*(Invalid argument|Input/output error)"
            r"|not in qcow2 format|invalid VPC image|VHDX|qcow2: |too (large|small|short)"
        ),
        Meaning.REFUSED,
        "it is no intact image of the stated format; state the format it has, or repair it",
    ),
    (
        r"Requested export not available|[Ee]xport '.*' not",
        Meaning.REFUSED,
        "the server has no such export; give the name of one that it has",
    ),
    (
        r"Failed to (connect|read|send)|[Cc]onnection |address resolution failed|magic|end-of-file",
        Meaning.REFUSED,
        "its server cannot be reached or speaks something else; start it, or correct the address",
    ),
    (
        r"^Bus '.*' not found|does not support hotplugging",
        Meaning.REFUSED,
        "the controller cannot take a disk; connect with the controllers that the VM has",
    ),
    (
        r"is not a valid device model name|Parameter 'driver' does not accept|Unknown driver",
        Meaning.REFUSED,
        "this QEMU lacks a module that is needed; install its block and device modules",
    ),
    (
        r"Too many open files|Cannot allocate memory",
        Meaning.REFUSED,
        "QEMU is short of a resource; raise its limits",
    ),
)
_COMPILED = tuple(
    (re.compile(pattern), Refusal(meaning, words)) for pattern, meaning, words in _TABLE
)


def understand(words: str) -> Refusal:
    """What a refusal of QEMU's means, from its own words."""
    for pattern, refusal in _COMPILED:
        if pattern.search(words):
            return refusal
    return Refusal(Meaning.REFUSED, f"QEMU refuses: {words}")
