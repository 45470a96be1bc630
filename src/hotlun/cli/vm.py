"""`hotlun vm`: small VMs to try things on, which run until they are stopped."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from hotlun.cli.logs import debug_option
from hotlun.cli.running import check_qemu_can_run
from hotlun.cli.running import run as run_coroutine

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEFAULT_NAME = "default"


@click.group()
def vm() -> None:
    """Small VMs to try disks on; they run until they are stopped."""
    check_qemu_can_run()


@vm.command()
@click.argument("name", default=_DEFAULT_NAME)
@click.option("--controllers", default=4, show_default=True, help="SCSI controllers, 1 to 8.")
@click.option("--memory", default=512, show_default=True, help="MiB, 256 or more.")
@click.option("--cpus", default=1, show_default=True, help="Virtual processors.")
@click.option(
    "--timeout", default=120.0, show_default=True, help="Seconds for the guest to come up."
)
@debug_option
def start(name: str, controllers: int, memory: int, cpus: int, timeout: float) -> None:
    """Start a VM and call it NAME ("default" if not given).

    The first start on a machine builds the guest and boots it; from then on its
    snapshot is restored.
    """
    from hotlun.vm import start_detached

    try:
        machine = run_coroutine(start_detached(name, controllers, memory, cpus, timeout))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(
        f"{machine.name} runs: pid {machine.pid}, controllers {', '.join(machine.controllers)}\n"
        f"  QMP      {machine.qmp_socket}\n"
        f"  agent    {machine.agent_socket}\n"
        f"  console  {machine.console}\n"
        f"Try: hotlun vm run {machine.name} lsblk"
    )


@vm.command("list")
@debug_option
def list_() -> None:
    """List the VMs that run."""
    from hotlun.vm import list_machines

    machines = list_machines()
    if not machines:
        click.echo("no VM runs; 'hotlun vm start' starts one", err=True)
        return
    rows = [
        (
            machine.name,
            str(machine.pid),
            str(len(machine.controllers)),
            f"{machine.memory_mib} MiB",
            str(machine.cpus),
            machine.qmp_socket,
            machine.agent_socket,
        )
        for machine in machines
    ]
    titles = ("NAME", "PID", "CONTROLLERS", "MEMORY", "CPUS", "QMP", "AGENT")
    for line in _aligned([titles, *rows]):
        click.echo(line)


@vm.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "every", is_flag=True, help="Stop all VMs that run.")
@debug_option
def stop(names: tuple[str, ...], every: bool) -> None:
    """Stop the VM called NAME ("default" if not given), and forget what it wrote."""
    from hotlun.vm import list_machines
    from hotlun.vm import stop as stop_machine

    if names and every:
        raise click.UsageError("give names or --all, not both")
    if every:
        names = tuple(machine.name for machine in list_machines())
    for name in names if names or every else (_DEFAULT_NAME,):
        try:
            run_coroutine(stop_machine(name))
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        click.echo(f"{name} is stopped")


@vm.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--timeout", default=60.0, show_default=True, help="Seconds for the command to end.")
@debug_option
def run(name: str, command: tuple[str, ...], timeout: float) -> None:
    """Run COMMAND as root in the VM called NAME; its exit code is this one's.

    One word is a line for the guest's shell; several are a program and its
    arguments, as they are:

    \b
        hotlun vm run default 'lsblk -n | wc -l'
        hotlun vm run default ls -l "/a path"
    """
    from hotlun.vm import find_machine

    line = command[0] if len(command) == 1 else shlex.join(command)
    done = run_coroutine(find_machine(name).run(line, timeout=timeout))
    # As bytes: the terminal may know fewer characters than the guest.
    click.echo(done.stdout.encode(), nl=False)
    click.echo(done.stderr.encode(), nl=False, err=True)
    # As a shell has it: 128 and the signal that has killed the command.
    raise SystemExit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
