"""What came out: counted, and printed as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotlun import Disagreement


@dataclass
class Figures:
    """Of one kind of torture."""

    title: str
    rounds: int = 0
    failures: list[str] = field(default_factory=list)
    """What was not as it must be, with what it takes to have it again."""
    points: Counter[str] = field(default_factory=Counter)
    """Where it was killed, or what happened to it."""
    disagreements: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    """How long settling and draining took, each time."""

    def met(self, disagreement: Disagreement) -> None:
        """One more disagreement that was settled."""
        self.disagreements[f"{disagreement.finding}: {disagreement.resolution}"] += 1

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield f"{self.title}: {self.rounds} rounds, {len(self.failures)} failed"
        for what, count in sorted(self.points.items()):
            yield f"  {count:6} {what}"
        if self.disagreements:
            yield f"  {self.disagreements.total()} disagreements:"
        for what, count in self.disagreements.most_common():
            yield f"  {count:6} {what}"
        if self.seconds:
            yield (
                f"  settled and drained in {statistics.median(self.seconds):.2f} s (median), "
                f"{max(self.seconds):.2f} s at most"
            )
        for failure in self.failures:
            yield f"  FAILED {failure}"
