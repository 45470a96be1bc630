"""What only a Windows can show: `scripts/test-windows` runs it, and no other Python can."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.name == "nt" else ["test_*.py"]
