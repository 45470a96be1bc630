"""The command `hotlun`: the only place that prints, exits, or explains with a hint.

Commands import what they need when they run, so that `--help` and the shell's
completion do not wait for what they do not use.
"""

from __future__ import annotations

from typing import Any

import click

from hotlun.cli.agent import agent
from hotlun.cli.demo import demo
from hotlun.cli.failures import translated
from hotlun.cli.journal import journal
from hotlun.cli.logs import debug_option
from hotlun.cli.vm import vm


class _Commands(click.Group):
    """Errors of any command become words and an exit code here, and nowhere else."""

    def invoke(self, ctx: click.Context) -> Any:
        with translated(ctx):
            return super().invoke(ctx)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with 'hotlun demo': it shows in a few seconds what this is about.",
)
@click.version_option(package_name="hotlun", prog_name="hotlun")
@debug_option
def main() -> None:
    """Hot-plugged disks for running VMs: attached, mounted, shared, and taken away again.

    hotlun is a library first. This command shows it at work (demo), keeps small
    VMs to try it on (vm), builds the program that a guest of your own needs
    (agent), and shows what a VM's journal says (journal).

    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted with Ctrl-C.
    """


main.add_command(demo)
main.add_command(vm)
main.add_command(agent)
main.add_command(journal)
