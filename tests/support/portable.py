"""Which modules are for Windows too: all but those that pyproject.toml calls posix-only.

Run as a program, mypy's arguments for them.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

_ROOT = Path(__file__).parent.parent.parent


def posix_only() -> tuple[str, ...]:
    """What never runs on Windows, by its name below hotlun."""
    told = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return tuple(told["tool"]["hotlun"]["posix-only"])


def portable_modules() -> list[str]:
    """The full names of all others."""
    left_out = posix_only()
    found = []
    for path in sorted((_ROOT / "src" / "hotlun").rglob("*.py")):
        parts = path.relative_to(_ROOT / "src" / "hotlun").with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if not any(name == out or name.startswith(f"{out}.") for out in left_out):
            found.append(f"hotlun.{name}".rstrip("."))
    return found


if __name__ == "__main__":
    for module in portable_modules():
        print("-m", module, sep="\n")  # noqa: T201 - a program's output
