"""The guest bridge protocol (GCS bridge, protocol version 4), spoken by both ends.

`frames`, `documents`, `codes` and `messages` hold no socket, import nothing but the
standard library and run on Python 3.9: the agent inside the guest uses them as they
are, and `transport` too. All others are the host's end, and only the host has them.
"""
