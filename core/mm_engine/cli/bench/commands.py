"""The commands of `engine bench`: flags in, a measurement, a table and files out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_engine.cli.bench.engine_flags import EngineFlags
from mm_engine.cli.bench.flags import (
    RESULT_PANEL,
    FlagMisuse,
    ResultFlags,
    read_metrics,
    read_percentiles,
    with_flags,
)
from mm_engine.cli.bench.load_flags import WORKLOAD_PANEL, LoadFlags, WorkloadFlags
from mm_engine.cli.bench.summary import METRICS, PERCENTILES
from mm_engine.cli.bench.workload import Shape
from mm_engine.errors import MMEngineError

if TYPE_CHECKING:
    from mm_engine import LLM
    from mm_engine.cli.bench.online import LoadRun
    from mm_engine.cli.bench.report import Bar

MetricPercentiles = Annotated[
    str,
    typer.Option(
        metavar="LIST", help="Percentiles to show and to record.", rich_help_panel=RESULT_PANEL
    ),
]

app = typer.Typer(
    help="Measure the engine, a server under load, or how long a start takes.",
    no_args_is_help=True,
)


@app.command()
@with_flags
def latency(
    *,
    workload: WorkloadFlags,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts in a batch.", rich_help_panel=WORKLOAD_PANEL)
    ] = 8,
    num_iters: Annotated[
        int, typer.Option(min=1, help="Batches to measure.", rich_help_panel=WORKLOAD_PANEL)
    ] = 30,
    num_iters_warmup: Annotated[
        int,
        typer.Option(min=0, help="Batches before, not measured.", rich_help_panel=WORKLOAD_PANEL),
    ] = 10,
    results: ResultFlags,
    metric_percentiles: MetricPercentiles = PERCENTILES,
    engine: EngineFlags,
) -> None:
    """How long one batch takes, from prompts to answers. No server: `LLM.generate`.

    Each batch has new prompts, so that no cache answers for the engine.

    [bold]engine bench latency --batch-size 1 --input-len 512 --output-len 64[/bold]

    [bold]engine bench latency -m org/name --load-format dummy --image-size 336x336[/bold]
    """
    from mm_engine.cli.bench import offline, plot, record, report
    from mm_engine.cli.bench.summary import summarize

    results.check()
    engine = engine.of_llm()
    shape = workload.shape()
    percentiles = read_percentiles(metric_percentiles)
    if batch_size > engine.max_num_seqs:
        raise FlagMisuse(
            f"--batch-size is larger than a step: {batch_size} of {engine.max_num_seqs} sequences. "
            "Raise --max-num-seqs."
        )
    llm = _open_llm(engine, shape)
    with report.progress_bar("Measuring", num_iters_warmup + num_iters) as bar:
        run = offline.measure_latency(
            llm,
            shape,
            batch_size=batch_size,
            num_iters=num_iters,
            num_iters_warmup=num_iters_warmup,
            tick=bar.tick,
        )
    figures = record.latency_figures(run, batch_size, percentiles)
    title = f"{engine.name()} · {shape}"
    summary = summarize(run.seconds, percentiles)
    assert summary is not None
    report.print_latency(title, batch_size, summary, figures)
    arguments = record.arguments_of(
        engine,
        workload,
        model=engine.name(),
        batch_size=batch_size,
        num_iters=num_iters,
        num_iters_warmup=num_iters_warmup,
    )
    _write(results, "latency", arguments, figures, lambda path: plot.plot_latency(run, title, path))


@app.command()
@with_flags
def throughput(
    *,
    workload: WorkloadFlags,
    num_prompts: Annotated[
        int,
        typer.Option(min=1, help="Prompts, all given at once.", rich_help_panel=WORKLOAD_PANEL),
    ] = 100,
    num_warmups: Annotated[
        int,
        typer.Option(min=0, help="Prompts before, not measured.", rich_help_panel=WORKLOAD_PANEL),
    ] = 1,
    results: ResultFlags,
    engine: EngineFlags,
) -> None:
    """How many prompts and tokens a second the engine makes of all it can take. No server.

    [bold]engine bench throughput --num-prompts 200 --input-len 512 --output-len 128[/bold]

    [bold]engine bench throughput --image-size 336x336 --image-repeats 0.5[/bold]
    """
    from mm_engine.cli.bench import offline, plot, record, report

    results.check()
    engine = engine.of_llm()
    shape = workload.shape()
    llm = _open_llm(engine, shape)
    run = offline.measure_throughput(
        llm,
        shape,
        num_prompts=num_prompts,
        num_warmups=num_warmups,
        progress=report.on_terminal(),
    )
    figures = record.throughput_figures(run)
    title = f"{engine.name()} · {num_prompts} prompts of {shape}"
    report.print_throughput(title, figures)
    arguments = record.arguments_of(
        engine,
        workload,
        model=engine.name(),
        num_prompts=num_prompts,
        num_warmups=num_warmups,
    )
    _write(
        results,
        "throughput",
        arguments,
        figures,
        lambda path: plot.plot_throughput(run, title, path),
    )
    _fail_if_nothing(figures)


@app.command()
@with_flags
def serve(
    *,
    load: LoadFlags,
    workload: WorkloadFlags,
    results: ResultFlags,
    percentile_metrics: Annotated[
        str,
        typer.Option(metavar="LIST", help="Metrics to show.", rich_help_panel=RESULT_PANEL),
    ] = ",".join(METRICS),
    metric_percentiles: MetricPercentiles = PERCENTILES,
    engine: EngineFlags,
) -> None:
    """What clients of a server see under a load: TTFT, TPOT, ITL, E2E, and what failed.

    An open load (--request-rate) shows whether the server keeps up; a closed one
    (--max-concurrency) how it does with so many clients.

    [bold]engine bench serve --request-rate 4 --num-prompts 200[/bold]

    [bold]engine bench serve --max-concurrency 16 --image-size 336x336 --plot load.png[/bold]

    [bold]engine bench serve --base-url http://127.0.0.1:8000 --json load.json[/bold]
    """
    from mm_engine.cli.bench import online, plot, record, report

    results.check()
    shape = workload.shape()
    percentiles = read_percentiles(metric_percentiles)
    metrics = read_metrics(percentile_metrics)
    load.check(shape, engine.given())
    if not load.base_url:  # of a server that runs already nothing is known
        engine = engine.of_server()
    online.allow_connections(min(load.num_prompts, load.max_concurrency or load.num_prompts))
    with report.progress_bar("Starting the server", load.num_prompts) as bar:
        run, facts = _run_load(load, shape, engine, bar)
    figures = record.load_figures(run, percentiles)
    title = f"{facts['model']} · {load.num_prompts} requests of {shape} · {load}"
    summaries = record.load_summaries(run, percentiles)
    report.print_load(title, figures, {metric: summaries[metric] for metric in metrics})
    if remark := report.cache_remark(shape, figures):
        typer.echo(remark, err=True)
    arguments = record.arguments_of(engine, workload, load, **facts)
    _write(results, "serve", arguments, figures, lambda path: plot.plot_load(run, title, path))
    _fail_if_nothing(figures)


@app.command()
@with_flags
def startup(
    *,
    num_iters: Annotated[int, typer.Option(min=1, help="Starts to measure.")] = 3,
    results: ResultFlags,
    engine: EngineFlags,
) -> None:
    """How long a server takes from its process's start until it takes requests, and with what.

    The first start may read from the disk what later ones find in memory.

    [bold]engine bench startup --num-iters 5[/bold]
    """
    from mm_engine.cli.bench import plot, record, report
    from mm_engine.cli.bench.startup import measure_startup

    results.check()
    engine = engine.of_server()
    with _stopped_by_signals(), report.progress_bar("Starting", num_iters) as bar:
        starts = measure_startup(engine.name(), engine.options(), num_iters, bar.tick)
    figures = record.startup_figures(starts)
    title = f"{engine.name()} · from the process's start until requests are taken"
    report.print_startup(title, starts, figures)
    arguments = record.arguments_of(engine, model=engine.name(), num_iters=num_iters)
    _write(
        results, "startup", arguments, figures, lambda path: plot.plot_startup(starts, title, path)
    )


def _open_llm(engine: EngineFlags, shape: Shape) -> LLM:
    from mm_engine import LLM
    from mm_engine.cli.bench.report import on_terminal

    options = engine.options(num_images=shape.num_images)
    return LLM(engine.name(), **options, seed=shape.seed, progress=on_terminal())


def _run_load(
    load: LoadFlags, shape: Shape, engine: EngineFlags, bar: Bar
) -> tuple[LoadRun, dict[str, Any]]:
    """Send the load to the server named, or to one of its own; and facts about that server."""
    from mm_engine.cli.bench.online import Target, measure_load, public_address
    from mm_engine.cli.bench.server import OwnServer

    if load.base_url:
        target = Target(load.base_url, engine.model, load.tokenizer, load.api_key)
        run = asyncio.run(measure_load(target, load, shape, bar.tick, bar.status))
        return run, {"base_url": public_address(load.base_url), "model": run.model}
    name = engine.name()
    options = {**engine.options(num_images=shape.num_images), "seed": shape.seed}
    # All prompts may be waiting at once: to turn them away is not what is measured here.
    num_requests = 1 + load.num_warmups + load.num_prompts
    with (
        _stopped_by_signals(),
        OwnServer(name, options, max_queued_requests=num_requests) as server,
    ):
        target = Target(server.url, server.model, load.tokenizer or name)
        run = asyncio.run(measure_load(target, load, shape, bar.tick, bar.status))
    return run, {"base_url": None, "model": name}


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that no server is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write(
    results: ResultFlags,
    command: str,
    arguments: dict[str, Any],
    figures: dict[str, Any],
    plot: Callable[[Path], None],
) -> None:
    from mm_engine.cli.bench.record import make_record, write_record

    if results.json is not None:
        write_record(make_record(command, arguments, figures), results.json)
    if results.plot is not None:
        plot(results.plot)


def _fail_if_nothing(figures: dict[str, Any]) -> None:
    if figures["answered"] == 0:
        raise MMEngineError(f"no request was answered: {figures['failed']} failed. See why above.")
