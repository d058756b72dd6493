"""What torch's threads do between its operators: settled here, before torch is first imported.

Those that have nothing to do spin for milliseconds, on the cores that our kernels' threads are to
take next, unless they are told not to. The library that runs them (libgomp) reads that once, when
torch is first imported, and the processes started from here inherit it.
"""

from __future__ import annotations

import os
import sys

#: Whether torch was imported before, and has read that its threads may spin.
MAY_SPIN = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
