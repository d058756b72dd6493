"""The command `engine chat` and its flags."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mm_engine.cli import options
from mm_engine.cli.model_choice import choose_model
from mm_engine.errors import StartupError

if TYPE_CHECKING:
    from mm_engine.cli.chat.messages import Model

CONVERSATION_PANEL = "Conversation"
HINT = "/image PATH attaches a picture, /help lists all commands, Ctrl-D leaves."


def chat(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint's folder, a Hub id such as org/name, or a bundled demo's name. "
            "Without it, the demo of an installed plugin. With --url, a name that the server has.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Talk to this server, http://127.0.0.1:8000 say, instead of loading a model: "
            "`engine serve`, or another that speaks OpenAI's API.",
            show_default=False,
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MM_ENGINE_API_KEY",
            show_default=False,
            help="The server's key. Set the variable rather than the flag, which shows in the "
            "process list.",
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = None,
    named_model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="The same as MODEL. Default with --url: the first that the server names.",
            show_default=False,
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = None,
    system: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="The system message: how to answer. Not every model's chat template takes one.",
            show_default=False,
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest answer; default: up to the model's length.",
            show_default=False,
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=100.0,
            help="0 takes the likeliest token each time; 0.7 varies its words.",
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Draw from the likeliest tokens that together have this probability.",
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            help="Where drawing starts: the same conversation is answered the same way again. "
            "Each answer counts on from it. For dummy weights, too.",
            rich_help_panel=CONVERSATION_PANEL,
        ),
    ] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    attention_backend: options.AttentionBackend = "auto",
    tensor_parallel_size: options.TensorParallelSize = 1,
    quantization: options.Quantization = None,
    packed_cache: options.PackedCache = None,
    max_model_len: options.MaxModelLen = None,
    load_format: options.LoadFormat = "auto",
    chat_template: options.ChatTemplate = None,
    plugin: options.Plugins = None,
    limit_mm_per_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="image=N|JSON",
            help='Most images in one conversation: image=4, or {"image": 4}. Default: 8.',
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 2048,
    kv_cache_memory: options.KVCacheMemory = None,
    memory_utilization: options.MemoryUtilization = 0.9,
    enforce_eager: options.EnforceEager = False,
    kv_cache_dtype: options.KVCacheDtype = "auto",
) -> None:
    """Talk with a model in the terminal, about pictures too.

    [bold]engine chat[/bold] loads the demo of an installed plugin;
    [bold]engine chat org/name[/bold] a checkpoint from the Hub;
    [bold]engine chat --url http://127.0.0.1:8000[/bold] talks to a server that runs.

    Then type a question. [bold]/image picture.png[/bold] attaches a picture to it,
    Ctrl-C stops an answer, [bold]/help[/bold] lists the other commands.

    In a script each line is a question or a command, stdout has only answers,
    and the exit code is 1 if one failed:
    [bold]echo "What is it?" | engine chat --url http://127.0.0.1:8000[/bold]
    """
    from mm_engine.cli.chat.session import Session
    from mm_engine.sampling_params import SamplingParams

    if model is not None and named_model is not None:
        raise StartupError("two models are named: MODEL and --model. Leave one of them out.")
    name = model if model is not None else named_model
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    engine_flags = {
        "dtype": dtype,
        "device": device,
        "attention_backend": attention_backend,
        "tensor_parallel_size": tensor_parallel_size,
        "quantization": quantization,
        "packed_cache": packed_cache,
        "max_model_len": max_model_len,
        "load_format": load_format,
        "plugin": plugin,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_memory": kv_cache_memory,
        "memory_utilization": memory_utilization,
        "enforce_eager": enforce_eager,
        "kv_cache_dtype": kv_cache_dtype,
    }
    opened: AbstractContextManager[Model]
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    signal.signal(signal.SIGTERM, _leave)
    if url is not None:
        loading = (*engine_flags, "chat_template", "limit_mm_per_prompt")
        _refuse(context, loading, "is for a model that is loaded here, not for a server's")
        from mm_engine.cli.chat.remote import connected

        opened = connected(url, api_key, name)
    else:
        _refuse(context, ("api_key",), "is for a server: --url")
        opened = _load(name, seed, chat_template, limit_mm_per_prompt, engine_flags, interactive)
    with opened as talker:
        if interactive:
            _greet(talker)
        code = Session(talker, params, system, interactive=interactive).run()
    raise typer.Exit(code)


@contextlib.contextmanager
def _load(
    model: str | None,
    seed: int,
    chat_template: str | None,
    limits: str | None,
    engine_flags: dict[str, Any],
    interactive: bool,
) -> Iterator[Model]:
    from mm_engine.cli.chat.local import loaded
    from mm_engine.config import EngineConfig

    name, remark = choose_model(model)
    if remark and interactive:
        typer.echo(remark, err=True)
    config = EngineConfig(
        model=name,
        **options.engine_options(**engine_flags),
        limit_mm_per_prompt=options.parse_limits(limits),
        seed=seed,
        max_num_seqs=1,
        progress=interactive,
    )
    with loaded(config, chat_template) as talker:
        yield talker


def _greet(talker: Model) -> None:
    from mm_engine.cli.chat.showing import remark

    remark(f"{talker.description}\n{HINT}")
    if talker.example is not None:
        remark(f"To try it: /image {talker.example}")


def _refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Take no flag that would do nothing.

    Raises:
        StartupError: one of `names` is on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise StartupError(f"--{name.replace('_', '-')} {why}. Leave it out.")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """On SIGTERM unwind, so that no process is left."""
    raise SystemExit(128 + number)
