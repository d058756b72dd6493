"""A server for a benchmark: `python -m mm_engine.cli.bench.child PARENT_PID OPTIONS`.

`OPTIONS` is a JSON object with the fields of `EngineConfig`, and `max_queued_requests`. Tells its
parent on stdout, a JSON object, when requests are taken. Ends with SIGTERM, and when its parent
is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from mm_engine.plugins.tolerance import pass_over_damage

if TYPE_CHECKING:
    from mm_engine.server.run import Started

SERVED_NAME = "benchmark"


def main(parent_pid: int, options: dict[str, Any]) -> int:
    """Serve on a free port of 127.0.0.1; returns the exit code."""
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    pass_over_damage()

    from mm_engine.config import SERVED_OUTPUT_INTERVAL, EngineConfig
    from mm_engine.errors import MMEngineError
    from mm_engine.plugins.printable import printable
    from mm_engine.server.log import configure_logging
    from mm_engine.server.run import serve
    from mm_engine.server.settings import ServerSettings

    configure_logging("warning", "text")  # the parent reads lines
    max_queued_requests = options.pop("max_queued_requests")
    try:
        options |= {"plugins": tuple(options["plugins"]), "progress": False}
        config = EngineConfig(**options, output_interval=SERVED_OUTPUT_INTERVAL)
        settings = ServerSettings(
            served_model_names=(SERVED_NAME,),
            port=0,
            max_queued_requests=max_queued_requests,
            log_stats=False,
        )
        return serve(config, settings, _ready)
    except MMEngineError as error:
        sys.stderr.write(f"error: {printable(' '.join(str(error).split()))}\n")
        return 1


def _ready(started: Started) -> None:
    info = started.info
    _tell(
        "ready",
        url=started.url,
        imported_at=started.imported_at,
        told_at=started.told_at,
        load_seconds=info.load_seconds,
        profile_seconds=info.profile_seconds,
        max_model_len=info.max_model_len,
        kv_cache_tokens=info.kv_cache_tokens,
        engine=f"{info.plugin} · {info.dtype} on {info.device}",
    )


def _tell(event: str, **facts: Any) -> None:
    """Print a line; `at` is of the clock that all processes of a machine share."""
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), **facts}) + "\n")
    sys.stdout.flush()


def _end_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2])))
