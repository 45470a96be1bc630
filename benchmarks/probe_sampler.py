"""A sampling profiler of the guest's kernel, for want of perf(1): perf_event_open(2), bare.

While it is on, the kernel notes its call chain each millisecond of each processor's time. What
a chain is about is the first part that has one of its functions.
"""

import bisect
import ctypes
import mmap
import os
import struct

SYS_PERF_EVENT_OPEN = 298  # x86-64
PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK = 1, 0
PERF_SAMPLE_CALLCHAIN, PERF_RECORD_SAMPLE = 1 << 5, 9
PERF_FLAG_FREQ = 1 << 10
HERTZ = 1000
PAGES = 2048
"""Of a processor's ring; a chain has some 300 bytes."""
USER_CONTEXT = 2**64 - 512  # linux/perf_event.h: PERF_CONTEXT_USER
MARKS = 2**64 - 4096
"""Above are no addresses, but marks of whose chain follows."""

libc = ctypes.CDLL(None, use_errno=True)


class Sampler:
    """On from its making until `shares`."""

    def __init__(self):
        self._rings = [Ring(cpu) for cpu in range(os.cpu_count())]

    def shares(self, parts):
        """How often each part was met, by its name; "" is all the rest.

        Args:
            parts: names, each with its functions; one is `user` for what is not the kernel.
        """
        chains = [
            chain for ring in self._rings for chain in ring.chains()
        ]  # first, as that ends it
        name_of = symbols({function for _, functions in parts for function in functions})
        counts = dict.fromkeys([*(name for name, _ in parts), ""], 0)
        for chain in chains:
            met = {name_of(address) for address in chain}
            counts[next((name for name, functions in parts if met & set(functions)), "")] += 1
        return counts


class Ring:
    """One processor's."""

    def __init__(self, cpu):
        attributes = struct.pack(
            "IIQQQQQ",
            *(PERF_TYPE_SOFTWARE, 112, PERF_COUNT_SW_CPU_CLOCK, HERTZ),
            *(PERF_SAMPLE_CALLCHAIN, 0, PERF_FLAG_FREQ),
        ).ljust(112, b"\0")
        self._file = libc.syscall(SYS_PERF_EVENT_OPEN, attributes, -1, cpu, -1, 0)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "perf_event_open")
        self._map = mmap.mmap(self._file, (1 + PAGES) * mmap.PAGESIZE)

    def chains(self):
        """Stop, and give the addresses of each sample, the innermost first."""
        head = struct.unpack_from("Q", self._map, 1024)[0]  # struct perf_event_mmap_page
        data = self._map[mmap.PAGESIZE : mmap.PAGESIZE + head]
        self._map.close()
        os.close(self._file)
        at = 0
        while at < len(data):
            kind, _, size = struct.unpack_from("IHH", data, at)
            if kind == PERF_RECORD_SAMPLE:
                count = struct.unpack_from("Q", data, at + 8)[0]
                yield struct.unpack_from(f"{count}Q", data, at + 16)
            at += size


def symbols(known):
    """A function from an address to the name of its function, if that is a known one."""
    found = []
    with open("/proc/kallsyms", encoding="ascii") as file:
        for line in file:
            address, kind, name = line.split()[:3]
            if kind in "tTwW":
                found.append((int(address, 16), name.partition(".")[0]))  # x.isra.0 is x
    found.sort()
    starts = [start for start, _ in found]
    names = [name if name in known else None for _, name in found]

    def name_of(address):
        if address >= MARKS:
            return "user" if address == USER_CONTEXT else None
        return names[bisect.bisect(starts, address) - 1]

    return name_of
