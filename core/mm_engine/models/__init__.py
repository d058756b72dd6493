"""What plugins build models from. These names are public; they follow mm-engine's version."""

from mm_engine.models.decoder import build_decoder
from mm_engine.models.interfaces import SupportsVision
from mm_engine.models.vision import build_vision_tower, tower_features

__all__ = ["SupportsVision", "build_decoder", "build_vision_tower", "tower_features"]
