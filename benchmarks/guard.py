"""Whether ratios got worse than the committed ones: ratios, as times are the machine's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Ratios = Mapping[str, float]

TOLERANCE = 0.25
"""How much more a ratio may be, of itself, before it is worse."""


@dataclass(frozen=True)
class Noisy:
    """A ratio that is known to vary more, and why."""

    tolerance: float
    reason: str


NOISY: dict[str, dict[str, Noisy]] = {}
"""By benchmark and ratio."""


@dataclass(frozen=True)
class Finding:
    """What there is to say about one ratio.

    Args:
        is_bad: whether it is a reason to fail.
    """

    ratio: str
    said: str
    is_bad: bool = True

    def __str__(self) -> str:
        return f"{self.ratio}: {self.said}"


def check(
    committed: Ratios,
    measure: Callable[[], Ratios],
    noisy: Mapping[str, Noisy] | None = None,
    doubt: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """What differs from the committed ratios; measured once more if that looks bad.

    Of the two the lower counts: what else the machine does makes a ratio higher, and a machine
    is seldom busy twice.

    Args:
        noisy: ratios with a tolerance of their own.
        doubt: told of what looks bad before it is measured once more.
    """
    now = measure()
    findings = compare(committed, now, noisy)
    bad = [finding for finding in findings if finding.is_bad]
    if not bad:
        return findings
    for finding in bad:
        doubt(finding)
    again = measure()
    lower = {name: min(again.get(name, ratio), ratio) for name, ratio in now.items()}
    return compare(committed, {**again, **lower}, noisy)


def compare(
    committed: Ratios, now: Ratios, noisy: Mapping[str, Noisy] | None = None
) -> list[Finding]:
    """What differs, in the order of the committed ratios, new ones at the end.

    Worse and missing is bad. A new ratio is nobody's fault, and better is only news: both
    are told, so that they get committed.

    Args:
        noisy: ratios with a tolerance of their own.
    """
    findings = []
    for name, before in committed.items():
        exception = (noisy or {}).get(name)
        tolerance = exception.tolerance if exception else TOLERANCE
        if name not in now:
            findings.append(Finding(name, f"missing, was {before:.4g}"))
            continue
        change = now[name] / before - 1
        figures = f"{now[name]:.4g}, was {before:.4g} ({change:+.0%})"
        if change > tolerance:
            reason = f" ({exception.reason})" if exception else ""
            findings.append(Finding(name, f"worse: {figures}, allowed {tolerance:+.0%}{reason}"))
        elif change < -tolerance:
            findings.append(Finding(name, f"better: {figures}", is_bad=False))
    new = [name for name in now if name not in committed]
    return findings + [Finding(name, f"new: {now[name]:.4g}", is_bad=False) for name in new]
