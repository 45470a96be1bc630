"""The agent's own code, imported once more, with a guest's modules in place of this machine's.

What it imports it gets from here: a module of the guest, another of the agent's, or one
of the few that touch nothing. So there is no way from it to this machine.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fuzz.guest.errors import StrayError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fuzz.guest.machine import Guest

_AGENT = "hotlun.agent"
_HARMLESS = frozenset(
    (
        *("__future__", "base64", "binascii", "collections", "contextlib", "enum", "errno"),
        *("functools", "hashlib", "json", "logging", "mmap", "queue", "re", "signal"),
        *("stat", "string", "struct", "typing", "itertools", "hmac"),
    )
)
_REAL_THREADS = frozenset(f"{_AGENT}.{name}" for name in ("lanes", "server", "places", "threads"))
"""What has threads to serve with; the others start some to wait with."""


class Agent:
    """The agent's modules in the guest, each by its name: `agent["server"].Server`."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._modules: dict[str, ModuleType] = {}

    def __getitem__(self, name: str) -> Any:
        return self._load(f"{_AGENT}.{name}")

    def _load(self, name: str) -> ModuleType:
        if name in self._modules:
            return self._modules[name]
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.loader is not None, name
        module = ModuleType(name)
        self._modules[name] = module
        module.__dict__["__builtins__"] = {
            **vars(builtins),
            "__import__": self._import,
            "open": self._guest.open,
        }
        code = spec.loader.get_code(name)  # type: ignore[attr-defined]
        exec(code, module.__dict__)
        return module

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - as __import__ has it
        locals: object = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        importer = str((globals or {}).get("__name__"))
        if name == "threading":
            return __import__(name) if importer in _REAL_THREADS else self._guest.threads
        if name in self._guest.modules:
            return self._guest.modules[name]
        if name == _AGENT:
            package = ModuleType(name)
            for part in fromlist or ():
                setattr(package, part, self._load(f"{name}.{part}"))
            return package
        if name.startswith(f"{_AGENT}."):
            return self._load(name)
        if name.startswith("hotlun.bridge") or name in _HARMLESS:
            return importlib.import_module(name)
        raise StrayError(f"a module {name}, which {importer} imports")
