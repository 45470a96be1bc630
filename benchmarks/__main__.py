"""`scripts/bench`: runs benchmarks one after another, and what is done with their figures."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path

import guard
import page
import plot
import saved
from saved import BENCHMARKS, Result

from hotlun.vm.accelerator import working_accelerator
from hotlun.vm.image import built_image

ROOT = Path(__file__).parent.parent
FEW_RUNS = 2
BY_PYTHON = ("manager",)
"""Benchmarks that have a table by interpreter."""


class BenchmarkError(Exception):
    """A benchmark did not run to its end."""


def measure(name: str, *arguments: str) -> Result:
    """Run one benchmark.

    Raises:
        BenchmarkError: it failed; what it said went to our standard error.
    """
    print(f"bench: {name}", file=sys.stderr, flush=True)
    program = ROOT / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, program, "--json", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"{name}: exit status {done.returncode}")
    return Result.from_json(done.stdout)


def show(name: str, *arguments: str) -> Result:
    """Run it, and print its tables."""
    result = measure(name, *arguments)
    print(f"== {name}\n\n{result.report}\n", flush=True)
    return result


def save(name: str, folder: Path) -> None:
    """Run it, print its tables, and keep all; by later Pythons, too, where it can."""
    result = show(name, *(later_pythons() if name in BY_PYTHON else ()))
    result.machine |= asyncio.run(_machine())
    folder.mkdir(exist_ok=True)
    saved.path_of(name, folder).write_text(result.to_json())


def check(name: str, *arguments: str) -> list[str]:
    """Run it, print what differs from what is kept, and return what got worse."""
    kept = saved.load(name)
    if kept is None:
        return [f"{name}: nothing is kept to compare with"]
    findings = guard.check(
        kept.report.ratios,
        lambda: measure(name, *arguments).report.ratios,
        guard.NOISY.get(name),
        lambda finding: print(f"bench: once more for {finding}", file=sys.stderr),
    )
    said = [f"  {finding}" for finding in findings] or ["  as it was"]
    print(name, *said, sep="\n", flush=True)
    return [f"{name}: {finding}" for finding in findings if finding.is_bad]


def later_pythons() -> list[str]:
    """Arguments for those that can be had; scripts/other-pythons tells of others."""
    script = ROOT / "scripts" / "other-pythons"
    done = subprocess.run([str(script)], stdout=subprocess.PIPE, text=True, check=False)
    return [argument for path in done.stdout.split() for argument in ("--python", path)]


async def _machine() -> dict[str, str | int]:
    image = await built_image()
    return saved.machine_facts(image.kernel, (await working_accelerator(image)).value)


def _parser() -> argparse.ArgumentParser:
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
        help="compare ratios with those that are kept, and exit with 1 if one got worse",
    )
    does.add_argument(
        "--doc",
        action="store_true",
        help="run nothing: write the tables and pictures of docs/performance.md anew",
    )
    parser.add_argument(
        "--as",
        default="",
        dest="folder",
        metavar="FOLDER",
        help=f"with --save: in this folder there, as `{page.BEFORE}`, which --doc compares with",
    )
    parser.add_argument("--quick", action="store_true", help=f"{FEW_RUNS} runs of everything")
    return parser


def main() -> int:
    """The exit status: 0 if every benchmark ran, and nothing that was checked got worse."""
    parser = _parser()
    chosen = parser.parse_args()
    for name in chosen.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name}: there are {', '.join(BENCHMARKS)}")
    if chosen.save and chosen.quick:
        parser.error("figures of --quick are not for keeping")
    if chosen.doc:
        page.write()
        plot.draw_all()
        return 0
    runs = ["--runs", str(FEW_RUNS)] if chosen.quick else []
    bad: list[str] = []
    for name in chosen.names or BENCHMARKS:
        try:
            if chosen.save:
                save(name, saved.RESULTS / chosen.folder)
            elif chosen.check:
                bad += check(name, *runs)
            else:
                show(name, *runs)
        except BenchmarkError as error:
            bad.append(str(error))
    if bad:
        print("worse, or broken:", *(f"  {line}" for line in bad), sep="\n", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
