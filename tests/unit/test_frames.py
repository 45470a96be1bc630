"""Framing: any bytes, split anywhere, become the same frames or the same error."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun.bridge.frames import DEFAULT_LIMIT, Frame, FrameDecoder, FrameError, encode

FRAMES = st.builds(
    Frame,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=200),
)


def outcome(decoder: FrameDecoder, pieces: list[bytes]) -> tuple[list[Frame], str]:
    frames: list[Frame] = []
    try:
        for piece in pieces:
            frames += decoder.feed(piece)
    except FrameError as error:
        return frames + list(error.frames), str(error)
    return frames, ""


def test_header_is_little_endian_and_counts_itself() -> None:
    """Type, size with the header, id; then the payload as it is."""
    data = encode(Frame(0x10100A01, 1, b"x" * 245))
    assert data[:16].hex(" ") == "01 0a 10 10 05 01 00 00 01 00 00 00 00 00 00 00"
    assert data[16:] == b"x" * 245


@pytest.mark.parametrize(
    "frame", [Frame(1 << 32, 0, b""), Frame(0, 1 << 64, b""), Frame(0, -1, b"")]
)
def test_number_that_does_not_fit_is_an_error(frame: Frame) -> None:
    """Nothing is cut off to make it fit."""
    with pytest.raises(FrameError, match="no frame has type"):
        encode(frame)


def test_frame_may_be_empty() -> None:
    """Sixteen bytes are a frame."""
    frame = Frame(7, 8, b"")
    assert FrameDecoder().feed(encode(frame)) == [frame]


def test_trailing_data_waits_for_its_rest() -> None:
    """A frame and a half give one frame; the other half gives the other."""
    first, second = Frame(1, 1, b"first"), Frame(2, 2, b"second")
    data = encode(first) + encode(second)
    decoder = FrameDecoder()
    assert decoder.feed(data[:30]) == [first]
    assert decoder.pending == 9
    assert decoder.feed(data[30:]) == [second]
    assert decoder.pending == 0


@given(frames=st.lists(FRAMES, max_size=5), cuts=st.lists(st.integers(0, 1200), max_size=12))
def test_split_makes_no_difference(frames: list[Frame], cuts: list[int]) -> None:
    """Whatever pieces the bytes come in, the frames are those that were encoded."""
    data = b"".join(map(encode, frames))
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[begin:end] for begin, end in itertools.pairwise(places)]
    assert outcome(FrameDecoder(), pieces) == (frames, "")


@given(frames=st.lists(FRAMES, min_size=1, max_size=3))
def test_byte_by_byte(frames: list[Frame]) -> None:
    """One byte at a time gives the same frames."""
    data = b"".join(map(encode, frames))
    assert outcome(FrameDecoder(), [data[i : i + 1] for i in range(len(data))]) == (frames, "")


@given(garbage=st.binary(max_size=400), cut=st.integers(0, 400))
def test_garbage_is_the_same_garbage_however_split(garbage: bytes, cut: int) -> None:
    """No bytes make the decoder do anything but give frames or its own error."""
    whole = outcome(FrameDecoder(limit=1 << 16), [garbage])
    assert outcome(FrameDecoder(limit=1 << 16), [garbage[:cut], garbage[cut:]]) == whole
    single = [garbage[i : i + 1] for i in range(len(garbage))]
    assert outcome(FrameDecoder(limit=1 << 16), single) == whole


@pytest.mark.parametrize("size", [0, 1, 15, DEFAULT_LIMIT + 1, 0xFFFFFFFF])
def test_size_that_cannot_be_is_refused_by_the_header_alone(size: int) -> None:
    """Below 16 or above the limit: an error before any payload is waited for."""
    with pytest.raises(FrameError, match=f"claims {size} bytes"):
        FrameDecoder().feed(struct.pack("<IIQ", 0x20100A01, size, 3))


def test_largest_frame_is_accepted() -> None:
    """The limit itself is inside."""
    frame = Frame(1, 1, b"x" * (100 - 16))
    assert FrameDecoder(limit=100).feed(encode(frame)) == [frame]
    with pytest.raises(FrameError):
        FrameDecoder(limit=99).feed(encode(frame))


def test_error_carries_the_frames_before_it() -> None:
    """What came whole before the bad frame is not lost."""
    good = Frame(1, 2, b"good")
    with pytest.raises(FrameError) as caught:
        FrameDecoder().feed(encode(good) + bytes(16))
    assert caught.value.frames == (good,)


def test_broken_decoder_stays_broken() -> None:
    """After one bad size nothing is believed any more, and nothing is kept."""
    decoder = FrameDecoder()
    with pytest.raises(FrameError):
        decoder.feed(bytes(16) + b"x" * 1000)
    assert decoder.pending == 0
    with pytest.raises(FrameError, match="claims 0 bytes") as caught:
        decoder.feed(encode(Frame(1, 1, b"")))
    assert caught.value.frames == ()


def test_large_frame_in_small_pieces_is_linear() -> None:
    """Four MiB in 64-byte pieces, and a hundred thousand frames at once, are no burden."""
    frame = Frame(1, 1, b"x" * (DEFAULT_LIMIT - 16))
    data = encode(frame)
    pieces = [data[i : i + 64] for i in range(0, len(data), 64)]
    assert outcome(FrameDecoder(), pieces) == ([frame], "")
    small = Frame(1, 1, b"0123456789")
    assert len(FrameDecoder().feed(encode(small) * 100_000)) == 100_000


@given(
    stale=st.binary(max_size=300),
    frame=FRAMES,
    after=st.lists(FRAMES, max_size=2),
    cut=st.integers(0, 600),
)
def test_synchronising_drops_what_comes_before(
    stale: bytes, frame: Frame, after: list[Frame], cut: int
) -> None:
    """The frame looked for is found behind the rest of any other frame, and all after it."""
    first = Frame(0x20100B01, 0x1234567890ABCDEF, frame.payload)
    data = stale + b"".join(map(encode, [first, *after]))
    decoder = FrameDecoder(sync_on=(first.type, first.id))
    assert outcome(decoder, [data[:cut], data[cut:]]) == ([first, *after], "")
    assert decoder.skipped == len(stale)


def test_synchronising_holds_no_more_than_a_header() -> None:
    """Stale bytes are not collected while the frame looked for does not come."""
    decoder = FrameDecoder(sync_on=(0x20100B01, 7))
    for _ in range(100):
        assert decoder.feed(b"\x01\x0b\x10" * 1000) == []
    assert decoder.pending == 15
    assert decoder.skipped == 300_000 - 15


def test_synchronising_byte_by_byte() -> None:
    """A greeting of somebody else, with another id, is not the one looked for."""
    greeting, other = Frame(0x20100B01, 99, b"{}"), Frame(0x20100B01, 98, b'{"a":"b"}')
    decoder = FrameDecoder(sync_on=(0x20100B01, 99))
    data = encode(other)[5:] + encode(other) + encode(greeting) + encode(other)
    assert outcome(decoder, [data[i : i + 1] for i in range(len(data))]) == ([greeting, other], "")
