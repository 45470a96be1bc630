"""The guest's agent as a process: killed, and there again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.guest_shell import shell

if TYPE_CHECKING:
    from hotlun.vm import Machine

AGENT = "python3 .*/agent.pyz .*"
"""Its command line, as `pgrep -xf` takes it."""

_KILL = f"""
old=$(pgrep -oxf '{AGENT}')
for port in /proc/$old/fd/*; do
    port=$(readlink $port || :)
    case $port in /dev/vport*) break ;; esac
done
kill -9 $old
while [ -e /proc/$old ]; do sleep 0.02; done
until [ -n "$new" ]; do
    sleep 0.05
    for new in $(pgrep -xf '{AGENT}') ''; do
        [ -n "$new" ] && readlink /proc/$new/fd/* | grep -qx "$port" && break
    done
done
echo $old $new
"""
"""The new one has opened the port: what is sent there from now on, it reads."""


async def agent_pid(vm: Machine) -> int:
    """In the guest."""
    return int(await shell(vm, f"pgrep -xf '{AGENT}'"))


async def kill_agent(vm: Machine) -> int:
    """As a crash would; returns when a new one serves: its pid.

    The port is without one for two seconds (TCG): half a second that init lets pass
    before it starts a daemon again, the rest is Python and the agent's modules.
    """
    old, new = (await shell(vm, _KILL)).split()
    assert old != new
    return int(new)
