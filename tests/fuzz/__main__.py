"""`python -m fuzz`: what scripts/fuzz runs."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from fuzz import memory, report, vm

_SEED = 1
_COUNT, _VM_COUNT = 1_000_000, 2000


def main() -> int:
    """Run what is asked for; the exit status."""
    chosen = _parser().parse_args()
    again = f"scripts/fuzz --seed {chosen.seed}{' --vm' * chosen.vm}"
    if chosen.vm:
        count = 1 if chosen.only is not None else chosen.count or _VM_COUNT
        start = chosen.start if chosen.only is None else chosen.only
        outcome = asyncio.run(vm.run(chosen.seed, start, count, talk=chosen.only is not None))
    elif chosen.only is not None:
        return 0 if memory.show(chosen.seed, chosen.only) else 1
    else:
        indices = range(chosen.start, chosen.start + (chosen.count or _COUNT))
        outcome = memory.run(chosen.seed, indices, chosen.jobs)
    print(report.text(outcome, again))
    return 0 if outcome.is_good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Inputs that no host would send, for the agent's server. Each is made from "
        "the seed and its index alone. Without --vm the agent's own code runs in a guest that is "
        "nothing but memory, whose system calls may fail; with it, the inputs go to a real agent "
        "in a VM, with disks that its requests mount.",
    )
    parser.add_argument("--seed", type=int, default=_SEED, help="of all inputs (%(default)s)")
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"how many inputs ({_COUNT:,}; {_VM_COUNT:,} with --vm)",
    )
    parser.add_argument(
        "--start", type=int, default=0, metavar="INDEX", help="the first of them (%(default)s)"
    )
    parser.add_argument(
        "--only", type=int, metavar="INDEX", help="one input, and all that is said about it"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that share the work, without --vm (%(default)s)",
    )
    parser.add_argument("--vm", action="store_true", help="a real agent in a VM")
    return parser


if __name__ == "__main__":
    sys.exit(main())
