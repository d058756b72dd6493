"""For all tests: nothing is fetched from the Hub, and a busy machine fails no property test."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

settings.register_profile("repository", deadline=None)
settings.load_profile("repository")
