"""What the Host Compute Service answers: HRESULTs with a document, and lists of disks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

from hotlun.bridge.codes import signed
from hotlun.hcs.results import failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotlun import Slot

INVALID_JSON, STOPPED = 0x8037010D, 0x80370110
CONNECT_FAILED, CONNECTION_CLOSED, SERVICE_DISCONNECT = 0x80370108, 0x8037010A, 0x8037011E
NO_FILE, NO_ACCESS, SHARING = 0x80070002, 0x80070005, 0x80070020
EXISTS, NOT_FOUND, CORRUPT, FAIL = 0x800700B7, 0x80070490, 0x80070570, 0x80004005


def refuse(code: int, words: str = "") -> NoReturn:
    """Answer as the library does: with a code, and a document of the error."""
    document = {"Error": signed(code), **({"ErrorMessage": words} if words else {})}
    raise failure(code, compact(document))


def listing(paths: Mapping[Slot, str]) -> dict[str, Any]:
    controllers: dict[str, Any] = {}
    for slot, path in sorted(paths.items()):
        disks = controllers.setdefault(str(slot.controller), {"MappedVirtualDisks": {}})
        entry = {"HostPath": path, "Lun": slot.lun, "AttachOnly": True}
        disks["MappedVirtualDisks"][str(slot.lun)] = entry
    return controllers


def compact(document: Mapping[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)
