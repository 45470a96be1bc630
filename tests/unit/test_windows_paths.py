r"""Paths as Windows reads them, on any system."""

from __future__ import annotations

import ntpath
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotlun import windows_paths
from hotlun.windows_paths import fold, parse, upper

NAMES = st.text(
    st.sampled_from("abAB09 .-_~$äÄßſıK" + "ß" + "𐐨"),  # noqa: RUF001 - letters that fold oddly
    min_size=1,
    max_size=6,
).filter(lambda name: name == name.rstrip(". ") and name.strip(". ") != "")
DRIVES = st.sampled_from(string.ascii_uppercase)
PATHS = st.lists(NAMES, min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (r"c:\a\B", r"C:\A\B"),
        (r"\\?\c:\a", r"C:\A"),
        (r"\\.\c:\a", r"C:\A"),
        ("//./c:/a", r"C:\A"),
        (r"\\server\share\a", r"UNC\SERVER\SHARE\A"),
        (r"\\?\unc\server\share\a", r"UNC\SERVER\SHARE\A"),
        (r"\\.\UNC\server\share\a", r"UNC\SERVER\SHARE\A"),
        (r"\\.\PhysicalDrive2", "PHYSICALDRIVE2"),
        (r"\\?\Volume{0a}\a", r"VOLUME{0A}\A"),
        ("c:\\", "C:\\"),
        (r"C:\a\..\..\b", r"C:\B"),
        (r"\\server\share\..\..\a", r"UNC\SERVER\SHARE\A"),
        (r"C:\a.\b. .", r"C:\A\B"),
        (r"C:\a..\...\b", r"C:\A..\...\B"),
        (r"C:\a \b ", r"C:\A \B"),
        ("C:\\a \\", r"C:\A "),
        (r"\\?\C:\a.\b. ", r"C:\A.\B. "),
        (r"//?/C:/a.", r"C:\A"),
        (r"\\.\PhysicalDrive2.", "PHYSICALDRIVE2"),
        ("/tmp/a", r"\TMP\A"),
    ],
)
def test_what_spellings_have_in_common(path: str, key: str) -> None:
    """The name in NT's folder of devices, in upper case."""
    assert fold(path) == key


def test_a_volume_is_not_its_root() -> None:
    r"""`\\.\C:` is a block device, `\\.\C:\` a folder."""
    assert fold(r"\\.\C:") != fold("\\\\.\\C:\\") == fold("C:\\")


@pytest.mark.parametrize(
    ("lower", "key"),
    [
        ("straße", "STRAßE"),
        ("ä", "Ä"),
        ("ÿ", "Ÿ"),
        ("ı", "ı"),  # noqa: RUF001 - dotless
        ("µ", "µ"),
        ("ᾳ", "ᾼ"),
        ("ǆ", "Ǆ"),
        ("ǅ", "ǅ"),
        ("𐐨", "𐐨"),
    ],
)
def test_case_is_the_file_systems(lower: str, key: str) -> None:
    """Character by character, as its table has it: a name keeps its length."""
    assert upper(lower) == key


def test_letters_of_one_key_are_of_one_letter() -> None:
    """Of the whole BMP, each upper case is its own, and has its length."""
    for code in range(0x10000):
        one = upper(chr(code))
        assert len(one) == 1
        assert upper(one) == one
        assert one == chr(code) or one.lower() == chr(code)


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\\/.:? aUNC")))
def test_folding_twice_is_folding_once(text: str) -> None:
    """Of anything that begins like a path."""
    for start in ("C:\\", "\\\\server\\share\\", "\\\\?\\C:\\", "\\\\.\\"):
        key = fold(start + text)
        again = fold(f"\\\\?\\{key}")
        assert again == key


@given(DRIVES, PATHS, st.data())
def test_equivalent_spellings_fold_alike(drive: str, names: list[str], data: st.DataObject) -> None:
    """Case, separators, prefixes, and what stands for nothing."""
    plain = f"{drive}:\\" + "\\".join(names)
    text = data.draw(st.sampled_from(["", "\\\\?\\", "\\\\.\\"]))
    is_verbatim = text == "\\\\?\\"
    text += data.draw(st.sampled_from([drive, drive.lower()])) + ":"
    for name in names:
        noise = st.sampled_from(["\\", "\\\\"] if is_verbatim else ["\\", "/", "\\.\\", "/x/../"])
        text += data.draw(noise)
        text += data.draw(st.sampled_from([name, upper(name)]))
    if not is_verbatim:
        text += data.draw(st.sampled_from(["", "\\", ".", " ", ". ."]))
    assert fold(text) == fold(plain)


@given(DRIVES, DRIVES, PATHS, PATHS)
def test_different_drives_never_fold_alike(
    one: str, two: str, some: list[str], others: list[str]
) -> None:
    """Whatever follows, and neither do drives and shares."""
    first = f"{one}:\\" + "\\".join(some)
    second = f"{two}:\\" + "\\".join(others)
    if one != two:
        assert fold(first) != fold(second)
    assert fold(first) != fold("\\\\" + "\\".join(("s", "h", *others)))


@given(DRIVES, PATHS)
def test_what_is_spelt_is_read_again(drive: str, names: list[str]) -> None:
    """And is one path to Python's own rules, too."""
    for start in (f"{drive}:", "\\\\server\\share", f"\\\\?\\{drive}:", "\\\\?\\UNC\\s\\h"):
        path = start + "\\" + "\\".join(names)
        assert str(parse(path)) == path
        assert ntpath.isabs(path)


def test_a_current_folder_on_a_share() -> None:
    """What is rooted is the share's."""
    at = {".": r"\\server\share\dir"}.__getitem__
    assert windows_paths.absolute(r"\a", at) == r"\\server\share\a"
    assert windows_paths.absolute(r"..\a", at) == r"\\server\share\a"
    assert windows_paths.absolute("a", at) == r"\\server\share\dir\a"
