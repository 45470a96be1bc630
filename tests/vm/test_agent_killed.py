"""The agent, killed after each of its steps, and the one after it, which knows nothing of that.

A step is anything that changes something outside the agent: a system call, an order to
the device mapper, a program that begins, works or ends (`support.killing_agent`). The
next agent is asked for the same, or for the opposite, as a host does that got no answer.
Whatever the dead one had come to, the guest must be as if it had lived, and in the end
nothing may be left.

All the steps of all the cases take half an hour, so a run takes a seeded choice of them,
each step at which a program is at work among it. `HOTLUN_KILL_AFTER=all` in the environment
has it walk through all of them, `HOTLUN_KILL_AFTER=unplug,mount:3` through all of an unplug
and one of a mount, of each case. A failure says which it was.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import subprocess
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from support import disks
from support.guest_shell import shell
from support.killing import KillableAgent, World, look, steps_of

from hotlun import MountConfig, Secret, Slot
from hotlun.backends import requests
from hotlun.backends.qemu import QEMUHostBackend
from hotlun.model import Attachment, Disk, DiskKind, GuestMount, ImageFormat, Verity
from hotlun.vm import Machine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from hotlun.bridge.responses import Response

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

_log = logging.getLogger(__name__)

MIB = 1 << 20
CHOSEN = os.environ.get("HOTLUN_KILL_AFTER", "")
PER_CASE = 1
"""Steps that a run takes of each case, beside those where a program is at work."""

DEADLINE = 60.0
"""Seconds for what a killed agent has begun to come to its end."""

HERE = "/run/killed/deep/mount"
KEPT = "/run/kept"
"""A directory that is there before, and has to be afterwards."""
CHEAP_KEYS = r"""
real=$(command -v cryptsetup)
mkdir -p /usr/local/sbin
cat >/usr/local/sbin/cryptsetup <<END
#!/bin/sh
for argument; do
    [ "\$argument" = 65536 ] && argument=32
    set -- "\$@" "\$argument"
    shift
done
exec $real "\$@"
END
chmod +x /usr/local/sbin/cryptsetup
"""
"""To try a key needs 32 KiB of memory and not 64 MiB, for which an emulated guest takes seconds."""

LABELS = f'import os; print(os.listxattr("{KEPT}"))'
KEY = Secret("a key that stays")
ROOT = "0f" * 32
"""In a config, the root of the image's own tree, which is another one each time."""
AT_WORK = "a program is at work"
MOUNTING = ("mount", "mount-release")
PHASES = (*MOUNTING, "unmount", "unmount-mount", "unplug")
"""What the agent is killed at, and what it is asked for then, if that is not the same."""


@dataclass(frozen=True)
class Case:
    """A disk, how it is mounted, and how it must not be while it is."""

    name: str
    image: Callable[[Path], Path]
    config: MountConfig
    others: tuple[MountConfig, ...]
    note: str | None = None
    read_only: bool = False
    path: str = HERE
    first: MountConfig | None = None
    """Mounted so once, before the rest begins."""
    is_busy: bool = False
    """Whether a process works in it until it is unmounted, which is all that is disturbed then."""


def blank(mebibytes: int) -> Callable[[Path], Path]:
    return lambda path: disks.blank(path, mebibytes * MIB)


def ext4(mebibytes: int) -> Callable[[Path], Path]:
    return lambda path: disks.ext4(path, "kept", mebibytes * MIB)


def ensured(filesystem: str, **more: Any) -> MountConfig:
    return MountConfig(filesystem=filesystem, ensure_filesystem=True, **more)


def with_tree(path: Path) -> Path:
    """An ext4 with veritysetup's tree right behind it, whose root is in a file beside it."""
    size = 16 * MIB
    disks.ext4(path, "kept", size)
    block = 1024  # mke2fs's for so small a filesystem, which cannot be on larger ones
    tree = [f"--hash-offset={size}", f"--data-blocks={size // block}"]
    tree += [f"--data-block-size={block}", f"--hash-block-size={block}"]
    done = subprocess.run(
        ["veritysetup", "format", *tree, str(path), str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    root_of(path).write_text(done.stdout.partition("Root hash:")[2].split()[0])
    return path


def root_of(image: Path) -> Path:
    return image.with_suffix(".root")


OTHER = MountConfig(options=("nodev", "nosuid"))
CASES = (
    Case(
        "plain",
        ext4(16),
        MountConfig(options=("noatime", "nodev", "data=ordered", "rshared")),
        (MountConfig(), OTHER, MountConfig(filesystem="ext4"), MountConfig(block_device=True)),
        note="kept",
    ),
    Case(
        "on a directory that stays",
        ext4(16),
        MountConfig(options=("silent", "nosuid", "private")),
        (OTHER,),
        note="kept",
        path=KEPT,
    ),
    Case(
        "partition",
        lambda path: disks.partitioned(path, "gpt", {1: "other", 2: "kept"}),
        MountConfig(partition=2),
        (MountConfig(partition=1), MountConfig(partition=2, options=("nodev",)), MountConfig()),
        note="kept",
    ),
    Case("ext4 on blank", blank(32), ensured("ext4"), (OTHER, MountConfig(), ensured("xfs"))),
    Case("ext4 on ext4", ext4(32), ensured("ext4"), (OTHER, ensured("xfs")), note="kept"),
    Case(
        "ext4 on blank, preserving",
        blank(32),
        ensured("ext4", preserve_data=True),
        (OTHER, ensured("ext4")),
    ),
    Case("xfs on ext4", ext4(320), ensured("xfs"), (OTHER, ensured("ext4"))),
    Case("btrfs on blank", blank(128), ensured("btrfs"), (OTHER, ensured("ext4"))),
    Case(
        "encrypted ext4",
        blank(48),
        ensured("ext4", encrypted=True),
        (OTHER, ensured("ext4"), ensured("xfs", encrypted=True)),
    ),
    Case(
        "encrypted xfs",
        blank(400),
        ensured("xfs", encrypted=True),
        (OTHER, ensured("xfs")),
    ),
    Case(
        "encrypted and busy",
        blank(48),
        ensured("ext4", encrypted=True, lazy_unmount=True),
        (),
        is_busy=True,
    ),
    Case(
        "new volume",
        blank(64),
        ensured("ext4", encrypted=True, key=KEY),
        (OTHER, ensured("ext4", encrypted=True)),
    ),
    Case(
        "volume reopened",
        blank(64),
        MountConfig(encrypted=True, key=KEY),
        (OTHER, MountConfig(encrypted=True, key=Secret("another"))),
        first=ensured("ext4", encrypted=True, key=KEY),
    ),
    Case(
        "verity",
        with_tree,
        MountConfig(verity=ROOT),
        (MountConfig(), MountConfig(verity="00" * 32)),
        note="kept",
        read_only=True,
    ),
    Case("link", ext4(16), MountConfig(block_device=True), (MountConfig(),)),
    Case(
        "verity link",
        with_tree,
        MountConfig(verity=ROOT, block_device=True),
        (MountConfig(block_device=True), MountConfig(verity="00" * 32, block_device=True)),
        read_only=True,
    ),
)


@dataclass(frozen=True)
class Undisturbed:
    """A case when nobody is killed."""

    template: Path
    case: Case
    """With the root of this image's tree in its configs."""
    mounted: World
    steps: dict[str, list[str]]
    """By phase: those of the request that the agent is killed at."""


class Stage:
    """A VM with a killable agent, and a second disk that nobody has asked for.

    Args:
        folder: for images.
    """

    def __init__(
        self, vm: Machine, host: QEMUHostBackend, agent: KillableAgent, folder: Path
    ) -> None:
        self.vm = vm
        self.agent = agent
        self.stranger: Attachment
        self._host = host
        self._folder = folder
        self._count = itertools.count()

    @asynccontextmanager
    async def attached(
        self, image: Path, lun: int = 0, *, read_only: bool = False
    ) -> AsyncIterator[Attachment]:
        """The image in a slot, under a serial of its own."""
        disk = Disk(str(image), DiskKind.VIRTUAL_DISK, read_only, format=ImageFormat.RAW)
        attachment = Attachment(Slot(0, lun), disk, f"killed{next(self._count)}")
        await self._host.attach(attachment)
        yield attachment
        await self._host.detach(attachment)

    async def wish(self, attachment: Attachment, path: str, config: MountConfig) -> Wish:
        """What the host sends to have it so, and to have it undone."""
        mount = GuestMount(attachment, path, config, self._host.identity(attachment))
        features = (await self.agent.connected()).features
        unplug = requests.unplug_request(attachment, "linux")
        assert unplug is not None
        return Wish(
            requests.mount_request(mount, "linux", features),
            requests.unmount_request(mount, "linux", features),
            unplug,
        )

    async def do(self, request: dict[str, Any]) -> Response:
        """Have it done."""
        answer = await self.agent.ask(request)
        assert answer.code == 0, answer.text
        return answer

    async def kill(self, request: dict[str, Any], step: int) -> None:
        """Have the agent killed at it, unless it is done in fewer steps than it was before."""
        answer = await self.agent.ask_and_kill(request, step)
        if answer is not None:
            assert answer.code == 0, answer.text
            assert len(steps_of(answer)) <= step, "it was not killed"

    async def do_when_free(self, request: dict[str, Any]) -> None:
        """Have it done; while a program of the dead agent's is at work, that can be the answer."""
        async with asyncio.timeout(DEADLINE):
            while (answer := await self.agent.ask(request)).code != 0:
                assert "process" in answer.text, answer.text

    async def undisturbed(self, case: Case) -> Undisturbed:
        """The case once without any disturbance, and how everything is then."""
        template = case.image(self._folder / f"{case.name}.raw")
        if case.first is not None:
            async with self.attached(template) as attachment:
                wish = await self.wish(attachment, case.path, case.first)
                for request in (wish.mount, wish.unmount, wish.unplug):
                    await self.do(request)
        if root_of(template).exists():
            case = with_root(case, root_of(template).read_text())
        image = copied(template, self._folder)
        async with self.attached(image, read_only=case.read_only) as attachment:
            wish = await self.wish(attachment, case.path, case.config)
            mounting = steps_of(await self.do(wish.mount))
            mounted = await look(self.vm)
            async with self.in_use(case):
                unmounting = steps_of(await self.do(wish.unmount))
            unplugging = steps_of(await self.do(wish.unplug))
        per_phase = (mounting, mounting, unmounting, unmounting, unplugging)
        steps = dict(zip(PHASES, per_phase, strict=True))
        if case.is_busy:
            steps = {"unmount": unmounting}
        return Undisturbed(template, case, mounted.still(), steps)

    @asynccontextmanager
    async def in_use(self, case: Case) -> AsyncIterator[None]:
        """Have a process work in it meanwhile, if the case has one."""
        if not case.is_busy:
            yield
            return
        user = await shell(self.vm, f"cd {case.path}; sleep 1000 >/dev/null 2>&1 & echo $!")
        yield
        await shell(self.vm, f"kill {user}")


@dataclass(frozen=True)
class Wish:
    """Requests about one mount."""

    mount: dict[str, Any]
    unmount: dict[str, Any]
    unplug: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """One VM for the file."""
    folder = tmp_path_factory.mktemp("stage")
    stranger = disks.ext4(folder / "stranger.raw", "not asked for")
    async with (
        Machine.start(connect=False) as vm,
        QEMUHostBackend.connect(vm.qmp_socket) as host,
    ):
        await shell(vm, f"mkdir -m 700 {KEPT}\n{CHEAP_KEYS}")
        agent = await KillableAgent.installed(vm)
        stage = Stage(vm, host, agent, folder)
        async with stage.attached(stranger, 1) as stage.stranger:
            unplug = (await stage.wish(stage.stranger, HERE, MountConfig())).unplug
            await until(stage.vm, lambda world: "lun1-" in world.devices)
            yield stage
            await stage.do(unplug)
        await agent.close()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
async def test_what_was_begun_is_finished_or_undone(
    stage: Stage, case: Case, tmp_path: Path
) -> None:
    """The next agent gives the same world, lets nothing else be had, and leaves nothing."""
    clean = await stage.undisturbed(case)
    for phase, step in chosen(case.name, clean.steps):
        where = f"killed after {phase}:{step}, {clean.steps[phase][step]}"
        _log.info("%s: %s", case.name, where)
        try:
            await one_trial(stage, clean, phase, step, tmp_path)
        except BaseException as error:
            error.add_note(f"{where}, of {clean.steps[phase]}")
            raise


async def test_a_disk_that_was_half_let_go_is_mounted(stage: Stage, tmp_path: Path) -> None:
    """Its driver has gone, and nobody but the next agent would have it back."""
    case = CASES[0]
    clean = await stage.undisturbed(case)
    steps = clean.steps["unplug"]
    step = next(at for at, name in enumerate(steps) if "drivers/sd/unbind" in name)
    before = await look(stage.vm)
    async with stage.attached(copied(clean.template, tmp_path)) as attachment:
        wish = await stage.wish(attachment, case.path, case.config)
        await stage.do(wish.mount)
        await stage.do(wish.unmount)
        await stage.kill(wish.unplug, step)
        assert "device at lun0" in (await look(stage.vm)).devices
        await stage.do(wish.mount)
        await everything_is_there(stage, clean)
        await stage.do(wish.unmount)
        await stage.do(wish.unplug)
    after = await until(stage.vm, lambda world: world == before)
    assert after == before, after.differs_from(before)


async def one_trial(stage: Stage, clean: Undisturbed, phase: str, step: int, folder: Path) -> None:
    before = await look(stage.vm)
    case = clean.case
    image = copied(clean.template, folder)
    async with stage.attached(image, read_only=case.read_only) as attachment:
        wish = await stage.wish(attachment, case.path, case.config)
        match phase:
            case "mount":
                await stage.kill(wish.mount, step)
                seen = (await look(stage.vm)).still()
                if seen.at(case.path):
                    await nothing_else_is_to_be_had(stage, case, attachment, seen)
                await stage.do_when_free(wish.mount)
                await everything_is_there(stage, clean)
                await nothing_else_is_to_be_had(stage, case, attachment, clean.mounted)
                await stage.do(wish.mount)
            case "mount-release":
                await stage.kill(wish.mount, step)
            case "unmount":
                await stage.do(wish.mount)
                async with stage.in_use(case):
                    await stage.kill(wish.unmount, step)
                    await stage.do(wish.unmount)
            case "unmount-mount":
                await stage.do(wish.mount)
                await stage.kill(wish.unmount, step)
                await stage.do(wish.mount)
                await everything_is_there(stage, clean)
            case _:
                await stage.do(wish.mount)
                await stage.do(wish.unmount)
                await stage.kill(wish.unplug, step)
        await stage.do_when_free(wish.unmount)
        await stage.do_when_free(wish.unplug)
        await stage.do(wish.unplug)
    image.unlink()
    after = await until(stage.vm, lambda world: world == before)
    assert after == before, after.differs_from(before)
    if case.path == KEPT:
        assert await shell(stage.vm, f"python3 -Ic '{LABELS}'") == "[]\n"


async def until(vm: Machine, holds: Callable[[World], bool]) -> World:
    """Look until something holds, or the deadline is there; what was seen last."""
    end = asyncio.get_running_loop().time() + DEADLINE
    while not holds(world := await look(vm)):
        if asyncio.get_running_loop().time() > end:
            break
    return world


async def everything_is_there(stage: Stage, clean: Undisturbed) -> None:
    """As if nobody had been killed, and it can be read."""
    world = (await look(stage.vm)).still()
    assert world == clean.mounted, world.differs_from(clean.mounted)
    if clean.case.note is not None:
        assert await shell(stage.vm, f"cat {clean.case.path}/note") == clean.case.note


async def nothing_else_is_to_be_had(
    stage: Stage, case: Case, attachment: Attachment, seen: World
) -> None:
    """The path is taken: for another disk, and for this one in another way."""
    wishes = [await stage.wish(attachment, case.path, config) for config in case.others]
    wishes.append(await stage.wish(stage.stranger, case.path, MountConfig()))
    for wish in wishes:
        answer = await stage.agent.ask(wish.mount)
        assert answer.code != 0, f"{wish.mount} was done"
    world = (await look(stage.vm)).still()
    assert world == seen, world.differs_from(seen)


def chosen(seed: str, steps: dict[str, list[str]]) -> list[tuple[str, int]]:
    """Phase and step of each kill."""
    every = [(phase, step) for phase, names in steps.items() for step in range(len(names))]
    if CHOSEN == "all":
        return every
    if CHOSEN:
        wanted = CHOSEN.split(",")
        return [one for one in every if one[0] in wanted or "{}:{}".format(*one) in wanted]
    chance = random.Random(seed)
    working = [step for step, name in enumerate(steps.get("mount", ())) if name == AT_WORK]
    some = {*chance.sample(every, PER_CASE), *((chance.choice(MOUNTING), step) for step in working)}
    return sorted(some)


def copied(template: Path, folder: Path) -> Path:
    """Another image with the same content, as sparse."""
    path = folder / "disk.raw"
    subprocess.run(["cp", "--sparse=always", template, path], check=True)
    return path


def with_root(case: Case, root: str) -> Case:
    """The case with the root of the image's own tree in its configs."""

    def rooted(config: MountConfig) -> MountConfig:
        own = config.verity == Verity(ROOT)
        return replace(config, verity=root) if own else config

    return replace(case, config=rooted(case.config), others=tuple(map(rooted, case.others)))
