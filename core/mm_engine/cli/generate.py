"""`engine generate`: one question, one answer, in the terminal."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_engine.cli import options
from mm_engine.cli.model_choice import choose_model
from mm_engine.cli.pictures import read_picture
from mm_engine.engine.launch import Launch, launched
from mm_engine.light_imports import import_transformers

if TYPE_CHECKING:
    from mm_engine.config import EngineConfig
    from mm_engine.sampling_params import SamplingParams


def generate(
    prompt: Annotated[
        str, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "-i",
            "--image",
            metavar="FILE",
            help="A picture to ask about: PNG, JPEG, WebP or GIF. Repeatable.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="A checkpoint's folder, a Hub id, or a bundled demo's name. Default: the demo.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer; default: up to the model's length."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.0,
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
    seed: options.Seed = 0,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 2048,
    kv_cache_memory: options.KVCacheMemory = None,
    memory_utilization: options.MemoryUtilization = 0.9,
    enforce_eager: options.EnforceEager = False,
    kv_cache_dtype: options.KVCacheDtype = "auto",
) -> None:
    """Ask a model one question and print its answer as it comes.

    [bold]engine generate -i picture.png "What colour is the circle?"[/bold]
    """
    from mm_engine.config import EngineConfig
    from mm_engine.sampling_params import SamplingParams

    pictures = [read_picture(path) for path in image or ()]
    name, remark = choose_model(model)
    if remark:
        typer.echo(remark, err=True)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    limits = {"image": len(pictures)}  # without one, startup tries none out: that takes seconds
    fields = options.engine_options(
        dtype=dtype,
        device=device,
        attention_backend=attention_backend,
        tensor_parallel_size=tensor_parallel_size,
        quantization=quantization,
        packed_cache=packed_cache,
        max_model_len=max_model_len,
        max_num_seqs=1,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        memory_utilization=memory_utilization,
        enforce_eager=enforce_eager,
        kv_cache_dtype=kv_cache_dtype,
        seed=seed,
        load_format=load_format,
        plugin=plugin,
    )
    config = EngineConfig(model=name, **fields, limit_mm_per_prompt=limits)
    parts = [{"type": "image", "image": picture} for picture in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds: no process is left
    with launched() as launch:
        asyncio.run(_answer(config, launch, chat_template, messages, params))


async def _answer(
    config: EngineConfig,
    launch: Launch,
    chat_template: str | None,
    messages: list[dict[str, Any]],
    params: SamplingParams,
) -> None:
    import_transformers("mm_engine.inputs.pipeline", "mm_engine.engine.client")
    from mm_engine.engine.client import EngineClient
    from mm_engine.inputs.pipeline import InputPipeline
    from mm_engine.worker.loader import open_model

    pipeline = InputPipeline(open_model(config), chat_template=chat_template)
    prepared = pipeline.prepare_chat(messages)
    pipeline.request(prepared, params)  # too long for the model? Then before it is loaded
    client = await EngineClient.start(
        config, pipeline.dummy_request(), pipeline.plugin.record, launch
    )
    try:
        pipeline.limit_length(client.info.kv_cache_tokens)
        started = False
        async for output in client.generate(pipeline.request(prepared, params)):
            for new in output.outputs:
                text = new.text if started else new.text.lstrip()  # many answers start with a space
                started = started or bool(text)
                typer.echo(text, nl=False)
        typer.echo()
    finally:
        await client.close()
