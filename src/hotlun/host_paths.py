"""Paths of the host's: where a disk is to be found after it, or its VM, has moved."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def moved(path: str, paths: Mapping[str, str]) -> str:
    """Where a path is to be found now.

    Args:
        path: as it was.
        paths: from what was, to what is: the path itself, or a folder that it lies below.
            Of several that fit, the longest counts.
    """
    fitting = [old for old in paths if path == old or path.startswith(os.path.join(old, ""))]
    if not fitting:
        return path
    old = max(fitting, key=len)
    return paths[old] + path[len(old) :] if path != old else paths[old]
