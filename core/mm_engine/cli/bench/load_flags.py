"""Flags that say what is asked (`WorkloadFlags`), and whom and when (`LoadFlags`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import typer

from mm_engine.cli.bench.bodies import CHAT, COMPLETIONS, Endpoint
from mm_engine.cli.bench.flags import FlagMisuse
from mm_engine.cli.bench.workload import ImageSize, Shape, read_image_size

WORKLOAD_PANEL = "Workload"
LOAD_PANEL = "Server and load"
DEFAULT_SIZE = "336x336"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFlags:
    """What is asked. Prompts are random and share nothing unless a flag says so."""

    input_len: Annotated[
        int,
        typer.Option(
            min=1,
            help="Text tokens of a prompt, with what a chat template writes; images come on top.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = 128
    output_len: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of an answer, which doesn't end before.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = 128
    prefix_len: Annotated[
        int,
        typer.Option(
            min=0,
            help="Tokens that all prompts begin with, on top of --input-len: a prefix cache "
            "computes them once.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = 0
    num_images: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Images in a prompt. Default: 1 with --image-size, else 0.",
            show_default=False,
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH[:WEIGHT]",
            help=f"Pixels of an image. Repeatable: sizes are drawn, 672x336:3 three times as often "
            f"as 336x336. Default: {DEFAULT_SIZE}.",
            show_default=False,
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    image_repeats: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of prompts that bring the images of an earlier one: an encoder cache "
            "keeps their features.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = 0.0
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of the workload, and of dummy weights: the same seed, the same prompts.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = 0

    def shape(self) -> Shape:
        """The workload's shape.

        Raises:
            FlagMisuse: a size can't be read, or flags about images have no image to apply to.
        """
        num_images = self.num_images
        if num_images is None:
            num_images = 1 if self.image_size else 0
        if num_images == 0 and (self.image_size or self.image_repeats):
            flag = "--image-size" if self.image_size else "--image-repeats"
            raise FlagMisuse(f"{flag} has no effect: prompts hold 0 images. Raise --num-images.")
        sizes: tuple[ImageSize, ...] = ()
        if num_images:
            try:
                sizes = tuple(map(read_image_size, self.image_size or [DEFAULT_SIZE]))
            except ValueError as error:
                raise FlagMisuse(str(error)) from None
        return Shape(
            input_len=self.input_len,
            output_len=self.output_len,
            prefix_len=self.prefix_len,
            num_images=num_images,
            image_sizes=sizes,
            image_repeats=self.image_repeats,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """Which server is asked, and when."""

    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A running server, such as http://127.0.0.1:8000. Without it, one is started for "
            "the measurement and ended after it.",
            show_default=False,
            rich_help_panel=LOAD_PANEL,
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MM_ENGINE_API_KEY",
            help="The running server's key. Set the variable rather than the flag, "
            "which shows in the process list.",
            show_default=False,
            rich_help_panel=LOAD_PANEL,
        ),
    ] = dataclasses.field(default=None, repr=False)
    endpoint: Annotated[
        Endpoint,
        typer.Option(help="Which API is asked; images need chat.", rich_help_panel=LOAD_PANEL),
    ] = "/v1/chat/completions"
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A checkpoint's folder or Hub id whose tokenizer counts the prompts' tokens. "
            "Default: the model's.",
            show_default=False,
            rich_help_panel=LOAD_PANEL,
        ),
    ] = None
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Requests to send.", rich_help_panel=LOAD_PANEL)
    ] = 100
    num_warmups: Annotated[
        int,
        typer.Option(min=0, help="Requests before, not measured.", rich_help_panel=LOAD_PANEL),
    ] = 1
    request_rate: Annotated[
        float,
        typer.Option(
            help="Requests a second, on average, whether or not earlier ones are answered; "
            "inf sends all at once.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = math.inf
    burstiness: Annotated[
        float,
        typer.Option(
            help="1 is a Poisson process; less comes in bursts, more is more even.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = 1.0
    max_concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most requests in flight; the next is sent when one ends. Waiting for that "
            "isn't part of a latency.",
            show_default=False,
            rich_help_panel=LOAD_PANEL,
        ),
    ] = None

    def check(self, shape: Shape, engine_flags: list[str]) -> None:
        """See that the flags fit each other, the workload, and those given for an engine.

        Raises:
            FlagMisuse: they don't.
        """
        if self.endpoint == COMPLETIONS and shape.num_images:
            raise FlagMisuse(f"--endpoint takes no images: {COMPLETIONS}. Take {CHAT}.")
        if not self.request_rate > 0:
            rate = f"{self.request_rate:g}"
            raise FlagMisuse(f"--request-rate is out of range: {rate}. Give more than 0, or inf.")
        if not 0 < self.burstiness < math.inf:
            raise FlagMisuse(
                f"--burstiness is out of range: {self.burstiness:g}. Give more than 0."
            )
        if self.base_url and engine_flags:
            raise FlagMisuse(
                f"{engine_flags[0]} has no effect on a running server: {self.base_url}. "
                "Leave out one of the two."
            )

    def __str__(self) -> str:
        """When requests are sent, for people."""
        together = math.isinf(self.request_rate)
        parts = ["all at once" if together else f"{self.request_rate:g} a second"]
        if self.burstiness != 1.0 and not together:
            parts.append(f"burstiness {self.burstiness:g}")
        if self.max_concurrency:
            parts.append(f"at most {self.max_concurrency} in flight")
        return ", ".join(parts)
