"""A greeting: what is said to an agent before anything else may be.

Negotiate, and then what the guest asks for in its answer to that, or needs when it is met for
the first time: that its system is created and started, and, if it is Windows, the addresses
of its Hyper-V sockets.

The host's end only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotlun.bridge import messages
from hotlun.bridge.codes import HResult, code_name, is_failure
from hotlun.bridge.documents import MessageError, encode_request
from hotlun.bridge.frames import Frame, encode
from hotlun.bridge.messages import MessageType, type_name
from hotlun.bridge.responses import Capabilities
from hotlun.bridge.wire import read_answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hotlun.bridge.responses import Response
    from hotlun.bridge.wire import Ids, Wire

_NEGOTIATE = messages.negotiate_request()

_SYSTEM_EXISTS = (HResult.SYSTEM_ALREADY_EXISTS, 0x8037010F)
"""What a guest answers to a second Create, in either family of the compute service's codes.

The one in Windows is closed source, and hcsshim does not ask it twice. So when a connection
comes back, whatever it answers is taken as that: else a guest that works is never reached again.
"""


class GreetingError(Exception):
    """There is an agent that cannot be worked with, or none any more.

    Args:
        problem: what is wrong, for a person.
        answer: what it said, if that was an answer.
    """

    def __init__(self, problem: str, answer: Response | None = None) -> None:
        super().__init__(problem)
        self.code = None if answer is None else answer.code
        self.detail = problem if answer is None else answer.text


class Greeting:
    """One on one wire, for as long as the caller waits.

    Args:
        wire: where the agent is.
        ids: where the numbers of requests come from.
        runtime_id: the VM's, for a guest that is to be told it; else `""`.
        is_first: whether the guest was never greeted by us before.
    """

    def __init__(self, wire: Wire, ids: Ids, *, runtime_id: str, is_first: bool) -> None:
        self._wire = wire
        self._ids = ids
        self._runtime_id = runtime_id
        self._is_first = is_first

    async def negotiate(self, number: int) -> Response:
        """What the agent answers to Negotiate, sent with this number; refusals included.

        Raises:
            GreetingError: the connection was lost, or that is no answer.
        """
        return await self._ask(number, MessageType.NEGOTIATE_PROTOCOL, _NEGOTIATE)

    async def agree(self, answer: Response) -> Capabilities:
        """What the agent said of itself, once it has nothing more to ask for.

        Args:
            answer: its answer to Negotiate.

        Raises:
            GreetingError: it refuses something, speaks another version, or is lost.
        """
        _check(answer, MessageType.NEGOTIATE_PROTOCOL)
        try:
            version = answer.fields.integer("Version", maximum=(1 << 32) - 1)
            capabilities = Capabilities.read(answer.fields.fields("Capabilities"))
        except MessageError as error:
            raise GreetingError(f"its greeting cannot be read: {error}") from error
        if version != messages.PROTOCOL_VERSION:
            raise GreetingError(
                f"it speaks version {version} of the protocol, not {messages.PROTOCOL_VERSION}"
            )
        if await self._is_new(capabilities):
            if capabilities.send_create and capabilities.send_start:
                await self._order(MessageType.START, messages.start_request())
            if capabilities.os_type == "windows" and self._runtime_id:
                document = messages.addresses_request(self._runtime_id)
                await self._order(MessageType.MODIFY_SETTINGS, document)
        return capabilities

    async def _is_new(self, capabilities: Capabilities) -> bool:
        """Whether the guest is met for the first time; its system is created then, if it wants."""
        if not capabilities.send_create:
            return self._is_first
        created = await self._ask(self._ids.take(), MessageType.CREATE, messages.create_request())
        if created.code in _SYSTEM_EXISTS or (not self._is_first and is_failure(created.code)):
            return False
        _check(created, MessageType.CREATE)
        return True

    async def _order(self, kind: MessageType, document: Mapping[str, Any]) -> None:
        """A step that has to succeed."""
        _check(await self._ask(self._ids.take(), kind, document), kind)

    async def _ask(self, number: int, kind: MessageType, document: Mapping[str, Any]) -> Response:
        data = encode(Frame(kind, number, encode_request(document)))
        answered = self._wire.send(number, data)
        try:
            frame = await answered
        finally:
            self._wire.forget(number)
        if isinstance(frame, str):
            raise GreetingError(frame)
        try:
            return read_answer(frame, kind)
        except MessageError as error:
            raise GreetingError(str(error)) from error


def _check(answer: Response, kind: MessageType) -> None:
    if answer.code != HResult.OK:
        raise GreetingError(
            f"its answer to a {type_name(kind)} is {code_name(answer.code)}: "
            f"{answer.text or 'no words with it'}",
            answer,
        )
