"""Secrets: they travel everywhere, and show themselves nowhere."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
import pickle
import pprint
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.memory import VM

from hotlun import (
    BackendError,
    DiskConflictError,
    MountConfig,
    OutcomeUnknownError,
    Secret,
    WrongKeyError,
)
from hotlun.backends import requests
from hotlun.backends.memory import MemoryGuestBackend, MemoryHostBackend
from hotlun.bridge import messages
from hotlun.bridge.documents import MessageError, encode_request
from hotlun.model import Attachment, Disk, DiskKind, GuestMount, Slot

DISK = Disk("/d.img", DiskKind.VIRTUAL_DISK)
VALUES = st.text("0123456789abcdefABCDEF", min_size=24, max_size=64)
"""Long enough to be found by chance nowhere else."""


@pytest.mark.parametrize("value", [b"x", "x", b"\0" * 4096, "ü", "é" * 2048])
def test_a_secret_is_revealed_when_asked(value: bytes | str) -> None:
    """As bytes; text as UTF-8."""
    assert Secret(value).reveal() == (value.encode() if isinstance(value, str) else value)


@pytest.mark.parametrize("value", [b"", "", b"x" * 4097, "é" * 2049, "x\udc80"])
def test_what_is_no_secret(value: bytes | str) -> None:
    """Nothing, too much, or text that UTF-8 cannot hold."""
    with pytest.raises(ValueError, match="a secret") as caught:
        Secret(value)
    assert not value or str(value) not in shown(caught.value)


@pytest.mark.parametrize("value", [None, 5, ["sesame"], bytearray(b"sesame")])
def test_what_is_of_another_type(value: Any) -> None:
    """The error names the type and not the value."""
    with pytest.raises(TypeError, match=type(value).__name__) as caught:
        Secret(value)
    assert "sesame" not in shown(caught.value)


def test_equal_secrets_are_one() -> None:
    """Whether they were given as text or as bytes; and they equal nothing else."""
    assert len({Secret("ü"), Secret("ü".encode()), Secret("u")}) == 2
    assert Secret("x") != "x"
    assert Secret(b"x") != b"x"


def test_a_secret_does_not_change() -> None:
    """Nor does it take attributes."""
    secret = Secret("x")
    for name in ("_value", "name"):
        with pytest.raises(AttributeError, match="does not change"):
            setattr(secret, name, b"y")
        with pytest.raises(AttributeError, match="does not change"):
            delattr(secret, name)
    assert secret.reveal() == b"x"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_not_pickled(protocol: int) -> None:
    """Nor is what holds one."""
    for value in (Secret("sesame"), MountConfig(encrypted=True, key=Secret("sesame"))):
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(value, protocol)


def test_copies_of_a_secret_are_itself() -> None:
    """So that it is not spread, and a copy of a config is equal to it."""
    config = MountConfig(encrypted=True, key=Secret("sesame"))
    assert copy.copy(config.key) is copy.deepcopy(config.key) is config.key
    assert copy.deepcopy(config) == config
    assert dataclasses.asdict(config)["key"] is config.key
    assert dataclasses.replace(config, partition=1).key is config.key


def test_a_key_that_is_not_wrapped_is_not_shown() -> None:
    """The mistake is named, the key is not."""
    for key in ("sesame", b"sesame"):
        with pytest.raises(TypeError, match="wrap it") as caught:
            MountConfig(encrypted=True, key=key)  # type: ignore[arg-type] # the mistake
        assert "sesame" not in shown(caught.value)


@given(VALUES)
def test_no_value_shows_a_secret(text: str) -> None:
    """Whatever it is part of, and however that is printed."""
    secret = Secret(text)
    config = MountConfig(encrypted=True, key=secret, filesystem="ext4", ensure_filesystem=True)
    mount = GuestMount(Attachment(Slot(0, 0), DISK, "h1"), "/m", config)
    request = requests.mount_request(mount, "linux", [messages.FEATURE_KEYS])
    for value in (secret, config, mount, request, dataclasses.asdict(mount), [secret], {secret: 1}):
        for text_of in (repr, str, ascii, pprint.pformat, "{}".format, "{!r}".format):
            assert hidden(text, text_of(value))
    with pytest.raises(TypeError, match="not JSON serializable") as caught:
        json.dumps(secret)
    assert hidden(text, shown(caught.value))


@given(VALUES)
def test_no_error_of_a_document_shows_a_secret(text: str) -> None:
    """One that cannot be encoded, for half a character in an option, keeps none of it."""
    config = MountConfig(encrypted=True, key=Secret(text), options=["x=\udc80"])
    mount = GuestMount(Attachment(Slot(0, 0), DISK, "h1"), "/m", config)
    features = [messages.FEATURE_KEYS, messages.FEATURE_OPTIONS]
    request = requests.mount_request(mount, "linux", features)
    with pytest.raises(MessageError, match="no document") as caught:
        encode_request(messages.modify_request(request))
    assert hidden(text, shown(caught.value))


@pytest.mark.parametrize("kind", [WrongKeyError, OutcomeUnknownError])
async def test_no_log_and_no_error_of_the_manager_shows_a_secret(
    caplog: pytest.LogCaptureFixture, kind: type[BackendError | OutcomeUnknownError]
) -> None:
    """Added, refused, in conflict, tried again, snapshot and released, with every log open."""
    caplog.set_level(0)
    texts = ("sesame-" * 4, "simsim-" * 4)
    right, wrong = (MountConfig(encrypted=True, key=Secret(text)) for text in texts)
    async with VM() as vm:
        vm.guest.fail("mount", kind("no such key", operation="mount"))
        said: list[object] = []
        with pytest.raises(kind) as refused:
            await vm.add(mount=wrong)
        mount = await vm.add(mount=right)
        with pytest.raises(DiskConflictError) as conflict:
            await vm.add(mount=wrong)
        said += [mount, mount.config, vm.manager.slots(), vm.guest.mounted, vm.host.calls]
        vm.guest.fail("unmount", BackendError("busy"))
        with pytest.raises(BackendError) as failed:
            await mount.release()
        await mount.release()
        errors = (refused.value, conflict.value, failed.value)
        said += [caplog.text, vm.host.calls, *map(shown, errors)]
    assert "is done" in caplog.text
    for text in texts:
        assert all(hidden(text, repr(one)) for one in said)


async def test_no_violation_shows_a_secret() -> None:
    """Those of the fakes are meant to be read."""
    host = MemoryHostBackend()
    guest = MemoryGuestBackend(host)
    config = MountConfig(encrypted=True, key=Secret("sesame-sesame"))
    mount = GuestMount(Attachment(Slot(0, 0), DISK, "h1"), "/m", config)
    with pytest.raises(AssertionError, match="not attached") as caught:
        await guest.mount(mount)
    assert "sesame" not in shown(caught.value) + repr(guest.violations)


def hidden(secret: str, text: str) -> bool:
    """Whether a text shows neither the one nor the other end of a secret, nor its base64."""
    encoded = base64.b64encode(secret.encode()).decode()
    return not any(part in text for part in (secret[:12], secret[-12:], encoded[:12]))


def shown(error: BaseException) -> str:
    """All that an error has to show, and the errors that it hangs on."""
    chain = [error]
    for one in chain:
        chain += [other for other in (one.__cause__, one.__context__) if other is not None]
    parts = [part for one in chain for part in (str(one), repr(one), repr(vars(one)))]
    return "\n".join([*parts, *traceback.format_exception(error)])
