"""Asks /health at fixed times from a process of its own: `python health.py HOST PORT INTERVAL`.

When its input is closed it prints, as JSON, the seconds that each answer took, and what came that
wasn't 200. Each question has a connection of its own, as a load balancer's may.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from dataclasses import dataclass, field

TIMEOUT = 30.0


@dataclass(slots=True)
class Polled:
    """What all questions brought."""

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def ask(host: str, port: int, polled: Polled) -> None:
    """Ask once. One that fails counts with the time that it took."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            polled.wrong.append(str(answer.status))
    except (OSError, http.client.HTTPException) as error:
        polled.wrong.append(type(error).__name__)
    finally:
        connection.close()
    polled.seconds.append(time.perf_counter() - begin)


def main(host: str, port: int, interval: float) -> None:
    """Ask until stdin is closed. An answer that is late delays no other."""
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    polled, threads = Polled(), []
    due = time.monotonic()
    while not stop.is_set():
        thread = threading.Thread(target=ask, args=(host, port, polled))
        thread.start()
        threads.append(thread)
        due += interval
        stop.wait(max(0.0, due - time.monotonic()))
    for thread in threads:
        thread.join()
    print(json.dumps({"seconds": polled.seconds, "wrong": polled.wrong}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
