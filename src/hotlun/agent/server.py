"""What the host asks over a link, and what it is answered.

A host's bytes can be anything: what cannot be a frame ends the link, a frame that
makes no sense is answered with the code that the original agent has for it, and
nothing ends the agent. An answer goes out on the link that its request came by,
or not at all: on another one its id could fit somebody else's request.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from hotlun.agent.errors import AbandonedError, RequestError
from hotlun.agent.lanes import Lanes
from hotlun.agent.queries import DiskQuery, answered
from hotlun.agent.settings import DiskSettings, Slot, read_timeout
from hotlun.bridge import messages
from hotlun.bridge.codes import HResult
from hotlun.bridge.documents import MessageError, decode, embedded, encode_response, printable
from hotlun.bridge.frames import Frame, FrameDecoder, FrameError, encode
from hotlun.bridge.messages import MessageType, ModifyRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator
    from typing import Protocol

    from hotlun.agent.links import Link
    from hotlun.agent.queries import Found
    from hotlun.bridge.documents import Fields

    class DiskVerbs(Protocol):
        """What the server needs of `disks.Disks`, which says what each does."""

        def mount(self, settings: DiskSettings, wanted: Callable[[], bool]) -> None: ...

        def unmount(self, settings: DiskSettings) -> None: ...

        def unplug(self, slot: Slot, timeout: float | None) -> None: ...

        def survey(self, asked: list[DiskQuery]) -> list[Found]: ...


FEATURES = [
    messages.FEATURE_OPTIONS,
    messages.FEATURE_FILESYSTEMS,
    messages.FEATURE_PRESERVE_DATA,
    messages.FEATURE_IDENTITY,
    messages.FEATURE_KEYS,
    messages.FEATURE_VERITY,
    messages.FEATURE_LAZY_UNMOUNT,
    messages.FEATURE_SURVEY,
]
"""The parts of our extension that this agent has."""

_SERVED = frozenset(
    (
        MessageType.NEGOTIATE_PROTOCOL,
        MessageType.CREATE,
        MessageType.START,
        MessageType.GET_PROPERTIES,
        MessageType.MODIFY_SETTINGS,
    )
)

_SURVEYS = "surveys"
"""Their lane, which is no disk's: a survey does not wait for what a disk is busy with."""

_log = logging.getLogger("hotlun.agent")


class Server:
    """Serves links: one after another, or at the same time, each in a thread.

    Args:
        disks: does what is asked.
        hung_up: called when a link is over, so that what waits for it can stop.
    """

    def __init__(self, disks: DiskVerbs, hung_up: Callable[[], None] = lambda: None) -> None:
        self._disks = disks
        self._hung_up = hung_up
        self._lanes = Lanes()

    def serve_each(self, links: Iterator[Link]) -> None:
        """One after another, for ever."""
        for link in links:
            self.serve(link)

    def serve_all(self, links: Iterator[Link]) -> None:
        """Each as it comes, for ever."""
        for link in links:
            threading.Thread(target=self.serve, args=(link,), name="link", daemon=True).start()

    def serve(self, link: Link) -> None:
        """Read requests until the link is over."""
        session = _Session(link, self._disks, self._lanes)
        decoder = FrameDecoder()
        _log.info("a host is here")
        try:
            while session.take(decoder):
                pass
        except Exception:
            _log.exception("the link is dropped")
        finally:
            session.over = True
            link.close()
            self._hung_up()
        _log.info("the host is gone")


class _Session:
    """What belongs to one link: whether it has negotiated, and its requests in flight."""

    def __init__(self, link: Link, disks: DiskVerbs, lanes: Lanes) -> None:
        self.over = False
        self._link = link
        self._disks = disks
        self._lanes = lanes
        self._negotiated = False

    def take(self, decoder: FrameDecoder) -> bool:
        """Wait for something, and handle it; whether there can be more.

        There may be a key in it: nothing of it is kept while waiting for the next.
        """
        data = self._link.receive()
        if not data:
            return False
        try:
            frames, broken = decoder.feed(data), None
        except FrameError as error:
            frames, broken = list(error.frames), error
        for frame in frames:
            self.handle(frame)
        if broken:
            _log.warning("the link is dropped: %s", broken)
        return broken is None

    def handle(self, frame: Frame) -> None:
        """Answer at once, or have a lane do it."""
        if messages.is_response(frame.type) or messages.is_notification(frame.type):
            _log.warning("a host sent what only guests send: type %#010x", frame.type)
            return
        activity = ""
        try:
            try:
                fields = decode(frame.payload)
                activity = messages.activity_of(fields)
            finally:  # what is not served is not read either
                self._check_served(frame.type)
            if frame.type == MessageType.MODIFY_SETTINGS:
                self._modify(frame, fields, activity)
                return
            if frame.type == MessageType.GET_PROPERTIES:
                self._get_properties(frame, fields, activity)
                return
            document = self._simple(frame.type, fields, activity)
        except MessageError as error:
            document = messages.response(HResult.INVALID_JSON, str(error), activity_id=activity)
        except RequestError as error:
            document = messages.response(error.code, str(error), activity_id=activity)
        self._answer(frame, document)

    def _check_served(self, kind: int) -> None:
        """Refuse what is never served, and what is not served before or after Negotiate."""
        negotiating = kind == MessageType.NEGOTIATE_PROTOCOL
        if kind not in _SERVED or negotiating == self._negotiated:
            when = "" if kind not in _SERVED else " again" if negotiating else " before Negotiate"
            raise RequestError(
                f"function not supported{when}: {messages.type_name(kind)}",
                HResult.NOT_IMPLEMENTED,
            )

    def _simple(self, kind: int, fields: Fields, activity: str) -> dict[str, Any]:
        """What touches no disk."""
        if kind == MessageType.NEGOTIATE_PROTOCOL:
            return self._negotiate(fields, activity)
        _check_container(fields)
        return messages.response(activity_id=activity)

    def _negotiate(self, fields: Fields, activity: str) -> dict[str, Any]:
        limit = (1 << 32) - 1
        lowest = fields.integer("MinimumVersion", maximum=limit)
        highest = fields.integer("MaximumVersion", maximum=limit)
        if not lowest <= messages.PROTOCOL_VERSION <= highest:
            raise RequestError(
                f"the protocol's version {messages.PROTOCOL_VERSION} is spoken here, "
                f"not {lowest} to {highest}",
                HResult.UNSUPPORTED_PROTOCOL_VERSION,
            )
        self._negotiated = True
        return messages.negotiate_response(FEATURES, activity_id=activity)

    def _modify(self, frame: Frame, fields: Fields, activity: str) -> None:
        """Read the request at once, and have it done in its disk's lane."""
        request = ModifyRequest.read(fields)
        _check_container(fields)
        slot, verb = self._verb(request)

        def outcome() -> dict[str, Any]:
            verb()
            return messages.response(activity_id=activity)

        self._submit(slot, f"disk {slot}", frame, outcome, activity)

    def _get_properties(self, frame: Frame, fields: Fields, activity: str) -> None:
        """Answer at once, unless it is asked for ours: to read and do that takes a while."""
        _check_container(fields)
        if not fields.string("Query"):
            self._answer(frame, messages.properties_response({}, activity_id=activity))
            return

        def outcome() -> dict[str, Any]:
            properties: dict[str, Any] = {}
            query = embedded(fields, "Query")
            if messages.EXTENSION in query:
                asked = DiskQuery.read_all(query.fields(messages.EXTENSION))
                # Asked first: what ends meanwhile is told as if it had not.
                busy = [self._lanes.is_busy(disk.slot) for disk in asked]
                properties[messages.EXTENSION] = answered(self._disks.survey(asked), busy)
            return messages.properties_response(properties, activity_id=activity)

        self._submit(_SURVEYS, "a survey", frame, outcome, activity)

    def _submit(
        self,
        lane: Hashable,
        what: str,
        frame: Frame,
        outcome: Callable[[], dict[str, Any]],
        activity: str,
    ) -> None:
        """Have a request done in a lane, and answered."""
        frame = Frame(frame.type, frame.id, b"")  # of which the job needs no more

        def job() -> None:
            try:
                document = None if self.over else _outcome(outcome, activity)
            finally:
                self._lanes.finish(lane)
            if document is not None:
                self._answer(frame, document)

        try:
            self._lanes.submit(lane, job)
        except RuntimeError as error:
            raise RequestError(f"{what}: nothing was done: {error}") from error

    def _verb(self, request: ModifyRequest) -> tuple[Slot, Callable[[], None]]:
        if request.resource_type == messages.MAPPED_VIRTUAL_DISK:
            if request.request_type == messages.ADD:
                settings = DiskSettings.read(request.settings, adding=True)
                return settings.slot, lambda: self._disks.mount(settings, lambda: not self.over)
            if request.request_type == messages.REMOVE:
                settings = DiskSettings.read(request.settings, adding=False)
                return settings.slot, lambda: self._disks.unmount(settings)
        elif request.resource_type == messages.SCSI_DEVICE:
            if request.request_type == messages.REMOVE:
                slot = Slot.read(request.settings)
                timeout = read_timeout(request.settings)
                return slot, lambda: self._disks.unplug(slot, timeout)
        else:
            raise RequestError(f"invalid ResourceType {request.resource_type!r}")
        raise RequestError(f"the RequestType {request.request_type!r} is not supported")

    def _answer(self, frame: Frame, document: dict[str, Any]) -> None:
        if document["Result"]:
            _log.warning(
                "%s, id %d: %s",
                messages.type_name(frame.type),
                frame.id,
                printable(document.get("ErrorMessage", "")),
            )
        data = encode(
            Frame(messages.response_type(frame.type), frame.id, encode_response(document))
        )
        if self.over:
            return
        try:
            self._link.send(data)
        except OSError as error:
            _log.info("an answer was not sent: %s", error)


def _outcome(outcome: Callable[[], dict[str, Any]], activity: str) -> dict[str, Any]:
    """Do it, and say how it went: as it says itself, or why it was not done."""
    try:
        return outcome()
    except MessageError as error:
        return messages.response(HResult.INVALID_JSON, str(error), activity_id=activity)
    except AbandonedError as error:
        _log.info("given up: %s", error)
        return messages.response(error.code, str(error), activity_id=activity)
    except RequestError as error:
        return messages.response(error.code, str(error), activity_id=activity)
    except Exception as error:
        _log.exception("an unexpected error")
        return messages.response(
            HResult.FAIL, f"{type(error).__name__}: {error}", activity_id=activity
        )


def _check_container(fields: Fields) -> None:
    container = fields.string("ContainerId")
    if container.lower() != messages.NULL_ID:
        raise RequestError(
            f"there is no container {container!r} here, only the VM itself ({messages.NULL_ID})",
            HResult.SYSTEM_NOT_FOUND,
        )
