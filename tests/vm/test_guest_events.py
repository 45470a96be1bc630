"""The guest's kernel takes the agent's filter for events."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotlun.vm import Machine

HEARER = """
import socket, sys
sys.path.insert(0, "/run/hotlun/agent.pyz")
from hotlun.agent.event_filter import only_block_devices
events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)
only_block_devices(events)
events.bind((0, 1))
events.settimeout(10)
for device in ("mem/null", "bdi/254:0", "block/vda"):
    with open(f"/sys/class/{device}/uevent", "w") as file:
        file.write("change")
print(events.recv(4096).partition(b"\\0")[0].decode())
"""


async def test_the_first_that_is_heard_is_a_block_device(bare_vm: Machine) -> None:
    """Not the two that the kernel told of before: they never came."""
    done = await bare_vm.run(f"python3 -I - <<'END'\n{HEARER}\nEND\n")
    assert done.stdout.endswith("/block/vda\n"), done.stderr
