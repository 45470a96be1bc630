"""`hotlun agent`: the program that has to run inside a guest."""

from __future__ import annotations

import click

from hotlun.cli.logs import debug_option


@click.group()
def agent() -> None:
    """Build the program that mounts disks inside a guest."""


@agent.command()
@click.argument("out", type=click.Path(dir_okay=False))
@debug_option
def build(out: str) -> None:
    """Write the agent to OUT: one executable file.

    It needs Python 3.9 or later in the guest, nothing else, and to be run as root:

    \b
        OUT --port org.hotlun.agent.0    # a virtio-serial port (QEMU)
        OUT --vsock                      # Hyper-V
    """
    from hotlun.agent_file import build_agent

    path = build_agent(out)
    click.echo(f"{path}: {path.stat().st_size:,} bytes")
