"""Giving a VM a block node, and a device that shows it to the guest: all of it or nothing.

Both commands are sent at once: QEMU carries them out one after the other, and the second
costs no round trip. Where the node is refused the device is, too, as there is nothing for
it to show. That refusal takes QEMU about 60 ms (7.2: `drain_call_rcu` after a failed
`device_add`), which only an attach that fails anyway has to bear.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hotlun.backends.removal import remove_node
from hotlun.errors import HotlunError, OutcomeUnknownError, VMGoneError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotlun.backends.errand import Errand
    from hotlun.backends.monitor import Monitor


async def add_device(
    monitor: Monitor,
    errand: Errand,
    name: str,
    node: Mapping[str, object],
    device: Mapping[str, object],
) -> None:
    """Add the node of this name and the device on it; the node goes again if the device fails.

    Raises:
        SlotTakenError: another device of the VM is at this slot.
        BackendError: it cannot be done, and nothing is left of it.
        OutcomeUnknownError: it may have been done, all or in part.
    """
    link = await monitor.link(errand)
    refused_node, refused_device = await asyncio.gather(  # begun in this order, and so sent
        link.command(errand, "blockdev-add", node),
        link.command(errand, "device_add", device),
        return_exceptions=True,
    )
    if isinstance(refused_node, BaseException):
        raise _of_both(errand, refused_node, refused_device)
    if isinstance(refused_device, BaseException):
        if _is_refusal(refused_device):
            await _undo_node(monitor, errand, name)
        raise refused_device


def _is_refusal(error: BaseException) -> bool:
    return isinstance(error, HotlunError) and not isinstance(error, OutcomeUnknownError)


def _of_both(errand: Errand, node: BaseException, device: BaseException | object) -> BaseException:
    """What the failure of the node comes to: it may be refused, and the device be there."""
    if not isinstance(node, HotlunError) or not _is_refusal(node):
        return node
    if isinstance(device, BaseException):
        if not _is_refusal(device):
            device.__cause__ = node
            return device
        return node
    unknown = errand.error(
        OutcomeUnknownError,
        "the VM had its block node already, and now has a device on that; detach it",
        code=node.code,
        detail=node.detail,
    )
    unknown.__cause__ = node
    return unknown


async def _undo_node(monitor: Monitor, errand: Errand, name: str) -> None:
    try:
        is_gone = await remove_node(monitor, errand, name)
    except VMGoneError:
        raise
    except HotlunError as error:
        raise errand.error(
            OutcomeUnknownError,
            "the device was refused, and its block node could not be removed again; detach it",
            code=error.code,
            detail=error.detail,
        ) from error
    if not is_gone:
        raise errand.error(
            OutcomeUnknownError,
            "the device was refused, and its block node is still in use; detach it",
        )
