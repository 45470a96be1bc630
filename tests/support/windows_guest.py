"""What no guest that runs Windows can be asked for."""

from __future__ import annotations

from typing import Any

from hotlun import Secret, Verity

REFUSED: dict[str, dict[str, Any]] = {
    "partition": {"partition": 1},
    "encrypted": {"encrypted": True, "ensure_filesystem": True, "filesystem": "ntfs"},
    "options": {"options": ["ro"]},
    "ensure_filesystem": {"ensure_filesystem": True, "filesystem": "ntfs"},
    "filesystem": {"filesystem": "ntfs"},
    "block_device": {"block_device": True},
    "preserve_data": {"preserve_data": True, "ensure_filesystem": True, "filesystem": "ntfs"},
    "key": {"key": Secret("k"), "encrypted": True},
    "verity": {"verity": Verity("ab" * 32)},
    "lazy_unmount": {"lazy_unmount": True},
}
"""By the field that names it, a config that has it; what else is in there, it needs."""
