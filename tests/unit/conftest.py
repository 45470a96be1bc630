"""A VM in memory, with a Manager entered on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.memory import VM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def vm() -> AsyncIterator[VM]:
    """A VM whose backends see nothing impossible, and that is empty after the test."""
    async with VM() as vm:
        yield vm
