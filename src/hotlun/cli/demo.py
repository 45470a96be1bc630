"""`hotlun demo`: the library at work on a real VM."""

from __future__ import annotations

import click

from hotlun.cli.logs import debug_option
from hotlun.cli.running import check_qemu_can_run, run


@click.command()
@click.option("--code", is_flag=True, help="Show the code of each chapter before it runs.")
@debug_option
def demo(code: bool) -> None:
    """Show the library at work: a VM, seven disks, and nothing left behind.

    Boots a small VM and gives it disks: VHDX, VHD, qcow2 and raw images and one over
    the network (NBD); with ext4 and xfs, with partitions, read-only, encrypted, and as
    a bare device. Writes data, shares a disk, takes it away and brings it back. All that
    is shown is read from the guest or from QEMU's monitor, and checked: if a check
    fails, so does the demo.
    """
    check_qemu_can_run()
    from hotlun.cli.report import Report
    from hotlun.cli.story import tell

    run(tell(Report(show_code=code)))
