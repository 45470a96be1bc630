"""Grants that outlive the process which made them: planned, half made, adopted, taken back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crash import Crash, crash_before_write

from hotlun.backends import acl
from hotlun.backends.access import AccessGrants
from hotlun.errors import BackendError, UnsupportedError
from hotlun.model import Disk, DiskKind, ImageFormat

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE, TWO = "1001", "1002"
"""Users that the VM may run as; they need not exist."""


class Place(NamedTuple):
    """Two private folders, one in the other, with images in the inner one."""

    outer: Path
    inner: Path

    def disk(self, name: str, *, read_only: bool = False) -> Disk:
        path = self.inner / name
        if not path.exists():
            path.write_bytes(bytes(1 << 20))
            path.chmod(0o600)
        return Disk(str(path), DiskKind.VIRTUAL_DISK, read_only, format=ImageFormat.RAW)

    def lists(self) -> dict[str, acl.Acl]:
        """Those of everything that a grant here may touch."""
        paths = (self.outer, self.inner, *self.inner.iterdir())
        return {path.name: acl.read_acl(str(path)) for path in paths}


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as outer:
        inner = Path(outer, "disks")
        inner.mkdir(mode=0o700)
        yield Place(Path(outer), inner)


def adopted(*grants: tuple[Disk, str, str]) -> AccessGrants:
    """The books of a new process that is told of these grants, in this order."""
    books = AccessGrants()
    for grant in grants:
        books.adopt(*grant)
    return books


def test_a_plan_changes_nothing_and_says_what_the_grant_does(place: Place) -> None:
    """Paths, who, and the lists as they are; the grant then changes just these paths."""
    books, disk, before = AccessGrants(), place.disk("a"), place.lists()
    plan = books.plan(disk, ONE)
    assert plan.isascii()
    assert place.lists() == before
    changes = json.loads(plan)["changes"]
    books.grant(disk, ONE)
    changed = [name for name, each in place.lists().items() if each != before[name]]
    assert [Path(change["path"]).name for change in changes] == changed
    for change in changes:
        status = os.stat(change["path"])
        assert (change["device"], change["inode"]) == (status.st_dev, status.st_ino)
        assert change["who"] == list(acl.user(1001))
    assert [change["permissions"] for change in changes] == [1, 1, 6]


def test_a_plan_knows_of_other_grants(place: Place) -> None:
    """The folders that another grant has extended are its own, too, as they were before both."""
    books, before = AccessGrants(), place.lists()
    alone = json.loads(books.plan(place.disk("b"), ONE))
    books.grant(place.disk("a"), ONE)
    assert json.loads(books.plan(place.disk("b"), ONE)) == alone
    plan = books.plan(place.disk("b"), ONE)
    books.grant(place.disk("b"), ONE)
    assert books.plan(place.disk("b"), ONE) == plan
    books.revoke(place.disk("a"), ONE)
    later = adopted((place.disk("b"), ONE, plan))
    later.revoke(place.disk("b"), ONE)
    assert {name: each for name, each in place.lists().items() if name in before} == before


def test_nothing_to_plan(place: Place) -> None:
    """Root needs nothing, nor does who may open everything; a provider's disk is no file."""
    books = AccessGrants()
    assert books.plan(place.disk("a"), "0") == ""
    place.outer.chmod(0o755)
    place.inner.chmod(0o755)
    Path(place.disk("a").path).chmod(0o644)
    assert books.plan(place.disk("a", read_only=True), ONE) == ""
    provided = Disk("h:1", DiskKind.EXTENSIBLE_VIRTUAL_DISK, provider="nbd")
    assert books.plan(provided, ONE) == ""
    books.adopt(provided, ONE, "")
    books.revoke(provided, ONE)


def test_a_plan_fails_as_the_grant_does(place: Place) -> None:
    """With the same words."""
    books = AccessGrants()
    elsewhere = Disk("/proc/self/environ", DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
    missing = Disk(str(place.inner / "x"), DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
    for disk, user, kind in (
        (place.disk("a"), "no-such-user", BackendError),
        (missing, ONE, BackendError),
        (elsewhere, ONE, UnsupportedError),
    ):
        messages = []
        for call in (books.plan, books.grant):
            with pytest.raises(kind) as caught:
                call(disk, user)
            messages.append((str(caught.value), caught.value.operation, caught.value.disk))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("then", ["revoke", "grant", "another", "revoke another first"])
def test_a_process_that_ends_in_the_middle(place: Place, writes: int, then: str) -> None:
    """However many of the three lists it has written, the next one takes all of it back."""
    disk, other, before = place.disk("a"), place.disk("b"), place.lists()
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    if writes < 3:
        with pytest.raises(Crash), crash_before_write(writes):
            books.grant(disk, ONE)
    else:
        books.grant(disk, ONE)
    assert sum(each != before[name] for name, each in place.lists().items()) == writes
    books = adopted((disk, ONE, plan))
    match then:
        case "grant":
            books.grant(disk, ONE)
            assert acl.read_acl(disk.path)[acl.user(1001)] == 6
            assert acl.read_acl(str(place.outer))[acl.user(1001)] == 1
        case "another" | "revoke another first":
            books.grant(other, ONE)
            assert acl.read_acl(str(place.outer))[acl.user(1001)] == 1
            if then == "revoke another first":
                books.revoke(other, ONE)
    books.revoke(disk, ONE)
    if then == "another":
        assert acl.read_acl(str(place.inner))[acl.user(1001)] == 1
        assert acl.user(1001) not in acl.read_acl(disk.path)
        books.revoke(other, ONE)
    assert place.lists() == before
    books.revoke(disk, ONE)
    assert place.lists() == before


@pytest.mark.parametrize("writes", range(3))
def test_a_process_that_ends_in_the_middle_of_a_revoke(place: Place, writes: int) -> None:
    """The rest is taken back by the next one."""
    disk, before = place.disk("a"), place.lists()
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    books.grant(disk, ONE)
    with pytest.raises(Crash), crash_before_write(writes):
        books.revoke(disk, ONE)
    adopted((disk, ONE, plan)).revoke(disk, ONE)
    assert place.lists() == before


KILLED = """
import os, signal, sys
from hotlun.backends.access import AccessGrants
from hotlun.model import Disk, DiskKind, ImageFormat
path, left = sys.argv[1], int(sys.argv[2])
def before(event, arguments):
    global left
    if event == "os.setxattr":
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
sys.addaudithook(before)
books = AccessGrants()
disk = Disk(path, DiskKind.VIRTUAL_DISK, format=ImageFormat.RAW)
print(books.plan(disk, "1001"), flush=True)
books.grant(disk, "1001")
"""


@pytest.mark.parametrize("writes", range(4))
def test_a_process_that_is_killed(place: Place, writes: int) -> None:
    """With SIGKILL, between two lists: what it has said before is enough to undo it."""
    disk, before = place.disk("a"), place.lists()
    child = subprocess.run(
        [sys.executable, "-c", KILLED, disk.path, str(writes)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == (-signal.SIGKILL if writes < 3 else 0), child.stderr
    assert sum(each != before[name] for name, each in place.lists().items()) == writes
    adopted((disk, ONE, child.stdout.strip())).revoke(disk, ONE)
    assert place.lists() == before


def test_what_others_have_changed_since_stays(place: Place) -> None:
    """Their entries and modes are kept, ours are taken back."""
    disk = place.disk("a")
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    books.grant(disk, ONE)
    folder = acl.read_acl(str(place.inner))
    acl.write_acl(str(place.inner), {**folder, acl.user(99): 5})
    os.chmod(disk.path, 0o640)
    adopted((disk, ONE, plan)).revoke(disk, ONE)
    assert acl.read_acl(str(place.inner))[acl.user(99)] == 5
    assert acl.user(1001) not in acl.read_acl(str(place.inner))
    assert acl.user(1001) not in acl.read_acl(disk.path)
    assert acl.MASK not in acl.read_acl(disk.path)


def test_another_file_of_that_name_is_left_alone(place: Place) -> None:
    """Also if it has just the entry that ours had."""
    disk = place.disk("a")
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    books.grant(disk, ONE)
    os.rename(disk.path, place.inner / "old")
    theirs = acl.extended(acl.read_acl(place.disk("a").path), {acl.user(1001): 6})
    acl.write_acl(disk.path, theirs)
    books = adopted((disk, ONE, plan))
    books.revoke(disk, ONE)
    assert acl.read_acl(disk.path) == theirs
    assert acl.user(1001) not in acl.read_acl(str(place.inner))


def test_a_file_that_has_gone(place: Place) -> None:
    """Its folders are as before."""
    before = place.lists()
    disk = place.disk("a")
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    books.grant(disk, ONE)
    os.unlink(disk.path)
    adopted((disk, ONE, plan)).revoke(disk, ONE)
    assert place.lists() == before


def test_adopting_touches_nothing_and_twice_is_once(place: Place) -> None:
    """Files are looked at when something is to be done with them."""
    disk, before = place.disk("a"), place.lists()
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    books.grant(disk, ONE)
    granted = place.lists()
    books = adopted((disk, ONE, plan), (disk, ONE, plan))
    assert place.lists() == granted
    assert books.plan(disk, ONE) == plan
    books.revoke(disk, ONE)
    assert place.lists() == before


def test_a_path_that_is_not_utf_8(place: Place) -> None:
    """It comes through the text as it is."""
    disk, before = place.disk(os.fsdecode(b"\xff")), place.lists()
    books = AccessGrants()
    plan = books.plan(disk, ONE)
    books.grant(disk, ONE)
    adopted((disk, ONE, plan)).revoke(disk, ONE)
    assert place.lists() == before


LIST = [[1, 0xFFFFFFFF, 6], [4, 0xFFFFFFFF, 0], [32, 0xFFFFFFFF, 0]]
GOOD: dict[str, object] = {
    "path": "/x",
    "device": 1,
    "inode": 2,
    "who": [2, 1001],
    "permissions": 6,
    "original": LIST,
}
BAD: list[dict[str, object]] = [
    {"path": "x"},
    {"path": "/\0"},
    {"path": "/\ud800"},
    {"path": 1},
    {"device": -1},
    {"inode": 1 << 64},
    {"inode": 1.5},
    {"who": [2]},
    {"who": [8, 1001]},
    {"who": [2, True]},
    {"permissions": 0},
    {"permissions": 8},
    {"permissions": "6"},
    {"original": {}},
    {"original": []},
    {"original": LIST[1:]},
    {"original": [*LIST, [2, 7, 6]]},
    {"original": [*LIST, [64, 7, 6]]},
    {"original": [*LIST, [1, 0xFFFFFFFF, 7]]},
]


@pytest.mark.parametrize(
    "plan",
    [
        "x",
        "[]",
        "{}",
        "[" * 100_000,
        '{"version": 1e400, "changes": []}',
        '{"version": true, "changes": [1]}',
        '{"version": 2, "changes": []}',
        '{"version": 1, "changes": {}}',
        " " * (5 << 20),
        *(json.dumps({"version": 1, "changes": [GOOD | change]}) for change in BAD),
        json.dumps({"version": 1, "changes": [{}]}),
        json.dumps({"version": 1, "changes": [GOOD, 3]}),
    ],
)
def test_what_is_no_plan(place: Place, plan: str) -> None:
    """It is refused as a whole, and the books are as they were."""
    disk = place.disk("a")
    books = AccessGrants()
    with pytest.raises(BackendError, match="in a way that is not understood") as caught:
        books.adopt(disk, ONE, plan)
    assert caught.value.disk == disk
    assert not books._needs
    assert not books._extended
    books.adopt(disk, ONE, json.dumps({"version": 1, "changes": [GOOD]}))


names = st.sampled_from(["a", "b", "c"])
users = st.sampled_from([ONE, TWO])
steps = st.lists(st.tuples(st.sampled_from(["grant", "grant", "revoke"]), names, users), max_size=8)
entries: st.SearchStrategy[acl.Acl] = st.dictionaries(
    st.sampled_from([acl.user(1001), acl.user(99), acl.MASK]), st.integers(0, 7)
)


@settings(deadline=None, max_examples=150)
@given(
    steps=steps,
    crash=st.integers(0, 12),
    kept=st.dictionaries(st.sampled_from(["disks", "a", "b"]), entries),
    after=steps,
    order=st.randoms(use_true_random=False),
)
def test_whatever_was_granted_is_taken_back(
    steps: list[tuple[str, str, str]],
    crash: int,
    kept: dict[str, acl.Acl],
    after: list[tuple[str, str, str]],
    order: object,
) -> None:
    """After a crash anywhere, with plans of all that may be there, in any order of revokes."""
    with tempfile.TemporaryDirectory() as outer:
        inner = Path(outer, "disks")
        inner.mkdir(mode=0o700)
        place = Place(Path(outer), inner)
        disks = {name: place.disk(name) for name in ("a", "b", "c")}
        for name, more in kept.items():
            path = str(inner if name == "disks" else inner / name)
            if len(more) > (acl.MASK in more):
                acl.write_acl(path, {acl.MASK: 4, **acl.read_acl(path), **more})
        before = place.lists()
        books = AccessGrants()
        plans: dict[tuple[str, str], str] = {}
        try:
            with crash_before_write(crash):
                for verb, name, user in steps:
                    if verb == "grant":
                        plan = books.plan(disks[name], user)
                        # Written down again, it keeps its place in the order.
                        plans[name, user] = plan
                        books.grant(disks[name], user)
                    else:
                        books.revoke(disks[name], user)
                        plans.pop((name, user), None)
        except Crash:
            pass
        books = adopted(*((disks[name], user, plan) for (name, user), plan in plans.items()))
        held = set(plans)
        for verb, name, user in after:
            if verb == "grant":
                books.grant(disks[name], user)
                held.add((name, user))
            else:
                books.revoke(disks[name], user)
                held.discard((name, user))
            for other, whose in held - set(plans):
                there = acl.read_acl(disks[other].path)
                assert acl.allows(there, acl.user(int(whose)), acl.READ | acl.WRITE)
                assert acl.allows(acl.read_acl(str(inner)), acl.user(int(whose)), acl.SEARCH)
        remaining = sorted(held)
        order.shuffle(remaining)  # type: ignore[attr-defined] # a Random
        for name, user in remaining:
            books.revoke(disks[name], user)
        assert place.lists() == before
        assert not books._extended
        assert not books._needs
