"""QEMU's words and what they mean. The words were collected from QEMU 7.2."""

from __future__ import annotations

import pytest

from hotlun.backends.refusals import Meaning, understand


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("lun already used by '(null)'", Meaning.SLOT_TAKEN),
        ("lun already used by 'disk7'", Meaning.SLOT_TAKEN),
        ("Device 'hotlun-h1' not found", Meaning.DEVICE_ABSENT),
        ("Failed to find node with node-name='hotlun-h1'", Meaning.NODE_ABSENT),
        ("Node hotlun-h1 is in use", Meaning.NODE_IN_USE),
        ("Block device hotlun-h1 is in use", Meaning.NODE_IN_USE),
        ("Node 'hotlun-h1' is busy: node is used as backing hd of 'x'", Meaning.NODE_IN_USE),
        ("Device hotlun-h1 is already in the process of unplug", Meaning.BEING_UNPLUGGED),
        ("Could not open '/x': No such file or directory", Meaning.REFUSED),
        ("Could not open '/lun already used by': Permission denied", Meaning.REFUSED),
    ],
)
def test_what_decides_the_next_step(words: str, meaning: Meaning) -> None:
    """A refusal that a backend acts upon is told apart from the others."""
    assert understand(words).meaning is meaning


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ('Failed to get "write" lock', "end that use"),
        ('Failed to get shared "consistent read" lock', "end that use"),
        ("Permission conflict on node 'n1': permissions 'write' are both required by", "end that"),
        ("Could not open '/nope': No such file or directory", "exists where QEMU runs"),
        ("Could not open '/x': Permission denied", "vm_id"),
        ("Could not open '/etc': Is a directory", "a file as a virtual disk"),
        ("'file' driver requires '/dev/null' to be a regular file", "a block device as a physical"),
        ("The device is not writable: Permission denied", "attach it read-only"),
        ("Could not open '/x': Read-only file system", "attach it read-only"),
        ("Image is not in qcow2 format", "state the format it has"),
        ("invalid VPC image", "state the format it has"),
        ("Could not open '/etc/passwd': Invalid argument", "state the format it has"),
        ("Failed to connect to '/nope': No such file or directory", "start it"),
        ("Failed to connect to '127.0.0.1:1': Connection refused", "start it"),
        ("address resolution failed for no.such.host:1: Name or service not known", "start it"),
        ("Bus 'scsi9.0' not found", "controllers that the VM has"),
        ("'scsi-hd' is not a valid device model name", "install its block and device modules"),
        ("Parameter 'driver' does not accept value 'vhdx'", "install its block"),
        ("Could not open '/x': Too many open files", "raise its limits"),
    ],
)
def test_what_a_person_should_do(words: str, advice: str) -> None:
    """Each refusal known comes with the next step."""
    refusal = understand(words)
    assert refusal.meaning is Meaning.REFUSED
    assert advice in refusal.words


def test_words_that_nobody_knows() -> None:
    """They are passed on."""
    assert understand("the moon is full").words == "QEMU refuses: the moon is full"
