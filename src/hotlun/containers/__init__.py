"""The metadata of image containers, each read as something hostile.

A module a format, all of one shape: `check(file)` raises the `BackendError` that
`file` makes for it, and returns the `Contents` that the metadata tells.
"""
