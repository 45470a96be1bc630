"""Serials are read with suspicion: a disk can say anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun.agent.kernel import Kernel
from hotlun.agent.vpd import Identity, designated_serial, serial_number

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("page", "serial"),
    [
        (b"\0\x80\0\x04d0x3", "d0x3"),  # as QEMU 7.2 has it
        (b"\0\x80\0\x08  d0x3  ", "d0x3"),
        (b"\0\x80\0\x08d0x3\0\0\0\0", "d0x3"),
        (b"\0\x80\0\x04d0x3 and what follows", "d0x3"),
        (b"\0\x80\0\x00", ""),
        (b"\0\x80\0\x05d0x3", ""),  # cut off
        (b"\0\x80\xff\xffd0x3", ""),
        (b"\0\x83\0\x04d0x3", ""),  # another page
        (b"\0\x80\0\x04d0x\xb3", ""),  # no ASCII
        (b"\0\x80\0\x04d\n\x1b3", ""),  # not printable
        (b"\0\x80\0", ""),
        (b"", ""),
    ],
)
def test_a_serial_is_all_there_and_text_or_it_is_none(page: bytes, serial: str) -> None:
    """Without what it is padded with."""
    assert serial_number(page) == serial


@pytest.mark.parametrize(
    ("page", "serial"),
    [
        (b"\0\x83\0\x08\x02\0\0\x04d0x3", "d0x3"),  # as QEMU 7.2 has it
        (b"\0\x83\0\x14\x01\x03\0\x08NAA12345\x02\0\0\x04d0x3", "d0x3"),  # the second
        (b"\0\x83\0\x08\x02\x01\0\x04d0x3", ""),  # of another type
        (b"\0\x83\0\x08\x02\x10\0\x04d0x3", ""),  # of the port
        (b"\0\x83\0\x08\x01\0\0\x04d0x3", ""),  # binary
        (b"\0\x83\0\x08\x02\0\0\x05d0x3", ""),  # cut off
        (b"\0\x83\0\x03\x02\0\0", ""),
        (b"\0\x80\0\x08\x02\0\0\x04d0x3", ""),
    ],
)
def test_a_serial_is_found_among_the_designators(page: bytes, serial: str) -> None:
    """The vendor's own one of the disk itself, in ASCII."""
    assert designated_serial(page) == serial


@given(st.binary(max_size=600), st.sampled_from([b"", b"\0\x80", b"\0\x83", b"\0\x83\0\x20"]))
def test_no_page_is_too_strange(page: bytes, start: bytes) -> None:
    """Whatever it is, what is read is printable."""
    for serial in (serial_number(start + page), designated_serial(start + page)):
        assert serial == "" or (serial.isascii() and serial.isprintable())


def test_what_a_disk_is_known_by_is_what_the_kernel_kept(tmp_path: Path) -> None:
    """Its page 0x80, else 0x83, and its size in sectors of 512 bytes."""
    kernel = Kernel()
    disk = tmp_path / "block/sda"
    disk.mkdir(parents=True)
    where = (kernel, str(tmp_path), str(disk))
    assert Identity.read(*where) == Identity("", None)
    (disk / "size").write_text("3\n")
    assert Identity.read(*where) == Identity("", 1536)
    (tmp_path / "vpd_pg83").write_bytes(b"\0\x83\0\x08\x02\0\0\x04d083")
    assert Identity.read(*where) == Identity("d083", 1536)
    (tmp_path / "vpd_pg80").write_bytes(b"\0\x80\0\x04d080")
    assert Identity.read(*where) == Identity("d080", 1536)


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        (Identity("a", 1), Identity("a", 1), ""),
        (Identity("a", 1), Identity("a"), ""),
        (Identity("a", 1), Identity(size=1), ""),
        (Identity("", None), Identity(), ""),
        (Identity("a", 1), Identity("b", 1), "its serial is 'a', not 'b'"),
        (Identity("a", 4096), Identity("a", 8192), "its size is 4,096 bytes, not 8,192"),
        (Identity("a", None), Identity("a", 8192), "its size is not known, not 8,192"),
        (Identity("a", 0), Identity("a", 1), "its size is 0 bytes, not 1"),
        (Identity(""), Identity("b"), "its serial is not known to this guest's kernel, not 'b'"),
        (
            Identity("a", 1),
            Identity("b", 2),
            "its serial is 'a', not 'b' and its size is 1 bytes, not 2",
        ),
    ],
)
def test_what_differs_is_said(found: Identity, wanted: Identity, words: str) -> None:
    """And what is not asked does not count."""
    assert found.against(wanted) == words
    assert found.is_proof_of(wanted) == (words == "")
