"""Processes, agents, sockets and whole VMs that die in the middle, hundreds of times, for real."""
