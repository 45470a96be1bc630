"""A VM under libvirt, for versus_libvirt.py: a daemon of our own, one domain, and its agent.

The daemon is an unprivileged one, with all its directories in one of ours: neither a libvirt
that is in use here nor its configuration plays a part. So it uses no cgroups, namespaces,
security labels or log daemon, and is told to do without seccomp, as hotlun's QEMU does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from hotlun.vm.hardware import FIRST_CONTROLLER_ADDRESS, KERNEL_ARGUMENTS

sys.path.append("/usr/lib/python3/dist-packages")  # Debian's binding is of Debian's Python

import libvirt
import libvirt_qemu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hotlun.vm.hardware import Hardware
    from hotlun.vm.launch import Software

LIBVIRTD = "/usr/sbin/libvirtd"
USER, GROUP = "nobody", "nogroup"
"""Whose the daemon and its QEMU are if we are root: a daemon of root's is the system's."""
PATIENCE = 60
"""Seconds for anything; after that something is wrong."""
DAEMON_TIMEOUT = "30"
"""Seconds until a daemon ends that nobody uses: if we are killed. The domain goes with us."""
FIRST_POLL, POLL = 0.02, 0.01
"""Seconds until the agent is asked whether a command has ended, and until it is asked again."""
LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


class GuestExecError(Exception):
    """A command failed in the guest."""


class LibvirtVM:
    """A running domain. Its methods block, and may be called by several threads."""

    def __init__(self, domain: libvirt.virDomain, removals: Removals) -> None:
        self._domain = domain
        self._removals = removals

    @classmethod
    @contextlib.contextmanager
    def start(cls, hardware: Hardware, software: Software, directory: str) -> Iterator[LibvirtVM]:
        """Boot hotlun's guest under a libvirtd in `directory`; both are gone after the block."""
        image = software.image
        initramfs = Path(image.initramfs).read_bytes() + software.agent
        Path(directory, "initramfs").write_bytes(initramfs)
        for path in (image.kernel, image.root):  # the cache is ours alone
            shutil.copy(path, directory)
        give(directory)
        with _connected(directory) as connection:
            removals = Removals(connection)
            up = _Event(connection, libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE)
            xml = _domain(hardware, directory, os.path.basename(image.kernel), image.root)
            domain = connection.createXML(xml, libvirt.VIR_DOMAIN_START_AUTODESTROY)
            try:
                up.wait_for(libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED)
                yield cls(domain, removals)
            finally:
                domain.destroy()

    def attach(self, lun: int, image: str) -> None:
        """attachDeviceFlags: it returns when QEMU has the disk; the guest sees it later."""
        self._domain.attachDeviceFlags(_disk(lun, image), LIVE)

    def detach(self, lun: int, image: str) -> None:
        """detachDeviceFlags: it waits for QEMU, 5 s at most, with the domain locked."""
        self._domain.detachDeviceFlags(_disk(lun, image), LIVE)

    def begin_detach(self, lun: int) -> None:
        """detachDeviceAlias: it waits for nothing (libvirt 9.0, qemuDomainDetachDeviceAlias)."""
        self._domain.detachDeviceAlias(_alias(lun), LIVE)

    def wait_until_gone(self, luns: Sequence[int]) -> None:
        """Wait for DEVICE_REMOVED of all of them, seen by nobody yet."""
        self._removals.take({_alias(lun) for lun in luns})

    def run(self, *argv: str) -> None:
        """guest-exec, and guest-exec-status until it has ended."""
        arguments = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        pid = self._ask("guest-exec", arguments)["pid"]
        time.sleep(FIRST_POLL)
        while not (status := self._ask("guest-exec-status", {"pid": pid}))["exited"]:
            time.sleep(POLL)
        if status.get("exitcode") != 0:
            raise GuestExecError(f"{argv}: {status}")

    def _ask(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        request = json.dumps({"execute": command, "arguments": arguments})
        answer = libvirt_qemu.qemuAgentCommand(self._domain, request, PATIENCE, 0)
        return json.loads(answer)["return"]


class Removals:
    """Which devices' DEVICE_REMOVED has come."""

    def __init__(self, connection: libvirt.virConnect) -> None:
        self._removed: set[str] = set()
        self._changed = threading.Condition()
        event = libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED
        connection.domainEventRegisterAny(None, event, self._add, None)

    def take(self, aliases: set[str]) -> None:
        """Wait until all of them have been removed, and forget them."""
        with self._changed:
            if not self._changed.wait_for(lambda: aliases <= self._removed, PATIENCE):
                raise TimeoutError(f"never removed: {sorted(aliases - self._removed)}")
            self._removed -= aliases

    def _add(self, _connection: object, _domain: object, alias: str, _opaque: object) -> None:
        with self._changed:
            self._removed.add(alias)
            self._changed.notify_all()


class _Event:
    """One that has a state."""

    def __init__(self, connection: libvirt.virConnect, event: int) -> None:
        self._states: set[int] = set()
        self._changed = threading.Condition()
        connection.domainEventRegisterAny(None, event, self._add, None)

    def wait_for(self, state: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: state in self._states, PATIENCE):
                raise TimeoutError(f"state {state} never came")

    def _add(self, _connection: object, _domain: object, state: int, *_more: object) -> None:
        with self._changed:
            self._states.add(state)
            self._changed.notify_all()


def give(directory: str) -> None:
    """Let libvirt's QEMU have all that is in the directory."""
    if os.geteuid() != 0:
        return
    for parent, _, files in os.walk(directory):
        for path in (parent, *(os.path.join(parent, name) for name in files)):
            shutil.chown(path, USER, GROUP)


@contextlib.contextmanager
def _connected(directory: str) -> Iterator[libvirt.virConnect]:
    """A libvirtd of our own, connected to."""
    _receive_events()
    parts = ("config/libvirt", "run", "cache", "data")
    for part in parts:
        os.makedirs(os.path.join(directory, part))
    Path(directory, "config/libvirt/qemu.conf").write_text(
        'stdio_handler = "file"\nseccomp_sandbox = 0\n'
    )
    settings = f'unix_sock_dir = "{directory}/run"\nmax_client_requests = 100\n'
    Path(directory, "libvirtd.conf").write_text(settings)
    give(directory)
    environment = {
        "PATH": os.defpath,
        "HOME": directory,
        "XDG_CONFIG_HOME": f"{directory}/config",
        "XDG_RUNTIME_DIR": f"{directory}/run",
        "XDG_CACHE_HOME": f"{directory}/cache",
        "XDG_DATA_HOME": f"{directory}/data",
    }
    argv = [
        *(LIBVIRTD, "--timeout", DAEMON_TIMEOUT, "--pid-file", f"{directory}/pid"),
        *("--config", f"{directory}/libvirtd.conf"),
    ]
    with open(f"{directory}/log", "wb") as log:
        daemon = subprocess.Popen(
            [*_as_user(), *argv], env=environment, stdin=subprocess.DEVNULL, stderr=log
        )
    try:
        connection = _open(f"{directory}/run/libvirt-sock", daemon)
        try:
            yield connection
        finally:
            connection.close()
    finally:
        daemon.terminate()
        daemon.wait()


def _as_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups", "--"]


def _open(path: str, daemon: subprocess.Popen[bytes]) -> libvirt.virConnect:
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(path):
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"no {path}")
        time.sleep(0.02)
    return libvirt.open(f"qemu+unix:///session?socket={path}")


@functools.cache
def _receive_events() -> None:
    """libvirt's own event loop, in a thread that ends with the process."""
    libvirt.virEventRegisterDefaultImpl()

    def forever() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=forever, daemon=True).start()


def _alias(lun: int) -> str:
    return f"ua-disk{lun}"  # the prefix is for those that users choose


def _disk(lun: int, image: str) -> str:
    return f"""
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/>
  <source file='{escape(image)}'/>
  <target dev='{_name(lun)}' bus='scsi'/>
  <serial>disk{lun}</serial>
  <alias name='{_alias(lun)}'/>
  <address type='drive' controller='0' bus='0' target='0' unit='{lun}'/>
</disk>"""


def _name(number: int) -> str:
    """sda, sdb... sdz, sdaa; libvirt wants one for each, and the guest uses its own."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"sd{letters}"


def _domain(hardware: Hardware, directory: str, kernel: str, root: str) -> str:
    """The devices of `hotlun.vm.hardware`, at the same places."""
    controllers = "".join(
        f"<controller type='scsi' index='{index}' model='virtio-scsi'>"
        f"<driver ioeventfd='off'/>{_pci(FIRST_CONTROLLER_ADDRESS + index)}</controller>"
        for index in range(hardware.controllers)
    )
    here = escape(directory)
    return f"""
<domain type='qemu'>
  <name>theirs</name>
  <memory unit='MiB'>{hardware.memory_mib}</memory>
  <vcpu>{hardware.cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{here}/{kernel}</kernel>
    <initrd>{here}/initramfs</initrd>
    <cmdline>{KERNEL_ARGUMENTS}</cmdline>
  </os>
  <features><acpi/><apic/><vmport state='off'/></features>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{here}/{os.path.basename(root)}'/>
      <target dev='vda' bus='virtio'/>
      <readonly/>
      {_pci(0x2)}
    </disk>
    <controller type='virtio-serial' index='0' ports='4'>{_pci(0x3)}</controller>
    {controllers}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{here}/console'/><target port='0'/></serial>
    <serial type='null'><target port='1'/></serial>
    <channel type='null'>
      <target type='virtio' name='org.hotlun.agent.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='1'/>
    </channel>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
      <address type='virtio-serial' controller='0' bus='0' port='2'/>
    </channel>
  </devices>
</domain>"""


def _pci(device: int) -> str:
    return f"<address type='pci' domain='0' bus='0' slot='{device:#x}' function='0'/>"
