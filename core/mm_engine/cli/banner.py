"""What `engine serve` prints when it is ready: what is served, by whom, and how to ask it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mm_engine.cli.model_choice import example_picture, other_demos

if TYPE_CHECKING:
    from mm_engine.server.run import Started

QUESTION = "Describe the image."


def print_banner(started: Started) -> None:
    """Print the banner to stdout."""
    info, settings = started.info, started.settings
    rows = {
        "model": ", ".join(settings.served_model_names),
        "plugin": f"{info.plugin} · {info.architecture}",
        "size": f"{_short(info.num_parameters)} parameters, {info.dtype} on {info.device}",
        "KV cache": f"{info.kv_cache_tokens:,} tokens · up to {info.max_model_len:,} per request",
        "address": f"{started.url}/v1",
    }
    others = other_demos(started.pipeline.opened.config.model)
    if others:
        rows["bundled too"] = " · ".join(f"engine serve {name}" for name in others)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(Text(name, "dim"), Text(value))
    picture = example_picture(started.pipeline.ctx.checkpoint) or Path("picture.png")
    key = bool(settings.api_keys)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(Text("\nTry it:", "dim"))
    console.print(Text(curl_line(started.url, settings.served_model_names[0], picture, key=key)))
    console.print()
    console.file.flush()


def curl_line(url: str, model: str, picture: Path, *, key: bool = False) -> str:
    """A line for a POSIX shell (Linux, macOS) that asks about `picture`.

    The body goes through a pipe: as an argument, Linux takes no picture of over 96 KB.
    """
    mark = "PICTURE"
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{mark}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": parts}]})
    before, after = (shlex.quote(half) for half in body.split(mark))
    encoded = f"base64 < {shlex.quote(str(picture))} | tr -d '\\n'"
    header = ' -H "Authorization: Bearer $MM_ENGINE_API_KEY"' if key else ""
    return (
        f"{{ printf %s {before}; {encoded}; printf %s {after}; }} |"
        f" curl -s {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d @-"
    )


def _short(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
