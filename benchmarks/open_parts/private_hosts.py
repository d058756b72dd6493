"""`engine`, for a server that may fetch pictures from hosts on this machine.

No flag allows that; all else is as with `engine`.
"""

from __future__ import annotations

from mm_engine.cli.main import main
from mm_engine.server.settings import ServerSettings

if __name__ == "__main__":
    ServerSettings.__init__.__kwdefaults__["private_media_networks"] = ("127.0.0.0/8",)
    main()
