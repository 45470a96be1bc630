"""Paths of the host's: where a disk is to be found after it, or its VM, has moved."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_SPELLINGS = (os.path.normpath, os.path.realpath)


def moved(path: str, paths: Mapping[str, str]) -> str:
    """Where a path is to be found now.

    Args:
        path: as it was, canonical.
        paths: from what was, to what is: the path itself, or a folder that it lies below.
            Of several that fit, the longest counts.
    """
    # Both spellings: disks are known by paths with their links resolved.
    known = {spelt(old): new for old, new in paths.items() for spelt in _SPELLINGS}
    above = path
    while above not in known:
        if above == os.path.dirname(above):
            return path
        above = os.path.dirname(above)
    rest = os.path.relpath(path, above)
    return known[above] if rest == "." else os.path.join(known[above], rest)
