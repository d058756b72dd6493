"""`engine plugins trace`: what a plugin's hooks make of one request."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mm_engine.cli import options
from mm_engine.cli.contained import Announce, Show, contained
from mm_engine.cli.model_choice import choose_model
from mm_engine.cli.pictures import read_picture
from mm_engine.plugins.printable import printable, to_json

if TYPE_CHECKING:
    from mm_engine.config import EngineConfig
    from mm_engine.testing.trace import TokenRow, Trace

OWN_SIZE = (448, 336)  # pixels, width and height; not square, so that sides can't be swapped unseen


def trace(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint's folder, a Hub id, or a bundled demo's name. Default: the demo.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("-p", "--prompt", metavar="TEXT", help="The question.")
    ] = "What is in the picture?",
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "-i",
            "--image",
            metavar="FILE",
            help="A picture of the request. Repeatable. Default: one of colours, made here.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run", help="Load the weights, too, and compute the first token: time embed_images."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    plugin: options.Plugins = None,
) -> None:
    """Send one request through a plugin's hooks and show what each of them made of it.

    Token ids before and after the placeholders are expanded, each item's range and tensors, and
    the time that each hook took. An error of a hook ends the trace and shows where it came to.

    [bold]engine plugins trace ./checkpoint --image picture.png --run[/bold]
    """
    from mm_engine.config import EngineConfig

    def work(announce: Announce) -> tuple[int, Show]:
        name, remark = choose_model(model)
        if remark:
            typer.echo(remark, err=True)
        config = EngineConfig(
            model=name,
            dtype=dtype,
            device=device,
            limit_mm_per_prompt={"image": len(image or ()) or 1},
            plugins=tuple(plugin or ()),
            progress=not as_json,
        )
        return _traced(config, prompt, image or [], run, announce, as_json)

    contained(work, f"for {model or 'the demo'}", as_json=as_json)


def _traced(
    config: EngineConfig,
    prompt: str,
    images: list[Path],
    run: bool,
    announce: Announce,
    as_json: bool,
) -> tuple[int, Show]:
    from mm_engine.testing.trace import trace as trace_request

    pictures = [read_picture(path) for path in images] or [_own_picture()]
    found = trace_request(
        config, prompt, pictures, run=run, on_plugin=lambda label: announce(f"plugin: {label}")
    )

    def show(out: TextIO) -> None:
        if as_json:
            out.write(to_json({"own_picture": not images, **dataclasses.asdict(found)}) + "\n")
            return
        console = Console(file=out, highlight=False)
        if not images:
            width, height = OWN_SIZE
            console.print(f"No --image was given: this is a picture of {width}×{height} pixels.")
        render(found, console)

    return 0 if found.error is None else 1, show


def _own_picture() -> Any:
    """Red, green, blue and white quarters."""
    from PIL import Image

    picture = Image.new("RGB", (2, 2))
    picture.putdata([(220, 40, 40), (40, 180, 60), (40, 80, 220), (255, 255, 255)])
    return picture.resize(OWN_SIZE, Image.Resampling.NEAREST)


def render(found: Trace, console: Console) -> None:
    """Print a trace."""
    console.print(f"[bold]{_safe(found.model)}[/bold] ({_safe(found.architecture)})", end="")
    console.print(f" · plugin [bold]{_safe(found.plugin)}[/bold]")
    for title, num_tokens, rows in (
        ("Before the input processor", found.num_before, found.before),
        ("After it", found.num_after, found.after),
    ):
        if rows:
            console.print(_tokens(f"{title}: {num_tokens} tokens", rows))
    if found.items:
        console.print(_items(found))
    if found.hooks:
        console.print(_hooks(found))
    if found.run is not None:
        steps = "" if found.run.num_steps == 1 else f", of {found.run.num_steps} for the prompt"
        console.print(
            f"\nFirst step: {_milliseconds(found.run.first_step_seconds)} ms{steps}. "
            f"First token: {found.run.token_id} {escape(repr(found.run.text))}."
        )
    if found.error is not None:
        console.print(f"\n[bold red]Here it ended:[/bold red] {_safe(found.error)}")


def _tokens(title: str, rows: list[TokenRow]) -> Table:
    table = Table("from", "ids", "text", "", title=title, title_justify="left", box=None)
    for row in rows:
        ids = " ".join(map(str, row.token_ids))
        times = f"×{row.count}" if row.count > 1 else ""
        text = escape(repr(row.text)[1:-1])
        style = "green" if row.item else None
        table.add_row(str(row.position), ids + times, text + times, row.item or "", style=style)
    return table


def _items(found: Trace) -> Table:
    table = Table(title="Items", title_justify="left", box=None)
    for name in ("item", "pixels", "range", "tokens", "at most", "tensors", "content key"):
        table.add_column(name, overflow="fold")
    for item in found.items:
        tensors = "\n".join(
            f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in item.tensors
        )
        table.add_row(
            f"{item.modality} {item.index}",
            f"{item.width}×{item.height}",
            f"{item.offset}–{item.offset + item.num_tokens - 1}",
            str(item.num_tokens),
            str(item.max_tokens),
            _safe(tensors),
            f"{item.content_key[:12]}…",
        )
    return table


def _hooks(found: Trace) -> Table:
    table = Table(title="Hooks", title_justify="left", box=None)
    table.add_column("hook", overflow="fold")
    table.add_column("where", overflow="fold")
    table.add_column("calls", justify="right", overflow="fold")
    table.add_column("ms", justify="right")
    table.add_column("ms, again", justify="right")
    for hook in found.hooks:
        again = "" if hook.again_seconds is None else _milliseconds(hook.again_seconds)
        first = _milliseconds(hook.first_seconds)
        table.add_row(hook.hook, _safe(hook.place), str(hook.num_calls), first, again)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"


def _safe(text: str) -> str:
    return escape(printable(text))
