"""What the codes of the Host Compute Service mean, and what its error documents say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun.errors import BackendError, OutcomeUnknownError
from hotlun.hcs import results
from hotlun.hcs.results import Meaning, error_text, failure, understand

DOCUMENTED = [0x80370100 + n for n in (*range(3), *range(5, 0x20))]
"""HCS_E_*, as computecore.dll documents them."""


@pytest.mark.parametrize("code", DOCUMENTED, ids=hex)
def test_a_code_of_either_family_means_the_same(code: int) -> None:
    """And has a name, words of its own, and something to do."""
    refusal = understand(code)
    assert refusal.name.startswith("HCS_E_")
    assert refusal.words
    assert understand(code | 0x40000000) == refusal
    assert understand(code - (1 << 32)) == refusal
    text = str(failure(code))
    assert f"[{refusal.name}, 0x{code:08X}]" in text
    assert text.count("; ") >= 1


@pytest.mark.parametrize(
    ("code", "name", "meaning"),
    [
        (0x80370118, "HCS_E_OPERATION_TIMEOUT", Meaning.UNKNOWN),
        (0x80370117, "HCS_E_OPERATION_PENDING", Meaning.UNKNOWN),
        (0xC0370103, "HCS_E_OPERATION_PENDING_V1", Meaning.UNKNOWN),
        (0x8037011E, "HCS_E_SERVICE_DISCONNECT", Meaning.UNKNOWN),
        (0x80370109, "HCS_E_CONNECTION_TIMEOUT", Meaning.UNKNOWN),
        (0x8037010A, "HCS_E_CONNECTION_CLOSED", Meaning.UNKNOWN),
        (0xC0370110, "HCS_E_SYSTEM_ALREADY_STOPPED", Meaning.VM_GONE),
        (0x80370106, "HCS_E_UNEXPECTED_EXIT", Meaning.VM_GONE),
        (0xC037010E, "HCS_E_SYSTEM_NOT_FOUND", Meaning.VM_GONE),
        (0x8037010D, "HCS_E_INVALID_JSON", Meaning.REFUSED),
        (0x80070490, "ERROR_NOT_FOUND", Meaning.ABSENT),
        (0x800700B7, "ERROR_ALREADY_EXISTS", Meaning.SLOT_TAKEN),
        (0x80070020, "ERROR_SHARING_VIOLATION", Meaning.REFUSED),
        (0x80070002, "ERROR_FILE_NOT_FOUND", Meaning.MISSING),
        (0x80070005, "ERROR_ACCESS_DENIED", Meaning.REFUSED),
        (0x8007007F, "ERROR_PROC_NOT_FOUND", Meaning.NOT_HERE),
        (0x80004001, "E_NOTIMPL", Meaning.NOT_HERE),
        (0x80004005, "E_FAIL", Meaning.REFUSED),
        (0xC03A001A, "ERROR_VIRTUAL_DISK_LIMITATION", Meaning.REFUSED),
        (0xC03A0003, "an error of VHD", Meaning.REFUSED),
        (0x88888888, "an HRESULT", Meaning.REFUSED),
    ],
)
def test_what_matters_is_told_apart(code: int, name: str, meaning: Meaning) -> None:
    """By what is to be done next."""
    assert understand(code)[:2] == (name, meaning)


@pytest.mark.parametrize(
    "code",
    [
        *(0x80070079, 0x80070102, 0x800703E3, 0x800703E5, 0x800704C7, 0x800705B4),
        *(0x800706BE, 0x8007071A, 0x8007071C),
        *(0x80010002, 0x80010006, 0x80010007, 0x80010105, 0x80010108, 0x8001011F),
        *(0x8000000A, 0x80004004, 0x8000FFFF),
    ],
    ids=hex,
)
def test_a_call_that_was_cut_off_may_have_been_done(code: int) -> None:
    """Its time was over, it was given up, or who did it was lost while at it."""
    assert understand(code).name != "an HRESULT"
    error = failure(code - (1 << 32))
    assert isinstance(error, OutcomeUnknownError)
    assert "may or may not have been done" in str(error)


@pytest.mark.parametrize("code", [0x800706BA, 0x800706BF, 0x80010012], ids=hex)
def test_a_call_that_did_not_get_there_was_not_done(code: int) -> None:
    """Nobody was there to do it."""
    assert isinstance(failure(code), BackendError)


def test_other_facilities_are_not_taken_for_these() -> None:
    """The same low bits of another facility are another error."""
    assert understand(0x80390110).name == "an HRESULT"
    assert understand(0x00000490).name == "an HRESULT"


def test_the_error_has_the_code_and_the_words() -> None:
    """As people write codes, and the service's own words as the detail."""
    error = failure(0x80370105 - (1 << 32), '{"ErrorMessage":"not while it is paused"}')
    assert isinstance(error, BackendError)
    assert (error.code, error.detail) == (0x80370105, "not while it is paused")
    assert "HCS_E_INVALID_STATE, 0x80370105" in str(error)
    assert "the service says: not while it is paused" in str(error)
    assert "try again" in str(error)


def test_what_nobody_was_told_is_unknown() -> None:
    """Not a refusal."""
    assert isinstance(failure(0x8037011E), OutcomeUnknownError)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"Error": -1, "ErrorMessage": "one"}, "one"),
        (
            {"ErrorMessage": "one", "ErrorEvents": [{"Message": "two"}, {"Message": "one"}]},
            "one; two",
        ),
        ({"ErrorEvents": [{"Message": "a\r\nb", "Data": [{"Type": "x"}]}, {"EventId": 3}]}, "a b"),
        ({"Attribution": [{}], "ErrorEvents": None}, ""),
        ({"ErrorMessage": 3, "ErrorEvents": [3, None, {"Message": []}]}, ""),
        ([1, 2], ""),
        ("text", ""),
    ],
)
def test_an_error_document_is_read_leniently(document: Any, text: str) -> None:
    """Every part may be missing, or be something else."""
    assert error_text(json.dumps(document)) == text


@given(st.text() | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps))
def test_no_document_is_too_strange(document: str) -> None:
    """What cannot be read has no words."""
    assert isinstance(error_text(document), str)
    assert failure(0x80004005, document).code == 0x80004005


def test_nested_too_deep_has_no_words() -> None:
    """Python's reader gives up there."""
    assert error_text("[" * 100_000) == ""


@pytest.mark.parametrize("where", ["ErrorMessage", "Message"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("\x1b]0;root\x07\x9b2J", r"\x1b]0;root\x07\x9b2J"),
        ("a\u202eb\udc80", r"a\u202eb\udc80"),
        ("x" * 100_000, "x" * (results._MOST_TEXT - 1) + "…"),
        ("\x1b" * 100_000, r"\x1b" * ((results._MOST_TEXT - 1) // 4) + r"\x1" + "…"),
    ],
    ids=["control", "direction", "long", "longer"],
)
def test_a_guests_words_are_safe_to_show(where: str, words: str, told: str) -> None:
    """The service relays them as they are; a terminal would obey, and a log would fill."""
    document = {"ErrorEvents": [{"Message": words}] * 3} if where == "Message" else {where: words}
    error = failure(0x80004005, json.dumps(document))
    assert error.detail == told
    assert str(error).isprintable()


def test_many_words_are_as_bounded_as_one() -> None:
    """Together, not each."""
    events = [{"Message": f"{n}" * 5000} for n in range(9)]
    assert len(error_text(json.dumps({"ErrorEvents": events}))) == results._MOST_TEXT


def test_only_some_events_are_told() -> None:
    """An error is to be read by somebody."""
    events = [{"Message": f"event {n}"} for n in range(100)]
    assert error_text(json.dumps({"ErrorEvents": events})).count("event") == results._MOST_EVENTS
