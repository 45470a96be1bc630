"""One input of the fuzz: what a host writes on one link, and what the guest's kernel then does.

It is made from a seed and its index alone, so that it can be made again.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING, NamedTuple

from fuzz import mutation
from fuzz.grammar import conversation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fuzz.grammar import Profile

_ERRNOS = (
    *(errno.EIO, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM),
    *(errno.EBUSY, errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EINVAL),
    *(errno.ENXIO, errno.ENODEV, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.ENOSYS),
)
_STEPS = (5, 20, 60, 200)


class Input(NamedTuple):
    """The bytes as they are written, and the rest of the circumstances."""

    number: int
    writes: tuple[bytes, ...]
    drops: bool
    """The host hangs up without waiting for answers."""
    by_socket: bool
    """It comes by a real socket, not by a list."""
    faults: Mapping[int, int]
    """The guest's system calls that fail, by their number, and how."""
    luck: int
    """For what the guest decides by itself."""

    @property
    def data(self) -> bytes:
        return b"".join(self.writes)


def make(seed: int, index: int, profile: Profile) -> Input:
    """The input of this index."""
    choose = random.Random(f"{seed}:{index}")
    talk = conversation(choose, profile)
    style = choose.random()
    if 0.25 <= style < 0.65 or style >= 0.95:
        mutation.mutate_document(choose, choose.choice(talk))
    if 0.65 <= style < 0.77 or style >= 0.95:
        mutation.mutate_frame(choose, choose.choice(talk))
    if 0.77 <= style < 0.85 or style >= 0.97:
        talk = mutation.mutate_order(choose, talk)
    parts = [mutation.encoded(message) for message in talk]
    data = b"".join(parts)
    if 0.85 <= style < 0.95 or style >= 0.98:
        if choose.random() < 0.6:  # all but the greeting, as otherwise nothing is served
            data = parts[0] + mutation.mutate_bytes(choose, data[len(parts[0]) :])
        else:
            data = mutation.mutate_bytes(choose, data)
    faults: dict[int, int] = {}
    if choose.random() < 0.3:
        number, within = choose.choice((1, 1, 1, 2, 3)), choose.choice(_STEPS)
        faults = {choose.randrange(within): choose.choice(_ERRNOS) for _ in range(number)}
    return Input(
        index,
        mutation.split(choose, data),
        drops=choose.random() < 0.06,
        by_socket=choose.random() < 0.03,
        faults=faults,
        luck=choose.getrandbits(32),
    )
