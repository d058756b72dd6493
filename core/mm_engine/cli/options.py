"""Flags that several commands share, and how their values are read. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import typer

from mm_engine.config import speculation_options
from mm_engine.errors import StartupError

MODEL_PANEL = "Model"
MEMORY_PANEL = "Batching and memory"
MAX_SECONDS = 86400.0  # of any limit of time: the system's clocks take no more for certain

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        help="Type of weights and cache; auto is the checkpoint's.", rich_help_panel=MODEL_PANEL
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(
        help="Where to run; auto takes CUDA if there is one.", rich_help_panel=MODEL_PANEL
    ),
]
LoadFormat = Annotated[
    Literal["auto", "dummy"],
    typer.Option(
        help="auto reads safetensors; dummy fills in random weights, for benchmarks.",
        rich_help_panel=MODEL_PANEL,
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|TEXT",
        help="A Jinja chat template instead of the checkpoint's: a file, or the text itself.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="ARCH=DIST|FILE.py",
        help="Which of several plugins serves an architecture, or a one-file plugin. Repeatable.",
        rich_help_panel=MODEL_PANEL,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The most tokens of prompt and answer together; default: the model's.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="For requests that bring no seed, and for dummy weights.", rich_help_panel=MODEL_PANEL
    ),
]
MaxDecodeSlowdown = Annotated[
    float,
    typer.Option(
        min=1.0,
        help="How many times as long prompts and images may make a step that answers others, "
        "above 1. Lower: answers flow more evenly; higher: new ones begin sooner; inf: no limit.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
KVCacheMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Size of the KV cache: 512MiB, 2GiB, or bytes. Default: what a trial run leaves.",
        rich_help_panel=MEMORY_PANEL,
    ),
]

SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Guess an answer's next tokens where it quotes what came before: "
        '{"method": "ngram", "num_speculative_tokens": 5}; also prompt_lookup_max (4) and '
        "prompt_lookup_min (2). Changes no answer.",
        rich_help_panel=MEMORY_PANEL,
    ),
]

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": 2**10,
    "m": 10**6, "mb": 10**6, "mib": 2**20,
    "g": 10**9, "gb": 10**9, "gib": 2**30,
    "t": 10**12, "tb": 10**12, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str, flag: str, *, least: int = 1) -> int:
    """Bytes of a size such as `512MiB`, `2GB` or `1000000`; `least` of them.

    Raises:
        StartupError: it isn't one.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    size = int(float(found[1]) * unit) if found and unit else -1
    if size < least:
        raise StartupError(f"{flag} is no size: {text}. Write 512MiB, 2GiB or a number of bytes.")
    return size


def parse_speculation(text: str | None) -> dict[str, Any]:
    """Fields of `EngineConfig` for `--speculative-config`.

    Raises:
        StartupError: it isn't JSON, or asks for what isn't known.
    """
    if text is None or not text.strip():
        return {}
    try:
        config = json.loads(text)
    except ValueError:
        config = text
    return speculation_options(config)


def parse_limits(text: str | None) -> dict[str, int]:
    """Items per prompt by modality: `image=4`, `image=4,audio=1` or JSON `{"image": 4}`.

    Raises:
        StartupError: it is neither.
    """
    if text is None or not text.strip():
        return {}
    try:
        if text.lstrip().startswith("{"):
            pairs = json.loads(text).items()
        else:
            pairs = (pair.split("=") for pair in text.split(","))
        limits = {str(name).strip(): int(str(count)) for name, count in pairs}
    except ValueError:
        limits = {"": -1}
    if any(not name or count < 0 for name, count in limits.items()):
        raise StartupError(
            f'--limit-mm-per-prompt can\'t be read: {text}. Write image=4, or {{"image": 4}}.'
        )
    return limits
