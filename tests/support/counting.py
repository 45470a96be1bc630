"""A program in the guest that writes on and on, so that a lost or repeated line shows."""

from __future__ import annotations

COUNT = """
mkdir -p /run/count
cat >/run/count/count.py <<'END'
import os
import time

file = os.open("{path}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
number = 0
while True:
    os.write(file, b"%d\\n" % number)
    os.fsync(file)
    number += 1
    time.sleep(0.005)
END
setsid python3 -S /run/count/count.py </dev/null >/dev/null 2>/run/count/error &
echo $! >/run/count/pid
until [ "$(wc -l <{path})" -gt 20 ]; do sleep 0.02; done
"""
"""Starts it; it has written some lines then."""

STOP = """
cat /run/count/error >&2
pid=$(cat /run/count/pid)
kill $pid
while [ -e /proc/$pid ]; do sleep 0.02; done
"""
