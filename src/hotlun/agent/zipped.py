"""`__main__` of the agent's single file: has its modules imported from there, and runs it.

Python's own importer of zip files reads and unpacks each module twice, the first time for
nothing but its name (CPython 3.11, `zipimport.zipimporter.get_filename`). In an emulated
guest that is an eighth of the agent's start.
"""

from __future__ import annotations

import sys
import zipimport


class Importer(zipimport.zipimporter):
    """One that knows how the modules in there are called."""

    def get_filename(self, fullname: str) -> str:
        end = "/__init__.pyc" if self.is_package(fullname) else ".pyc"
        return f"{self.archive}/{self.prefix}{fullname.rpartition('.')[2]}{end}"


if __name__ == "__main__":
    sys.path_hooks.insert(0, Importer)
    sys.path_importer_cache.pop(sys.path[0], None)

    from hotlun.agent.__main__ import main

    sys.exit(main())
