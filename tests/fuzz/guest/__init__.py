"""A guest that is nowhere but in memory: its files, devices, mounts and programs.

The agent's own code runs in it from the first line to the last, as its modules `os`,
`ctypes`, `fcntl`, `subprocess`, `time` and so on are this guest's. What the guest does
not know, it refuses as a `StrayError`, so nothing of the machine below is ever reached.
"""
