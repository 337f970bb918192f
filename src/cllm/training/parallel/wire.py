"""What parent and workers say to each other, over a socket each."""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

ORDER = struct.Struct("<Bddq")
"""What is to be done: ``COMPUTE`` (with the scale of the loss, and the seed of the step last), ``ADD_UP``
(nothing beside) or ``UPDATE`` (with the factor of the gradient, the learning rate, the step's number)."""
COMPUTE, ADD_UP, UPDATE = range(3)
ANSWER = struct.Struct("<?d")
"""Whether it went well, and the summed loss where there is one (or the length of a message that follows).
"""
_LENGTH = struct.Struct("<q")


def is_closed(sock: socket.socket, seconds: float | None = 0.0) -> bool:
    """Whether the other side is gone; waits for it as long as is said, ``None`` for ever."""
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return bool(poller.poll(None if seconds is None else 1000 * seconds))


def first_closed(sockets: Sequence[socket.socket]) -> int:
    """Waits until the other side of one of some sockets is gone; its place among them."""
    poller = select.poll()
    places = {sock.fileno(): place for place, sock in enumerate(sockets)}
    for number in places:
        poller.register(number, select.POLLRDHUP)
    return places[poller.poll()[0][0]]


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes. Raises ``EOFError`` when the other side is gone."""
    parts, left = [], size
    while left:
        try:
            part = sock.recv(left)
        except ConnectionError as error:
            raise EOFError from error
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def send_facts(sock: socket.socket, facts: dict[str, Any]) -> None:
    """A JSON object, with its length before it."""
    data = json.dumps(facts).encode()
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive_facts(sock: socket.socket) -> dict[str, Any]:
    """What ``send_facts`` sent."""
    (length,) = _LENGTH.unpack(receive(sock, _LENGTH.size))
    facts: dict[str, Any] = json.loads(receive(sock, length))
    return facts
