"""From the name of a host to its addresses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence

#: The addresses of a host, each as text; the second argument is the port to be dialled there.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host as the system knows them, the best first.

    In a thread that nobody waits for: a name server that is silent can hold it for half a minute,
    asyncio's own threads hold up the process's end, and they are few.

    Raises:
        OSError: there are none.
        UnicodeError: it is no name.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[str]] = loop.create_future()

    def settle(addresses: list[str], error: Exception | None) -> None:
        if found.done():  # given up on meanwhile
            return
        if error is None:
            found.set_result(addresses)
        else:
            found.set_exception(error)

    def look_up() -> None:
        addresses: list[str] = []
        fault: Exception | None = None
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = [str(address[0]) for *_, address in answers]
        except Exception as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, addresses, fault)

    threading.Thread(target=look_up, name="resolve", daemon=True).start()
    return await found
