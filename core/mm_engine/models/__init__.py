"""What plugins build models from. These names are public; they follow mm-engine's version.

`build_decoder` picks the text backbone: the native decoder, or `TransformersDecoder` for what that
one doesn't cover. A model may also construct the latter itself, with the same arguments.
"""

from mm_engine.models.decoder import build_decoder
from mm_engine.models.interfaces import SupportsVision
from mm_engine.models.projector import Projector
from mm_engine.models.transformers_decoder import TransformersDecoder
from mm_engine.models.vision import (
    build_vision_tower,
    num_tower_rows,
    select_features,
    tower_features,
)

__all__ = [
    "Projector",
    "SupportsVision",
    "TransformersDecoder",
    "build_decoder",
    "build_vision_tower",
    "num_tower_rows",
    "select_features",
    "tower_features",
]
