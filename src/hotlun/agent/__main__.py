"""`python -m hotlun.agent`: serve the host that is reached in the way asked for, for ever."""

from __future__ import annotations

import argparse
import logging
import socket
import sys

from hotlun.agent import links
from hotlun.agent.devmapper import DeviceMapper
from hotlun.agent.disks import DEVICE_TIMEOUT, Disks
from hotlun.agent.kernel import Kernel
from hotlun.agent.mappings import Mappings
from hotlun.agent.mounts import Mounts
from hotlun.agent.scsi import ScsiDisks
from hotlun.agent.server import Server
from hotlun.agent.threads import Threads
from hotlun.agent.uevents import Uevents


def main(arguments: list[str] | None = None) -> int:
    """Serve until killed; the exit status if that is not possible."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(
        level=chosen.log_level.upper(),
        format="hotlun-agent: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    kernel = Kernel()
    try:
        uevents = Uevents()  # before anybody looks at sysfs
        scsi = ScsiDisks(kernel, uevents, Threads("order"))
        scsi.take_up()
        disks = Disks(
            kernel,
            scsi,
            Mappings(kernel, DeviceMapper(kernel), uevents),
            Mounts(kernel),
            chosen.device_timeout,
        )
        server = Server(disks, uevents.wake_all)
        if chosen.port:
            server.serve_each(links.port_links(kernel, chosen.port))
        elif chosen.unix:
            server.serve_all(links.listening_links(chosen.unix))
        else:
            # Imported here, as what it imports takes 50 ms in an emulated guest without vsock.
            from hotlun.bridge.transport import VSOCK_HOST_CID, VSOCK_PORT

            address = VSOCK_HOST_CID, VSOCK_PORT
            server.serve_each(links.dialled_links(socket.AF_VSOCK, address))
    except OSError as error:
        logging.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotlun-agent",
        description="Mounts, unmounts and unplugs the disks of this VM, as its host asks.",
        # Left to itself it asks shutil for the width, which imports three ways to compress.
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80),
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--port", metavar="NAME", help="a virtio-serial port, by its name or the path of its node"
    )
    how.add_argument("--unix", metavar="PATH", help="listen at a unix socket, for tests")
    how.add_argument(
        "--vsock", action="store_true", help="dial the host: vsock CID 2, port 0x40000000"
    )
    parser.add_argument(
        "--device-timeout",
        type=seconds,
        default=DEVICE_TIMEOUT,
        metavar="SECONDS",
        help="how long a device may take to appear or to go (%(default)g)",
    )
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error")
    )
    return parser


def seconds(text: str) -> float:
    """Of a waiting time, as written on the command line."""
    seconds = float(text)
    if not 0 < seconds <= 3600:
        raise ValueError(text)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
