"""`scripts/bench`: runs benchmarks one after another, and what is done with their figures."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path

import guard
import saved
from saved import Result

from hotlun.vm.accelerator import working_accelerator
from hotlun.vm.image import built_image

BENCHMARKS = ("manager", "attach", "guest")
FEW_RUNS = 2


class BenchmarkError(Exception):
    """A benchmark did not run to its end."""


def measured(name: str, *, quick: bool) -> Result:
    """Run one benchmark.

    Raises:
        BenchmarkError: it failed; what it said went to our standard error.
    """
    runs = ["--runs", str(FEW_RUNS)] if quick else []
    program = Path(__file__).with_name(f"{name}.py")
    print(f"bench: {name}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, program, "--json", *runs], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise BenchmarkError(f"{name}: exit status {done.returncode}")
    return Result.from_json(done.stdout)


def show(name: str, *, quick: bool) -> list[str]:
    """Run it and print its tables; nothing is wrong with any figure."""
    _print(name, measured(name, quick=quick))
    return []


def save(name: str) -> list[str]:
    """Run it, print its tables, and save all."""
    result = measured(name, quick=False)
    result.machine |= asyncio.run(_machine())
    saved.path_of(name).write_text(result.to_json())
    _print(name, result)
    return []


def check(name: str, *, quick: bool) -> list[str]:
    """Run it, once more if it looks worse, and say what got worse."""
    committed = saved.load(name)
    if committed is None:
        return [f"{name}: nothing is committed to compare with: scripts/bench --save {name}"]
    findings = guard.check(
        committed.report.ratios,
        lambda: measured(name, quick=quick).report.ratios,
        guard.NOISY.get(name),
    )
    for finding in findings:
        print(f"{name}: {finding}", flush=True)
    return [f"{name}: {finding}" for finding in findings if finding.is_bad]


def _print(name: str, result: Result) -> None:
    print(f"== {name}\n\n{result.report}\n", flush=True)


async def _machine() -> dict[str, str | int]:
    image = await built_image()
    return saved.machine_facts(image.kernel, (await working_accelerator(image)).value)


def main() -> int:
    """The exit status: 0 if every benchmark ran, and nothing that was checked got worse."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Runs benchmarks one after another, and prints their tables.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    does = parser.add_mutually_exclusive_group()
    does.add_argument(
        "--save", action="store_true", help="keep the figures in benchmarks/results, too"
    )
    does.add_argument(
        "--check",
        action="store_true",
        help="compare ratios with those kept, and exit with 1 if one got worse",
    )
    parser.add_argument("--quick", action="store_true", help=f"{FEW_RUNS} runs of everything")
    chosen = parser.parse_args()
    for name in chosen.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name}: there are {', '.join(BENCHMARKS)}")
    if chosen.save and chosen.quick:
        parser.error("figures of --quick are not for keeping")

    bad: list[str] = []
    for name in chosen.names or BENCHMARKS:
        try:
            if chosen.save:
                bad += save(name)
            elif chosen.check:
                bad += check(name, quick=chosen.quick)
            else:
                bad += show(name, quick=chosen.quick)
        except BenchmarkError as error:
            bad.append(str(error))
    if bad:
        print("\n".join(["worse or broken:", *(f"  {line}" for line in bad)]), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
