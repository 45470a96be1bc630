"""The guard that compares the benchmarks' ratios with the committed ones, and what keeps them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import guard
import pytest
import saved
from guard import Finding, Noisy
from reporting import Report, Table
from saved import Result

if TYPE_CHECKING:
    from collections.abc import Mapping

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def told(
    committed: Mapping[str, float], *runs: Mapping[str, float], **noisy: Noisy
) -> tuple[list[str], bool]:
    """What is said when the runs find that, one after another; and whether anything is bad."""
    left = list(runs)
    findings = guard.check(committed, lambda: left.pop(0), noisy)
    assert not left
    return [str(finding) for finding in findings], any(finding.is_bad for finding in findings)


def test_nothing_is_said_about_what_is_within_the_tolerance() -> None:
    """A quarter more or less is how machines are."""
    assert told({"a": 2.0, "b": 1.0}, {"a": 2.49, "b": 0.76}) == ([], False)


def test_a_ratio_that_got_worse_twice_is_told() -> None:
    """With what it is, what it was, and what would have been allowed; the lower of two."""
    said, bad = told({"a": 2.0, "b": 1.0}, {"a": 3.2, "b": 1.0}, {"a": 3.0, "b": 1.2})
    assert bad
    assert said == ["a: worse: 3, was 2 (+50%), allowed +25%"]


def test_what_was_worse_only_once_is_not_told() -> None:
    """It is measured again before anything is said, each ratio for itself; doubt is, though."""
    runs = [{"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 2.0}]
    doubted: list[Finding] = []
    assert guard.check({"a": 1.0, "b": 1.0}, lambda: runs.pop(0), None, doubted.append) == []
    assert [finding.ratio for finding in doubted] == ["a"]


def test_a_noisier_ratio_has_its_own_tolerance_and_says_why() -> None:
    """The reason stands beside it when that was not enough."""
    noisy = Noisy(0.5, "the disk's own cache")
    assert told({"a": 1.0}, {"a": 1.4}, a=noisy) == ([], False)
    said, bad = told({"a": 1.0}, {"a": 1.6}, {"a": 1.6}, a=noisy)
    assert bad
    assert said == ["a: worse: 1.6, was 1 (+60%), allowed +50% (the disk's own cache)"]


def test_a_ratio_that_is_not_measured_any_more_is_bad() -> None:
    """Nobody gets rid of a ratio by not measuring it."""
    assert told({"a": 1.0}, {}, {}) == (["a: missing, was 1"], True)


def test_new_and_better_ratios_are_news() -> None:
    """They are told, so that they get committed, and are nobody's fault."""
    said, bad = told({"a": 2.0}, {"a": 1.0, "b": 7.0})
    assert said == ["a: better: 1, was 2 (-50%)", "b: new: 7"]
    assert not bad


def test_a_result_that_was_saved_is_the_one_that_is_read(tmp_path: Path) -> None:
    """Tables, targets, ratios and machine, so that it prints as it printed."""
    report = Report(ratios={"a": 1.25})
    report.table("a table", "disks", "ms", "floor ms").rows.append((1, 2.0, None))
    report.aim("times the floor", 1.25, 1.3)
    result = Result(report, {"python": "3.11.2", "cpus": 2, "date": "2020-02-02"})
    saved.path_of("some", tmp_path).write_text(result.to_json())
    again = saved.load("some", tmp_path)
    assert again is not None
    assert str(again.report) == str(report)
    assert again.to_json() == result.to_json()
    assert again.measured_on() == "2020-02-02 on 2 CPUs, Python 3.11.2"
    assert saved.load("other", tmp_path) is None


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_what_nothing_can_be_compared_with_is_no_ratio(ratio: float) -> None:
    """It is refused where it is read, and cannot be committed."""
    text = Result(Report(ratios={"a": ratio}), {"python": "3.11.2"}).to_json()
    with pytest.raises(ValueError, match=r"a: .* is no ratio"):
        Result.from_json(text)


def test_every_benchmark_is_run() -> None:
    """Whatever hands a report to the common command line is one of those that are listed."""
    texts = {path.stem: path.read_text() for path in BENCHMARKS.glob("*.py")}
    assert {name for name, text in texts.items() if "run(__doc__" in text} <= set(saved.BENCHMARKS)


def test_exceptions_of_the_guard_are_ratios_that_there_are() -> None:
    """A tolerance of its own is not kept for a ratio that nobody measures any more."""
    for name, noisy in guard.NOISY.items():
        kept = saved.load(name)
        assert kept is not None
        assert noisy.keys() <= kept.report.ratios.keys()


def test_a_row_of_what_is_saved_is_a_line() -> None:
    """So that a change of figures can be read; what is written in a cell stays as it is."""
    report = Report()
    report.table("[ a ]", "disks", "what").rows.append((1, "[  b ]"))
    text = Result(report, {"python": "3.11.2"}).to_json()
    assert '\n    [1, "[  b ]"]\n' in text
    assert Result.from_json(text).report == Report(
        [Table("[ a ]", ["disks", "what"], [[1, "[  b ]"]])]
    )


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("6.1.0-56-cloud-amd64 (x) #1 SMP Debian 6.1.192-2 (2020-01-01)", "6.1.192"),
        ("6.8.0-45-generic #45~22.04.1-Ubuntu SMP", "6.8.0"),
    ],
)
def test_a_kernel_is_named_by_its_number(tmp_path: Path, version: str, number: str) -> None:
    """Without what its builders add; it stands where the header of a bzImage says."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bytes(0x20E) + b"\x10\x01" + bytes(0x100) + version.encode() + b"\0more")
    assert saved.kernel_version(str(kernel)) == version
    assert saved.kernel_number(version) == number


def test_benchmarks_that_there_are_not_are_named() -> None:
    """Before anything runs, with those that there are; so are figures that are not for keeping."""
    for arguments, words in (
        (["nonsense"], "no benchmark nonsense: there are manager, "),
        (["--save", "--quick"], "not for keeping"),
    ):
        done = subprocess.run(
            [sys.executable, BENCHMARKS, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert words in done.stderr
