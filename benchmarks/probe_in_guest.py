"""The guest's end of `probe.py`: hears of disks, lets them go, and reads what the kernel noted.

Runs in the guest as root, `python3 -I probe_in_guest.py PORT`, and answers requests, a line of
JSON each, over the virtio port of that name. The kernel announces a disk when it has read its
table of partitions; that event is what is waited for.
"""

import contextlib
import glob
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

sys.path.insert(0, os.path.dirname(__file__))  # which -I leaves out
sys.path.insert(0, "/run/hotlun/agent.pyz")
from probe_sampler import Sampler

from hotlun.agent.event_filter import only_block_devices

KERNEL_UEVENTS = 15  # linux/netlink.h
SO_RCVBUFFORCE = 33
TRACING = "/sys/kernel/tracing"
COMMANDS = f"{TRACING}/events/scsi/scsi_dispatch_cmd_start/enable"


class Port:
    """Lines of JSON, there and back."""

    def __init__(self, name):
        for path in glob.glob("/sys/class/virtio-ports/*/name"):
            if read(path) == name:
                node = f"/dev/{path.split('/')[-2]}"
        self._file = os.open(node, os.O_RDWR)
        self._received = b""

    def hear(self):
        while b"\n" not in self._received:
            more = os.read(self._file, 65536)
            if not more:
                time.sleep(0.01)  # nobody is connected yet: reads return at once
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def say(self, answer):
        left = json.dumps(answer).encode() + b"\n"
        while left:
            left = left[os.write(self._file, left) :]


class Guest:
    """What can be asked; each method is a request, its arguments the request's."""

    def __init__(self, port):
        self._port = port
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, KERNEL_UEVENTS)
        self._events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        only_block_devices(self._events)
        self._events.bind((0, 1))
        self._listener = 0
        self._sampler = None

    def listen(self):
        """Have another process hear of every device until `listen_no_more`, and do nothing."""
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, KERNEL_UEVENTS)
        events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        events.bind((0, 1))
        self._listener = os.fork()
        while not self._listener:
            events.recv(4096)

    def listen_no_more(self):
        os.kill(self._listener, signal.SIGKILL)
        os.waitpid(self._listener, 0)

    def see(self, disks, each, scan):
        """Wait for so many disks; say first that we do, and each one's controller if asked.

        `scan` is the PCI address of a controller that is to be scanned, once the host says so.
        """
        self._forget()
        self._port.say("ready")
        if scan:
            self._port.hear()
            (file,) = glob.glob(f"/sys/bus/pci/devices/{scan}/virtio*/host*/scsi_host/host*/scan")
            write(file, "0 0 -")
        seen = set()
        while len(seen) < disks:
            head = self._events.recv(4096).partition(b"\0")[0]
            if head.startswith(b"add@") and b"/block/sd" in head:
                way = head.decode().split("/")
                seen.add(way[-3])
                if each:
                    self._port.say(next(part for part in way if part.startswith("0000:00:")))
        return len(seen)

    def let_go(self, threads, unbind):
        """Delete all SCSI devices, in so many threads; those of a controller come together.

        Args:
            unbind: whether each loses its driver before.
        """
        files = sorted(
            glob.glob("/sys/class/scsi_device/*/device/delete"), key=lambda file: file.split(":")
        )
        share = -(-len(files) // threads)
        parts = [files[at : at + share] for at in range(0, len(files), share)]
        working = [threading.Thread(target=delete_all, args=(part, unbind)) for part in parts]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
        return len(files)

    def none_left(self):
        """Let go what a scan after missed events has found again before QEMU had let it go."""
        for file in glob.glob("/sys/class/scsi_host/host*/scan"):
            write(file, "0 0 255")  # nothing is there: it waits for scans that are under way
        for file in glob.glob("/sys/class/scsi_device/*/device/delete"):
            with contextlib.suppress(OSError):  # it has gone by itself
                write(file, "1")

    def set(self, settings):
        """Write to files of the kernel's; what was there."""
        before = {path: read(path) for path in settings}
        for path, value in settings.items():
            write(path, value)
        return before

    def signal_agent(self, name):
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            if "agent.pyz\0--port\0" in read(path):
                os.kill(int(path.split("/")[2]), getattr(signal, name))

    def note_commands(self):
        """Have the kernel note each SCSI command from now on."""
        write(f"{TRACING}/buffer_size_kb", "8192")
        write(f"{TRACING}/trace", "")
        write(COMMANDS, "1")

    def noted_commands(self):
        write(COMMANDS, "0")
        lines = read(f"{TRACING}/trace").splitlines()
        return [line.partition("host_no=")[2] for line in lines if "host_no=" in line]

    def sample(self):
        """Have the kernel note what it does from now on."""
        self._sampler = Sampler()

    def sampled(self, parts):
        return self._sampler.shares(parts)

    def _forget(self):
        self._events.setblocking(False)
        try:
            while True:
                self._events.recv(4096)
        except BlockingIOError:
            self._events.setblocking(True)


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\n")
    except FileNotFoundError:  # a process that has ended
        return ""


def write(path, text):
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def delete_all(paths, unbind):
    for path in paths:
        if unbind:
            write("/sys/bus/scsi/drivers/sd/unbind", path.split("/")[4])
        write(path, "1")


def main():
    port = Port(sys.argv[1])
    guest = Guest(port)
    while True:
        request = port.hear()
        try:
            answer = getattr(guest, request.pop("do"))(**request)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        port.say(answer)


if __name__ == "__main__":
    main()
