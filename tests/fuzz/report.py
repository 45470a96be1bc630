"""What a run came to, in lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fuzz.target import shape

if TYPE_CHECKING:
    import collections

    from fuzz.target import Figures

_KINDS = 12


class Failure(NamedTuple):
    """An input that was not served as it should be."""

    number: int
    wrong: list[str]


class Outcome(NamedTuple):
    """Of a run, or of a part of it in a process of its own."""

    figures: Figures
    failures: list[Failure]
    """The first of each kind."""
    failed: int
    grown: list[str]
    sizes: list[str]
    seconds: float

    @classmethod
    def all_of(cls, parts: list[Outcome]) -> Outcome:
        """Of parts that ran at the same time."""
        figures = parts[0].figures
        for part in parts[1:]:
            figures.add(part.figures)
        return cls(
            figures,
            sorted(failure for part in parts for failure in part.failures),
            sum(part.failed for part in parts),
            [line for part in parts for line in part.grown],
            [line for part in parts for line in part.sizes],
            max(part.seconds for part in parts),
        )

    @property
    def is_good(self) -> bool:
        return not self.failed and not self.grown


def text(outcome: Outcome, again: str) -> str:
    """The report.

    Args:
        again: the command that makes an input once more, less its index.
    """
    figures = outcome.figures
    share = 100 / max(1, figures.inputs)
    lines = [
        (
            f"{figures.inputs} inputs in {outcome.seconds:.1f} s, "
            f"{figures.inputs / max(outcome.seconds, 1e-9):.0f} a second"
        ),
        (
            f"{figures.reached * share:.0f} % reached a disk, {figures.dropped * share:.0f} % "
            f"hung up early, in {figures.faulted * share:.0f} % a system call failed as scripted"
        ),
        "verbs: " + _counts(figures.verbs),
        "answers: " + _counts(figures.codes),
        f"refusals of {len(figures.refusals)} kinds, among them: ",
        *(f"    {times:7} {kind}" for kind, times in figures.refusals.most_common(_KINDS)),
    ]
    if figures.escaped:
        lines.append(
            f"{figures.escaped.total()} scripted failures were answered without words of ours, "
            "from " + _counts(figures.escaped)
        )
    lines += [f"size {line}" for line in outcome.sizes]
    for failure in _different(outcome.failures):
        lines += [f"FAILED: input {failure.number}; again: {again} --only {failure.number}"]
        lines += [f"    {line}" for what in failure.wrong for line in what.splitlines()[-30:]]
    lines += [f"GROWN: {line}" for line in outcome.grown]
    lines.append("good" if outcome.is_good else f"{outcome.failed} inputs failed")
    return "\n".join(lines)


def _different(failures: list[Failure]) -> list[Failure]:
    """The first of those that look alike."""
    seen = {shape(failure.wrong[0].strip().splitlines()[-1]): failure for failure in failures[::-1]}
    return sorted(seen.values())[:_KINDS]


def _counts(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{name} {times}" for name, times in counter.most_common())
