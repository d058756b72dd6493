"""The engine process: `python -m mm_engine.engine.process ADDRESS PARENT_PID LOG_LEVEL`.

Started by `EngineClient`; a fresh interpreter, so that the program that starts it needs no
`if __name__ == "__main__"`. It lives as long as its parent wants, and never longer than that.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

SOCKET_NAME = "engine"  # in a folder of its own


def main(address: str, parent_pid: int, log_level: int) -> int:
    """Serve the front that listens at `address`; returns the exit status."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group: the parent, who has streams
    # to finish first, says when to go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(address.removeprefix("ipc://")).parent
    threading.Thread(target=_end_with_parent, args=(parent_pid, folder), daemon=True).start()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("mm_engine").setLevel(log_level)

    from mm_engine.plugins.tolerance import pass_over_damage

    pass_over_damage()
    from mm_engine.engine.loop import run  # imports for seconds: after all of the above

    return run(address)


def _end_with_parent(parent_pid: int, folder: Path) -> None:
    """Wait until the parent has died without a word; then leave nothing behind."""
    while os.getppid() == parent_pid:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
