"""The fuzz against the server in the guest that is in memory, in as many processes as wanted."""

from __future__ import annotations

import concurrent.futures
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from typing import Self

from fuzz import guard
from fuzz.growth import Size
from fuzz.guest.machine import PROFILE
from fuzz.inputs import Input, make
from fuzz.report import Failure, Outcome
from fuzz.target import Target

_WARM_UP = 2000
"""Inputs, or a fifth of them all, after which nothing is to grow any more."""
_SHOWN = 20
_STILL = 120.0
"""Seconds without a next input after which the process is taken to hang."""


def run(seed: int, indices: range, jobs: int) -> Outcome:
    """All of these inputs.

    Args:
        jobs: processes to share them.
    """
    if jobs == 1:
        return _part(seed, indices)
    parts = [indices[job::jobs] for job in range(jobs)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        return Outcome.all_of([*pool.map(_part, [seed] * jobs, parts)])


def show(seed: int, index: int) -> bool:
    """One input: what is written, what the agent says, what is answered; whether all is well."""
    target = Target()
    given = make(seed, index, PROFILE)
    print(_described(given))
    with guard.kept(), target.listening():
        wrong = target.feed(given)
    print("the agent's log:", *target.lines, sep="\n    ")
    print(f"the answers: {target.answers!r}")
    print("\n".join(wrong) or "good")
    return not wrong


def _described(given: Input) -> str:
    how = ["by a socket"] if given.by_socket else []
    how += ["hanging up at once"] if given.drops else []
    how += [f"system call {number} fails: {os.strerror(e)}" for number, e in given.faults.items()]
    return f"{len(given.writes)} writes {', '.join(how)}: {given.data!r}"


def _part(seed: int, indices: range) -> Outcome:
    target = Target()
    failures: list[Failure] = []
    failed = 0
    start = time.monotonic()
    warm_up = min(_WARM_UP, len(indices) // 5)
    before = Size.now()
    with guard.kept(), target.listening(), _Watch() as watch:
        for number, index in enumerate(indices):
            if number == warm_up:
                before = Size.now()
            watch.index = index
            wrong = target.feed(make(seed, index, PROFILE))
            if wrong:
                failed += 1
                if failed <= _SHOWN:
                    failures.append(Failure(index, wrong))
    after = Size.now()
    return Outcome(
        target.figures,
        failures,
        failed,
        after.grown(before) if len(indices) >= _WARM_UP else [],
        [f"after {warm_up} inputs: {before}; at the end: {after}"],
        time.monotonic() - start,
    )


class _Watch:
    """Ends a process that hangs, telling at which input and where."""

    def __init__(self) -> None:
        self.index = -1
        self._over = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        seen = None
        while not self._over.wait(_STILL):
            if self.index == seen:
                print(f"input {self.index} does not end", file=sys.stderr)
                faulthandler.dump_traceback()
                os._exit(3)
            seen = self.index
