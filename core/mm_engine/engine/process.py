"""The engine process: `python -m mm_engine.engine.process ADDRESS PARENT_PID LOG_LEVEL LOG_FORMAT`.

Started by `Launch`. It lives as long as its parent wants, and never longer than that.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mm_engine.log import adopt_libraries, configure_child
from mm_engine.processes import end_with_parent, leave_signals_to_parent

SOCKET_NAME = "engine"  # in a folder of its own


def main(address: str, parent_pid: int, log_level: int, log_format: str) -> int:
    """Serve the front that listens at `address`; returns the exit status."""
    leave_signals_to_parent()
    end_with_parent(parent_pid, Path(address.removeprefix("ipc://")).parent)
    configure_child(log_level, log_format, "engine")

    from mm_engine.plugins.tolerance import pass_over_damage

    pass_over_damage()
    from mm_engine.light_imports import import_transformers

    import_transformers("mm_engine.engine.loop")  # takes seconds: after all of the above
    adopt_libraries()
    from mm_engine.engine.loop import run

    return run(address)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
