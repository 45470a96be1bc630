#!/usr/bin/env python3
"""What starting takes: `import hotlun`, `hotlun --help`, and the agent in its guest.

    .venv/bin/python benchmarks/start.py [--json] [--runs N] [--no-guest]

Each row is the life of whole processes, fresh ones in turns, with compiled modules in a cache of
their own. `import hotlun` and all its names have as their floor `import asyncio`, which nobody
does without who uses a Manager; `hotlun --help` has `import click`. What a module takes is told by
`python -X importtime -c 'import asyncio; from hotlun import *'`.

In the guest a second agent is started at a unix socket, by `start_in_guest.py`: from its fork to
its answer to Negotiate. Its floor is a Python that does nothing at all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from reporting import Report, arguments, in_turn, medians, run

from hotlun.vm import Machine

if TYPE_CHECKING:
    import argparse

RUNS, IN_GUEST_RUNS = 41, 15
IN_GUEST = Path(__file__).with_name("start_in_guest.py")
IN_GUEST_TIMEOUT = 300.0

PYTHON, ASYNCIO, CLICK = "python", "import asyncio", "import click"
HOTLUN, NAMES, HELP = "import hotlun", "from hotlun import *", "hotlun --help"
PROGRAMS = {
    PYTHON: "",
    ASYNCIO: "import asyncio",
    HOTLUN: "import asyncio, hotlun",
    NAMES: "import asyncio; from hotlun import *",
    CLICK: "import click",
    HELP: "from hotlun.cli import main; main(['--help'], 'hotlun')",
}
FLOORS = {HOTLUN: ASYNCIO, NAMES: ASYNCIO, HELP: CLICK}
AGENT, BARE = "agent, until it answers", "python3 -I -c ''"


async def measure(chosen: argparse.Namespace) -> Report:
    report = Report()
    await _on_host(report, chosen.runs or RUNS)
    if not chosen.no_guest:
        await _in_guest(report, chosen.runs or IN_GUEST_RUNS)
    return report


async def _on_host(report: Report, runs: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def timed(name: str) -> float:
            """Milliseconds from a process' start to its end."""
            command = [sys.executable, "-c", PROGRAMS[name]]
            begin = time.perf_counter()
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            return (time.perf_counter() - begin) * 1e3

        async def life(name: str) -> float:
            return timed(name)

        for name in PROGRAMS:  # compiles
            timed(name)
        works = {name: lambda name=name: life(name) for name in PROGRAMS}
        took = medians(await in_turn(runs, **works))
    table = report.table("a process on the host", "", "ms", "floor ms", "over it", "ratio")
    for name, ms in took.items():
        if name in FLOORS:
            floor = took[FLOORS[name]]
            report.ratios[name] = round(ms / floor, 3)
            table.rows.append((name, ms, floor, ms - floor, ms / floor))
        else:
            table.rows.append((name, ms, None, None, None))
    report.aim("all names of hotlun over import asyncio, ms", took[NAMES] - took[ASYNCIO], 30)
    report.aim("hotlun --help, ms", took[HELP], 250)


async def _in_guest(report: Report, runs: int) -> None:
    async with Machine.start() as vm:
        done = await vm.run(
            f"set -e\ncat >/run/{IN_GUEST.name} <<'END'\n{IN_GUEST.read_text()}\nEND\n"
            f"python3 -I /run/{IN_GUEST.name} /run/hotlun/agent.pyz {runs}",
            timeout=IN_GUEST_TIMEOUT,
        )
    if done.returncode:
        raise RuntimeError(f"in the guest: {done.stdout}{done.stderr}")
    took = medians(json.loads(done.stdout))
    agent, bare = took["agent"] * 1e3, took["python"] * 1e3
    table = report.table("a process in the guest", "", "ms", "floor ms", "over it", "ratio")
    table.rows.append((BARE, bare, None, None, None))
    table.rows.append((AGENT, agent, bare, agent - bare, agent / bare))
    report.ratios[AGENT] = round(agent / bare, 3)
    report.aim("the agent from its fork to its first answer, s", agent / 1e3, 0.5)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument(
        "--runs", type=int, help=f"in place of {RUNS}, in the guest {IN_GUEST_RUNS}"
    )
    parser.add_argument("--no-guest", action="store_true", help="what needs no VM")
    run(__doc__, measure, parser)
