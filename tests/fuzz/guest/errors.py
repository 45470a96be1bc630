"""What the guest has to say of the agent and of the fuzz, and not to the agent."""

from __future__ import annotations

from typing import ClassVar


class StrayError(BaseException):
    """The agent called what this guest does not have: that would have been the real machine.

    No Exception, so that nothing takes it for an error that can happen in a guest. All that
    there were are in `seen`, as a thread may have ended of it.
    """

    seen: ClassVar[list[str]] = []

    def __init__(self, what: str) -> None:
        super().__init__(f"the fuzz's guest does not know {what}")
        self.seen.append(what)


class Absent:
    """A module that the agent may import here, and use nothing of."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        raise StrayError(f"{self._name}.{name}")
