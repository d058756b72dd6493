"""`engine serve`: a model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mm_engine.cli import options
from mm_engine.cli.access import KEY_VARIABLE, api_keys, check_tls
from mm_engine.cli.model_choice import choose_model, model_names
from mm_engine.config import (
    MAX_OUTPUT_INTERVAL,
    MIN_QUEUED_REQUESTS,
    SERVED_DECODE_SLOWDOWN,
    SERVED_OUTPUT_INTERVAL,
    EngineConfig,
    default_queued_requests,
)

SERVER_PANEL = "Server"
ACCESS_PANEL = "Access"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint's folder, a Hub id such as org/name, or a bundled demo's name. "
            "Without it, the demo of an installed plugin is served.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 lets others in: set a key then.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="0 picks a free one.", rich_help_panel=SERVER_PANEL),
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="The name that clients use; default: the model's. Repeatable.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=KEY_VARIABLE,
            show_default=False,
            help="Require this key, or one of these: repeatable, in the variable with spaces "
            "between them. Rather than the flag, which shows in the process list, set the "
            "variable or use --api-key-file.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Require one of the keys in this file: one a line, # begins a comment.",
            show_default=False,
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Speak HTTPS, with this certificate (PEM, with those it hangs on).",
            show_default=False,
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="The certificate's private key (PEM); default: in --ssl-certfile.",
            show_default=False,
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let web pages of this origin, such as https://example.com, ask from a browser "
            "(CORS); * lets all. Repeatable. Default: none.",
            show_default=False,
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    max_requests_per_key: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests of one API key at once; more get status 429. Without keys, all clients "
            "count as one.",
            show_default=False,
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    max_requests_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests of one API key in a minute, likewise.",
            show_default=False,
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None,
    limit_mm_per_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="image=N|JSON",
            help='Most images in one request: image=4, or {"image": 4}. Default: 8.',
            rich_help_panel=options.IMAGES_PANEL,
        ),
    ] = None,
    allowed_media_domains: options.AllowedMediaDomains = None,
    allowed_local_media_path: options.AllowedLocalMediaPath = None,
    allowed_mm_processor_kwargs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Let requests set this option of the image processor, in mm_processor_kwargs. "
            "Repeatable. Default: none.",
            show_default=False,
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    max_connections: Annotated[
        int,
        typer.Option(
            min=1,
            help="Connections at once; one more takes the place of the longest idle, or gets "
            "status 503 if all have a request.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 1024,
    max_queued_requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts in flight, waiting or running; more get status 429. Default: as many as "
            f"run at once (--max-num-seqs), at least {MIN_QUEUED_REQUESTS}; more let some wait.",
            show_default=False,
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    max_queued_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of prompts that wait for the first token of their answer; more get status "
            "429.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 131_072,
    max_queue_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=options.MAX_SECONDS,
            metavar="SECONDS",
            help="Longest wait for the first token of an answer that a request may have to expect, "
            "by those that wait already and the pace at which answers have begun lately; more get "
            "status 429. Bounds latency where the other two bound memory.",
            show_default=False,
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    max_request_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=options.MAX_SECONDS,
            metavar="SECONDS",
            help="Longest time from a request's arrival to the end of its answer; then status 504 "
            "ends it. A request may ask for less: timeout in its body, or X-Request-Timeout.",
            show_default=False,
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=options.MAX_SECONDS,
            metavar="SECONDS",
            help="How long answers may go on after SIGTERM.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 30.0,
    max_engine_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often within ten minutes the engine process is started again after it has "
            "died; then the server ends with status 1. 0: it ends the first time.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 3,
    grammar_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=options.MAX_SECONDS,
            metavar="SECONDS",
            help="How long the grammar of one request for structured output may take to compile.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 5.0,
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"],
        typer.Option(
            help="fcfs: requests run in order of arrival. priority: the lower priority number "
            "first, which lets any client's request preempt others: for trusted clients.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = "fcfs",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Least level that is logged.", rich_help_panel=SERVER_PANEL),
    ] = "info",
    log_format: Annotated[
        Literal["auto", "text", "json"],
        typer.Option(
            envvar="MM_ENGINE_LOG_FORMAT",
            help="text: lines for people. json: an object a line, of all the server's processes. "
            "auto: text on a terminal, json elsewhere.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = "auto",
    disable_log_stats: Annotated[
        bool,
        typer.Option(
            "--disable-log-stats",
            help="Don't log a line on the load every 10 seconds.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = False,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send a trace of each completion request there, by OpenTelemetry's protocol over "
            "HTTP: how long each part took, not what was said. Needs mm-engine\\[otel]. "
            "Default: no traces.",
            show_default=False,
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
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
    hook_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=options.MAX_SECONDS,
            metavar="SECONDS",
            help="How long one call of a plugin's hook may take; then its request fails.",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = 30.0,
    output_interval: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=MAX_OUTPUT_INTERVAL,
            metavar="SECONDS",
            help="Tokens of a stream that come within so long share an event, but the first.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = SERVED_OUTPUT_INTERVAL,
    step_timeout: Annotated[
        float,
        typer.Option(
            min=1.0,
            max=86400.0,
            metavar="SECONDS",
            help="How long one step of the engine may take, a model's encoder included; an engine "
            "that takes longer is stuck: it is killed and started again.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 300.0,
    seed: options.Seed = 0,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 2048,
    block_size: options.BlockSize = 16,
    max_decode_slowdown: options.MaxDecodeSlowdown = SERVED_DECODE_SLOWDOWN,
    kv_cache_memory: options.KVCacheMemory = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    enable_prefix_caching: options.EnablePrefixCaching = True,
    encoder_cache_memory: options.EncoderCacheMemory = None,
    mm_processor_cache_memory: options.MMProcessorCacheMemory = "256MiB",
    speculative_config: options.SpeculativeConfig = None,
    async_scheduling: options.AsyncScheduling = None,
    enforce_eager: options.EnforceEager = False,
    memory_utilization: options.MemoryUtilization = 0.9,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does.

    [bold]engine serve[/bold] serves the demo of an installed plugin;
    [bold]engine serve org/name[/bold] a checkpoint from the Hub.
    """
    from mm_engine.cli.banner import print_banner
    from mm_engine.log import format_in_use
    from mm_engine.server.log import configure_logging
    from mm_engine.server.run import serve as run_server
    from mm_engine.server.settings import ServerSettings

    configure_logging(log_level, log_format)
    check_tls(ssl_certfile, ssl_keyfile)
    options.check_media(allowed_media_domains, allowed_local_media_path)
    name, _ = choose_model(model)  # the banner names the other demos
    fields = options.engine_options(
        dtype=dtype,
        device=device,
        attention_backend=attention_backend,
        tensor_parallel_size=tensor_parallel_size,
        quantization=quantization,
        packed_cache=packed_cache,
        max_model_len=max_model_len,
        load_format=load_format,
        plugin=plugin,
        seed=seed,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        max_decode_slowdown=max_decode_slowdown,
        kv_cache_memory=kv_cache_memory,
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=enable_prefix_caching,
        encoder_cache_memory=encoder_cache_memory,
        mm_processor_cache_memory=mm_processor_cache_memory,
        speculative_config=speculative_config,
        async_scheduling=async_scheduling,
        enforce_eager=enforce_eager,
        memory_utilization=memory_utilization,
    )
    config = EngineConfig(
        model=name,
        **fields,
        limit_mm_per_prompt=options.parse_limits(limit_mm_per_prompt),
        hook_timeout=hook_timeout,
        output_interval=output_interval,
        step_timeout=step_timeout,
        progress=format_in_use() == "text",  # no bars between the lines of a program
    )
    names = tuple(served_model_name or ()) or model_names(name)
    settings = ServerSettings(
        served_model_names=names[:1] if not served_model_name else names,
        hidden_model_names=() if served_model_name else names[1:],
        host=host,
        port=port,
        api_keys=api_keys(api_key, api_key_file),
        ssl_certfile=None if ssl_certfile is None else str(ssl_certfile),
        ssl_keyfile=None if ssl_keyfile is None else str(ssl_keyfile),
        allowed_origins=tuple(allowed_origins or ()),
        max_requests_per_key=max_requests_per_key,
        max_requests_per_minute=max_requests_per_minute,
        allowed_media_domains=tuple(allowed_media_domains or ()),
        allowed_local_media_path=allowed_local_media_path,
        allowed_mm_processor_kwargs=tuple(allowed_mm_processor_kwargs or ()),
        chat_template=chat_template,
        max_connections=max_connections,
        max_queued_requests=max_queued_requests or default_queued_requests(max_num_seqs),
        max_queued_tokens=max_queued_tokens,
        max_queue_seconds=max_queue_seconds,
        max_request_seconds=max_request_seconds,
        drain_timeout=drain_timeout,
        max_engine_restarts=max_engine_restarts,
        grammar_timeout=grammar_timeout,
        scheduling_policy=scheduling_policy,
        log_stats=not disable_log_stats,
        otlp_traces_endpoint=otlp_traces_endpoint or None,
    )
    raise typer.Exit(run_server(config, settings, print_banner))
