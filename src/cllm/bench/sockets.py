"""What this process has sent over TCP, asked of the system: nobody else's bytes, and no headers."""

from __future__ import annotations

import os
import socket
import struct

from cllm.core.errors import UserError

_SENT = struct.Struct("<QQ")
_SENT_AT = 200
"""Where Linux has ``tcpi_bytes_sent`` and ``tcpi_bytes_retrans`` in ``struct tcp_info``, since 4.19."""


def sent_so_far() -> dict[int, int]:
    """Bytes that each TCP connection of this process has sent, by inode; what was sent again counts once.

    Raises ``UserError`` where the system does not tell.
    """
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:  # that of the list itself
            continue
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        with connection:
            is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if is_internet and connection.type == socket.SOCK_STREAM:
                size = _SENT_AT + _SENT.size
                found[os.fstat(copy).st_ino] = parse(
                    connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
                )
    return found


def parse(info: bytes) -> int:
    """Bytes sent, of a ``struct tcp_info``. Raises ``UserError`` where it is too short to have them."""
    if len(info) < _SENT_AT + _SENT.size:
        raise UserError(
            "this system does not count what a connection sends (Linux does since 4.19)"
        )
    sent, again = _SENT.unpack_from(info, _SENT_AT)
    return int(sent - again)


def sent_since(before: dict[int, int]) -> int:
    """Bytes that this process has sent since ``before``, an earlier ``sent_so_far``."""
    return sum(count - before.get(inode, 0) for inode, count in sent_so_far().items())
