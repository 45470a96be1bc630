"""`python -m hotlun`, which is the command `hotlun`."""

from hotlun.cli import main

main(prog_name="hotlun")
