"""The guest's agent, asked for things and killed meanwhile, as a test on the host sees it."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Self

from support.guest_shell import shell
from support.machine import mount_info

from hotlun.bridge.client import BridgeConnection
from hotlun.errors import OutcomeUnknownError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from support.machine import MountInfo

    from hotlun.bridge.responses import Response
    from hotlun.vm import Machine

TIMEOUT = 60.0
"""Seconds for an agent to be there, and for each answer."""

_INSTALL = """
cd /run/hotlun
mv agent.pyz shipped.pyz
cat >killing.py
mv killing.py agent.pyz
old=$(pgrep -xf 'python3 .*/agent.pyz .*')
kill -9 $old
while [ -e /proc/$old ]; do sleep 0.05; done
"""

_LOOK = r"""
echo /sys/bus/scsi/devices/*:0:0:*
echo /sys/bus/scsi/devices/*:0:0:*/block/*
grep -H . /sys/class/block/*/dm/name
echo =
cat /proc/self/mountinfo
echo =
find /run ! -path '/run/qemu*' ! -path '/run/qga*' -printf '%p %y %m %l\n'
ls -A /dev/mapper
echo =
cat /proc/[0-9]*/cmdline
"""


@dataclass(frozen=True)
class World:
    """All of a guest that an agent's work changes, each device by a name that stays.

    A disk is called by its LUN, and so is a SCSI device, which can be without one; a partition
    by that and its number, a mapped device as the device mapper has it.
    """

    devices: frozenset[str]
    mounts: tuple[MountInfo, ...]
    files: tuple[str, ...]
    programs: tuple[str, ...]

    def at(self, path: str) -> list[str]:
        """What is at a path: the mounts, or where a link leads."""
        links = [file for file in self.files if file.startswith(f"{path} l ")]
        return links or [mount.device for mount in self.mounts if mount.path == path]

    def still(self) -> World:
        """Without the programs that run: those that a killed agent began go on a little."""
        return replace(self, programs=())

    def differs_from(self, other: World) -> str:
        """How, for a person."""
        lines = []
        for name in ("devices", "mounts", "files", "programs"):
            mine, its = getattr(self, name), getattr(other, name)
            lines += [f"+ {one}" for one in mine if one not in its]
            lines += [f"- {one}" for one in its if one not in mine]
        return "\n".join(lines) or "in order, or in number"


class KillableAgent:
    """The agent of a machine that nobody else is connected to.

    Made by `installed`.
    """

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._line = AsyncExitStack()
        self._connection: BridgeConnection | None = None

    @classmethod
    async def installed(cls, vm: Machine) -> Self:
        """Have the agent of this guest be one that can be killed at any step."""
        script = resources.files("support").joinpath("killing_agent.py").read_text()
        await shell(vm, f"{_INSTALL.replace('cat >killing.py', _here(script))}")
        return cls(vm)

    async def close(self) -> None:
        await self._line.aclose()
        self._connection = None

    async def connected(self) -> BridgeConnection:
        """To the agent that there is now."""
        if self._connection is None:
            connection = BridgeConnection.connect_unix(
                self._vm.agent_socket, timeout=TIMEOUT, request_timeout=TIMEOUT
            )
            self._connection = await self._line.enter_async_context(connection)
        return self._connection

    async def ask(self, request: Mapping[str, Any]) -> Response:
        """What it answers."""
        return await (await self.connected()).modify(request)

    async def ask_and_kill(self, request: Mapping[str, Any], step: int) -> Response | None:
        """Have it killed after a step of this request; what it answers if there is none such."""
        connection = await self.connected()
        try:
            return await connection.modify({**request, "KillAfter": step})
        except OutcomeUnknownError:
            assert connection.closed, "it neither answered nor died"
            await self.close()
            return None


async def look(vm: Machine) -> World:
    """Ask the guest, not through the bridge."""
    done = await vm.run(_LOOK)
    devices, mounts, files, programs = done.stdout.split("=\n", 3)
    names = dict(_disks(devices)) | dict(_mapped(devices))

    def named(text: str) -> str:
        return re.sub(
            r"/dev/([a-z]+(?:-\d+)?)(\d*)\b",
            lambda node: f"/dev/{names.get(node[1], node[1])}{node[2]}",
            text,
        )

    return World(
        devices=frozenset([*names.values(), *_scsi_devices(devices)]),
        mounts=tuple(mount_info(named(line)) for line in mounts.splitlines()),
        files=tuple(sorted(map(named, files.splitlines()))),
        programs=tuple(
            sorted(word for word in programs.split("\0") if not word.startswith("/proc/"))
        ),
    )


def steps_of(answer: Response) -> list[str]:
    """Those that it took to give this answer."""
    return list(answer.fields.strings("Steps"))


def _disks(text: str) -> list[tuple[str, str]]:
    found = re.findall(r":0:0:(\d+)/block/(\w+)", text)
    return [(name, f"lun{lun}-") for lun, name in found]


def _scsi_devices(text: str) -> list[str]:
    return [f"device at lun{lun}" for lun in re.findall(r":0:0:(\d+)\s", text)]


def _mapped(text: str) -> list[tuple[str, str]]:
    return re.findall(r"/block/(dm-\d+)/dm/name:(.*)", text)


def _here(script: str) -> str:
    """A shell's command to write a script that does not have this word in a line of its own."""
    return f"cat >killing.py <<'END_OF_SCRIPT'\n{script}\nEND_OF_SCRIPT"
