"""What a guest's answer means, whoever has carried it."""

from __future__ import annotations

import pytest

from hotlun import Attachment, Disk, DiskKind, Slot
from hotlun.backends.answers import judge
from hotlun.bridge.codes import HResult
from hotlun.errors import BackendError, HotlunError, OutcomeUnknownError, WrongKeyError

DISK = Disk("/d.img", DiskKind.VIRTUAL_DISK)
ATTACHMENT = Attachment(Slot(1, 2), DISK, "h1")


def judged(code: int, text: str = "so it is", operation: str = "mount") -> HotlunError:
    return judge(operation, ATTACHMENT, " at '/m'", code, text)


def test_it_tells_of_disk_slot_and_path() -> None:
    """And has the guest's code and words."""
    error = judged(HResult.FAIL)
    assert (error.operation, error.slot, error.disk) == ("mount", Slot(1, 2), DISK)
    assert (error.code, error.detail) == (HResult.FAIL, "so it is")
    assert str(error) == (
        "the guest did not mount /d.img (slot 1:2) at '/m': so it is [0x80004005 (FAIL)]; "
        "check partition, filesystem and options; the guest's kernel log may say more"
    )


@pytest.mark.parametrize(
    ("code", "operation", "kind"),
    [
        (HResult.FAIL, "mount", BackendError),
        (HResult.WRONG_KEY, "mount", WrongKeyError),
        (HResult.TIMEOUT, "mount", BackendError),
        (HResult.TIMEOUT, "unmount", OutcomeUnknownError),
        (HResult.TIMEOUT, "unplug", OutcomeUnknownError),
        (0x80370109, "unplug", OutcomeUnknownError),
        (1, "unmount", OutcomeUnknownError),
    ],
)
def test_what_was_not_done_is_told_from_what_is_unknown(
    code: int, operation: str, kind: type[HotlunError]
) -> None:
    """A code without the sign of failure says neither; who was told to let go may yet do so."""
    assert type(judged(code, operation=operation)) is kind


@pytest.mark.parametrize(
    ("one", "other"), [(0xC037010D, 0x8037010D), (0x80370105, 0xC0370105), (0xC037010B, 0x8037010B)]
)
def test_both_families_have_the_same_advice(one: int, other: int) -> None:
    """They differ in a bit."""
    assert str(judged(one)).rsplit("; ", 1)[1] == str(judged(other)).rsplit("; ", 1)[1]
    assert "kernel log" not in str(judged(other))


def test_a_code_of_another_facility_is_another_one() -> None:
    """With the same low bits."""
    assert "kernel log" in str(judged(0x8031010D))


def test_without_words_it_says_so() -> None:
    """The code is there still."""
    assert "no reason given [" in str(judged(HResult.FAIL, ""))
