"""The suite's Windows part, by Windows' own Python on Wine.

What it shows: that the code which Windows users run holds under Windows' Python, so with ntpath,
the Proactor loop, `ctypes.WinDLL`, msvcrt, SQLite on a file that is locked as Windows locks, and
a computecore.dll that is found where Windows looks for it. What it does not show: that Windows
does as Wine does. Wine is no Windows, and the library is the tests' own.
"""
