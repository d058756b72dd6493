"""Flags that several commands share, and how their values are read. Imports nothing heavy."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import typer

from mm_engine.config import ATTENTION_BACKENDS, speculation_options
from mm_engine.errors import StartupError

MODEL_PANEL = "Model"
MEMORY_PANEL = "Batching and memory"
IMAGES_PANEL = "Images"
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
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        min=1,
        help="Processes, each with a GPU of its own, that share the model's weights.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Quantization = Annotated[
    Literal["fp8", "int8", "int4"] | None,
    typer.Option(
        "--quantization",
        "-q",
        help="Quantise the text backbone's weights at load: fp8 (activations too; cards from "
        "compute capability 8.9 on), int8 or int4. Default: not at all.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]
PackedCache = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Keep quantised weights in this folder, for the next start on a CPU. "
        "Default: they are made anew.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
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
MaxNumSeqs = Annotated[
    int, typer.Option(min=1, help="Sequences in one step.", rich_help_panel=MEMORY_PANEL)
]
MaxNumBatchedTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tokens in one step, prompts and answers together.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
BlockSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tokens in one block of the KV cache, rounded up to a multiple of what the attention "
        "backend takes (flash-attn and varlen: 256).",
        rich_help_panel=MEMORY_PANEL,
    ),
]
AttentionBackend = Annotated[
    str,
    typer.Option(
        metavar="|".join(ATTENTION_BACKENDS),
        help="What computes attention; auto takes the first of the others that is installed and "
        "can serve the model on this device. The log says which, and why.",
        rich_help_panel=MODEL_PANEL,
    ),
]


def check_slowdown(value: float | None) -> float | None:
    """The value of `--max-decode-slowdown`, or None where it isn't given.

    Raises:
        typer.BadParameter: it isn't above 1; the message names the flag.
    """
    if value is not None and not value > 1:  # nan isn't
        raise typer.BadParameter(f"{value:g} isn't above 1. inf is no limit.")
    return value


SLOWDOWN_HELP = (
    "Longest a step may take while answers stream, as a multiple of the same step without new "
    "prompts and images. 1.25: even streams, slow first tokens; 3: the reverse; inf: no limit. "
    "Must be above 1."
)
MaxDecodeSlowdown = Annotated[
    float,
    typer.Option(callback=check_slowdown, help=SLOWDOWN_HELP, rich_help_panel=MEMORY_PANEL),
]
KVCacheMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Size of the KV cache: 512MiB, 2GiB, or bytes. Default: what a trial run leaves.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
KVCacheDtype = Annotated[
    Literal["auto", "fp8", "fp8_e4m3"],
    typer.Option(
        help="Type of the KV cache; auto is that of the weights, fp8 (e4m3, scale 1) takes half.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
EnablePrefixCaching = Annotated[
    bool,
    typer.Option(
        help="Keep what was computed of prompts for others that begin alike.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
EncoderCacheMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="For features of images, kept for prompts that bring the same ones. "
        "Default: 128MiB, or what a step needs.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MMProcessorCacheMemory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="For images as the image processor made them, in each of the two processes; "
        "0 keeps none.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
AsyncScheduling = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Prepare each step while the device computes the one before it. Default: on a CUDA "
        "device, without --speculative-config.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="Capture no graphs of decode steps: a faster start and less memory, slower decodes.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MemoryUtilization = Annotated[
    float,
    typer.Option(
        "--memory-utilization",
        "--gpu-memory-utilization",
        min=0.01,
        max=1.0,
        help="Share of the device's memory to use.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
AllowedMediaDomains = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST",
        help="Fetch images from this host, for http and https URLs: example.com, *.example.com "
        "(all below it), example.com:8443. Public addresses only, whatever the name says. "
        "Repeatable, or with commas. Default: none are fetched.",
        show_default=False,
        rich_help_panel=IMAGES_PANEL,
    ),
]
AllowedLocalMediaPath = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Read images from this folder, for URLs such as file:///folder/image.png: whoever "
        "may ask can then see what is in it. Default: no files are read.",
        show_default=False,
        rich_help_panel=IMAGES_PANEL,
    ),
]
SpeculativeConfig = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Guess an answer's next tokens where it quotes what came before: "
        '{"method": "ngram", "num_speculative_tokens": 5}; also prompt_lookup_max (4) and '
        "prompt_lookup_min (2). Changes no answer, up to rounding.",
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


_SIZES = {"kv_cache_memory": 1, "encoder_cache_memory": 1, "mm_processor_cache_memory": 0}  # least


def engine_options(**flags: Any) -> dict[str, Any]:
    """Fields of `EngineConfig` from the values of flags by their names.

    Sizes, `speculative_config` and `plugin` are read; the others are taken as they are. A size that
    is None stays None.

    Raises:
        StartupError: one can't be read.
    """
    fields = dict(flags)
    for name in _SIZES.keys() & fields.keys():
        if fields[name] is not None:
            flag = f"--{name.replace('_', '-')}"
            fields[name] = parse_size(fields[name], flag, least=_SIZES[name])
    fields["plugins"] = tuple(fields.pop("plugin", None) or ())
    return fields | parse_speculation(fields.pop("speculative_config", None))


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


def check_media(domains: list[str] | None, folder: str | None) -> None:
    """Refuse `--allowed-media-domains` and `--allowed-local-media-path` before a model is loaded.

    Raises:
        StartupError: one can't be read, there is no such folder, or https can't be checked.
    """
    if domains:
        from mm_engine.inputs.fetch import authorities
        from mm_engine.inputs.remote_urls import parse_allowed_hosts

        parse_allowed_hosts(domains)
        authorities()
    if folder is not None:
        from mm_engine.inputs.local_files import MediaFolder

        MediaFolder(folder)
