"""computecore.dll, as it is: every prototype stated, every result freed, nothing asynchronous.

ABI: ComputeCore.h and ComputeDefs.h, Windows 10 1809 and Windows Server 2019. What matters here:

* An HRESULT is an int32 that is looked at, never raised by ctypes: where a call fails there
  may be a document that says why.
* Strings go in as UTF-16 that ends in NUL, made here, as a wchar_t has 32 bits elsewhere; so
  the same code runs on any library with this ABI.
* Strings come out as an address, which goes to `LocalFree` once, whether the call succeeded or
  not (so the documentation; hcsshim uses CoTaskMemFree).
* An operation serves one call and is closed once. Nothing of it is touched after that.

Every method blocks for as long as Windows takes. `compute_system` runs them in threads.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_int32, c_uint16, c_uint32, c_void_p
from typing import TYPE_CHECKING, Any, Final

from hotlun.errors import UnsupportedError
from hotlun.hcs.results import Meaning, understand, unsigned

if TYPE_CHECKING:
    from collections.abc import Callable

    Begin = Callable[[int], int]
    """Hands an operation to a call, and returns its HRESULT."""

_S_OK = 0
_E_OUTOFMEMORY: Final = 0x8007000E
_OPERATION_PENDING: Final = 0x80370117
_OPERATION_TIMEOUT: Final = 0x80370118
_GENERIC_ALL: Final = 0x10000000
_WAIT_MS: Final = 60_000
"""At a time; after that the wait begins again, and the operation stays the same."""
_SYSTEM32_ONLY: Final = 0x800
"""LOAD_LIBRARY_SEARCH_SYSTEM32: nobody's own computecore.dll from the current folder."""

_TEXT = POINTER(c_uint16)
_TEXT_OUT = POINTER(c_void_p)
_HANDLE = c_void_p
_PROTOTYPES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "HcsOpenComputeSystem": (c_int32, (_TEXT, c_uint32, POINTER(_HANDLE))),
    "HcsCloseComputeSystem": (None, (_HANDLE,)),
    "HcsCreateOperation": (_HANDLE, (c_void_p, c_void_p)),
    "HcsCloseOperation": (None, (_HANDLE,)),
    "HcsModifyComputeSystem": (c_int32, (_HANDLE, _HANDLE, _TEXT, _HANDLE)),
    "HcsGetComputeSystemProperties": (c_int32, (_HANDLE, _HANDLE, _TEXT)),
    "HcsEnumerateComputeSystems": (c_int32, (_TEXT, _HANDLE)),
    "HcsWaitForOperationResult": (c_int32, (_HANDLE, c_uint32, _TEXT_OUT)),
    "HcsGetOperationResult": (c_int32, (_HANDLE, _TEXT_OUT)),
}
_GRANTING: Final = (c_int32, (_TEXT, _TEXT))


class CallError(Exception):
    """A call into the library has failed.

    Args:
        code: the HRESULT, unsigned.
        document: the ResultError that came with it; `""` if there was none.
    """

    def __init__(self, code: int, document: str = "") -> None:
        super().__init__(f"0x{unsigned(code):08X}")
        self.code = unsigned(code)
        self.document = document


class ComputeCore:
    """The functions of the library that a disk needs.

    Args:
        core: computecore.dll.
        kernel: has `LocalFree`.
        older: vmcompute.dll, whose functions for access are called where `core` has none.

    Raises:
        UnsupportedError: the library lacks a function.
    """

    def __init__(
        self, core: ctypes.CDLL, kernel: ctypes.CDLL, older: ctypes.CDLL | None = None
    ) -> None:
        try:
            for name, prototype in _PROTOTYPES.items():
                _declare(core, name, prototype)
            _declare(kernel, "LocalFree", (_HANDLE, (_HANDLE,)))
        except AttributeError as error:
            raise UnsupportedError(
                f"the Host Compute Service here is too old: {error}; it takes Windows 10 1809, "
                "Windows Server 2019, or newer"
            ) from error
        self._core = core
        self._kernel = kernel
        self._granting: dict[str, list[Any]] = {
            verb: [
                _declare(library, name, _GRANTING)
                for library, name in ((core, f"Hcs{verb}VmAccess"), (older, f"{verb}VmAccess"))
                if library is not None and hasattr(library, name)
            ]
            for verb in ("Grant", "Revoke")
        }

    @classmethod
    def load(cls) -> ComputeCore:
        """The one of this Windows.

        Raises:
            UnsupportedError: it is no Windows, or one without it.
        """
        load = getattr(ctypes, "WinDLL", None)  # which is there on Windows only
        if load is None:
            raise UnsupportedError(
                f"the Host Compute Service is a part of Windows, and this is {sys.platform}: "
                "use QEMUHostBackend here"
            )
        try:
            core, kernel = (
                load(name, winmode=_SYSTEM32_ONLY) for name in ("computecore.dll", "kernel32.dll")
            )
        except OSError as error:
            raise UnsupportedError(
                f"the Host Compute Service is not there ({error}): turn on Hyper-V or the "
                "Virtual Machine Platform of Windows 10 1809, Windows Server 2019, or newer"
            ) from error
        try:
            older = load("vmcompute.dll", winmode=_SYSTEM32_ONLY)
        except OSError:
            older = None
        return cls(core, kernel, older)

    def open_system(self, system_id: str) -> int:
        """A handle of the system; to be closed.

        Raises:
            CallError: there is none with this id, or it may not be opened.
        """
        system = _HANDLE()
        code = self._core.HcsOpenComputeSystem(_wide(system_id), _GENERIC_ALL, ctypes.byref(system))
        if code < 0:
            raise CallError(code)
        if not system.value:
            raise CallError(_E_OUTOFMEMORY)
        return system.value

    def close_system(self, system: int) -> None:
        """The handle is not used from now on; the system goes on."""
        self._core.HcsCloseComputeSystem(system)

    def modify(self, system: int, document: str) -> str:
        """Carry out a ModifySettingRequest, and return what the service says of it.

        Raises:
            CallError: it refused.
        """
        text = _wide(document)
        return self._run(
            lambda operation: self._core.HcsModifyComputeSystem(system, operation, text, None)
        )

    def properties(self, system: int, query: str) -> str:
        """The answer to a PropertyQuery. Raises as `modify`."""
        text = _wide(query)
        return self._run(
            lambda operation: self._core.HcsGetComputeSystemProperties(system, operation, text)
        )

    def enumerate(self, query: str) -> str:
        """The answer to a SystemQuery. Raises as `modify`."""
        text = _wide(query)
        return self._run(lambda operation: self._core.HcsEnumerateComputeSystems(text, operation))

    def grant(self, vm_id: str, path: str) -> None:
        """Let the VM open the file. Raises as `modify`."""
        self._change_access("Grant", vm_id, path)

    def revoke(self, vm_id: str, path: str) -> None:
        """Take that back. Raises as `modify`."""
        self._change_access("Revoke", vm_id, path)

    def _change_access(self, verb: str, vm_id: str, path: str) -> None:
        failure = CallError(0x8007007F)
        for function in self._granting[verb]:
            code = function(_wide(vm_id), _wide(path))
            if code >= 0:
                return
            failure = CallError(code)
            if understand(code).meaning is not Meaning.NOT_HERE:
                break
        raise failure

    def _run(self, begin: Begin) -> str:
        """See one call through with an operation of its own."""
        operation = self._core.HcsCreateOperation(None, None)
        if not operation:
            raise CallError(_E_OUTOFMEMORY)  # no other reason is documented, nor a last error
        try:
            code = begin(operation)
            if code < 0:  # it never began; why may be told all the same
                raise CallError(code, self._result(operation, None)[1])
            code, document = self._wait(operation)
        finally:
            self._core.HcsCloseOperation(operation)
        if code < 0:
            raise CallError(code, document)
        return document

    def _wait(self, operation: int) -> tuple[int, str]:
        """The HRESULT and the document of an operation, once it has ended.

        A wait that ran out has the same code as an operation that ended with it, as a guest
        may answer, and a wait for that one returns at once, each time. So it is asked which.
        """
        while True:
            code, document = self._result(operation, _WAIT_MS)
            if unsigned(code) == _OPERATION_TIMEOUT:
                code, document = self._result(operation, None)
                if unsigned(code) == _OPERATION_PENDING:
                    continue
            return code, document

    def _result(self, operation: int, milliseconds: int | None) -> tuple[int, str]:
        """The HRESULT and the document of an operation; wait for it, or take what there is."""
        address = c_void_p()
        if milliseconds is None:
            code = self._core.HcsGetOperationResult(operation, ctypes.byref(address))
        else:
            code = self._core.HcsWaitForOperationResult(
                operation, milliseconds, ctypes.byref(address)
            )
        if not address.value:
            return code, ""
        try:
            return code, _read(address.value)
        finally:
            self._kernel.LocalFree(address)


def _declare(library: ctypes.CDLL, name: str, prototype: tuple[Any, tuple[Any, ...]]) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = prototype
    return function


def _wide(text: str) -> ctypes.Array[c_uint16]:
    """As Windows wants it. A lone surrogate passes: NTFS has them in names.

    Raises:
        ValueError: it holds a NUL, where Windows would take it to end.
    """
    if "\0" in text:
        raise ValueError(f"Windows takes no NUL in {text[:80]!r}")
    data = text.encode("utf-16-le", "surrogatepass") + b"\0\0"
    return (c_uint16 * (len(data) // 2)).from_buffer_copy(data)


def _read(address: int) -> str:
    units, length = ctypes.cast(address, _TEXT), 0
    while units[length]:
        length += 1
    return ctypes.string_at(address, 2 * length).decode("utf-16-le", "surrogatepass")
