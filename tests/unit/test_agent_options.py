"""Mount options become what the kernel takes."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies
from hypothesis.strategies import sampled_from

from hotlun.agent import options
from hotlun.agent.errors import RequestError
from hotlun.bridge.codes import HResult


def test_flag_words_become_bits_and_the_rest_data_in_order() -> None:
    """Words that the kernel has bits for are bits, others go to the filesystem as written."""
    parsed = options.parse(["noatime", "data=ordered", "nosuid", "commit=5", "nodev", "noexec"])
    assert parsed.flags == (
        options.MS_NOATIME | options.MS_NOSUID | options.MS_NODEV | options.MS_NOEXEC
    )
    assert parsed.data == ("data=ordered", "commit=5")
    assert parsed.propagations == ()


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["ro", "rw"], 0),
        (["rw", "ro"], options.MS_RDONLY),
        (["noatime", "atime"], 0),
        (["sync", "async", "sync"], options.MS_SYNCHRONOUS),
        (["defaults"], 0),
        (["nosuid", "defaults"], options.MS_NOSUID),
        (["relatime", "norelatime"], 0),
        (["silent", "loud"], 0),
        (["ro", "rw=1"], 0),
        (["noatime", "relatime"], options.MS_RELATIME),
        (["strictatime", "noatime"], options.MS_NOATIME),
        (["noatime", "nodiratime", "strictatime"], options.MS_NODIRATIME | options.MS_STRICTATIME),
    ],
)
def test_a_later_word_undoes_an_earlier_one(words: list[str], flags: int) -> None:
    """The caller's order is kept."""
    assert options.parse(words).flags == flags


def test_propagations_are_calls_of_their_own() -> None:
    """mount(2) takes a propagation only alone, so they are listed apart, in order."""
    parsed = options.parse(["rshared", "noatime", "private"])
    assert parsed.propagations == (options.MS_SHARED | options.MS_REC, options.MS_PRIVATE)
    assert parsed.flags == options.MS_NOATIME


@pytest.mark.parametrize(
    ("filesystem", "data"),
    [
        ("ext2", ()),
        ("ext3", ("noload",)),
        ("ext4", ("noload",)),
        ("xfs", ("norecovery",)),
        ("btrfs", ("rescue=nologreplay",)),
        ("f2fs", ("norecovery",)),
        ("nilfs2", ("norecovery",)),
        ("vfat", ()),
        ("erofs", ()),
        ("squashfs", ()),
        ("iso9660", ()),
    ],
)
def test_a_read_only_disk_is_mounted_without_recovery(
    filesystem: str, data: tuple[str, ...]
) -> None:
    """A journal cannot be replayed there, and each filesystem has its own word for that."""
    assert options.parse([], filesystem, read_only=True) == (options.MS_RDONLY, (), data)


def test_a_read_only_disk_stays_so_whatever_the_words_say() -> None:
    """`rw` does not win over the disk, and a no-recovery option is not said twice."""
    parsed = options.parse(["rw", "norecovery"], "ext4", read_only=True)
    assert parsed == (options.MS_RDONLY, (), ("norecovery",))


@pytest.mark.parametrize("word", ["bind", "rbind", "remount", "move"])
def test_what_is_not_for_disks_is_refused(word: str) -> None:
    """These change mounts that are there; on a disk they could only do harm."""
    with pytest.raises(RequestError, match=word) as caught:
        options.parse([word])
    assert caught.value.code == HResult.INVALID_ARGUMENT


def test_noacl_is_the_filesystems_word() -> None:
    """No bit takes ACLs away: one that has them always would be mounted with them, unsaid."""
    assert options.parse(["noatime", "noacl"]) == (options.MS_NOATIME, (), ("noacl",))


def test_options_that_are_no_text_are_refused() -> None:
    """JSON can say half a surrogate pair; no system call can."""
    with pytest.raises(RequestError, match="not text") as caught:
        options.parse(["\ud800"])
    assert caught.value.code == HResult.INVALID_ARGUMENT


def test_more_than_a_page_of_options_is_refused() -> None:
    """mount(2) would cut it off without a word."""
    with pytest.raises(RequestError, match="4095"):
        options.parse(["x" * 5000])


@pytest.mark.parametrize(
    ("words", "shared", "own"),
    [
        ([], [], 0),
        (["ro"], ["ro"], 0x1),
        (["nosuid", "nodev", "noexec", "nosymfollow"], [], 0x20000E),
        (["noatime", "nodiratime"], [], 0x90),
        (["strictatime"], [], 0x20),
        (["noatime", "relatime"], [], 0),
        (["sync", "dirsync", "mand", "lazytime"], ["sync", "dirsync", "mand", "lazytime"], 0),
    ],
)
def test_flags_belong_to_the_filesystem_or_to_the_mount(
    words: list[str], shared: list[str], own: int
) -> None:
    """Words for fsconfig(2), and attributes for fsmount(2); `ro` is both."""
    parsed = options.parse(words)
    assert (parsed.words, parsed.attributes) == (shared, own)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["noatime", "data=ordered"], False),
        (["acl"], True),
        (["silent"], True),
        (["silent", "loud"], False),
        (["iversion"], True),
        (["key=" + "x" * 255], False),
        (["key=" + "x" * 256], True),
        (["x" * 256], True),
    ],
)
def test_what_only_mount_can_be_told(words: list[str], needed: bool) -> None:
    """Three flags that have no word, and words that are too long for fsconfig(2)."""
    assert options.parse(words).need_mount is needed


def test_commas_divide_for_mount_only() -> None:
    """A word stays one where it can, and is refused where it cannot; quotes protect it."""
    assert options.parse(["a=b,c"]).data == ("a=b,c",)
    with pytest.raises(RequestError, match="would be two"):
        options.parse(["a=b,c", "silent"])
    assert options.parse(['context="a:b,c"', "silent"]).joined == 'context="a:b,c"'


@given(strategies.lists(sampled_from(["ro", "rw", "noatime", "atime", "a=1", "shared", ""])))
def test_any_list_of_words_is_taken(words: list[str]) -> None:
    """Whatever the order and the repeats, no word is lost: it is a bit, a call or data."""
    parsed = options.parse(words)
    assert parsed.data == tuple(word for word in words if word == "a=1")
    assert len(parsed.propagations) == words.count("shared")
