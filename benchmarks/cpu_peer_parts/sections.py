"""What is measured, section by section. Each adds its rows to the bench."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cpu_peer_parts.bench import Bench, decode_row, rate_of
from cpu_peer_parts.client import Peer, PeerError
from cpu_peer_parts.fleet import LLAMA_CPP, Fleet
from cpu_peer_parts.quantized import quantized
from cpu_peer_parts.rows import OURS, Row, decode_rate, first_seconds, last_seconds, slope, turns
from cpu_peer_parts.sizes import LAUNCH_SECONDS, MEMORY_REST, MEMORY_SHARE, Floors

NO_TOWER = "the GGUF that is made here holds the text backbone only"


def launch(bench: Bench) -> None:
    """From a process's start to its first token: a text prompt, the model not loaded before.

    The first launch is a row of its own: it reads the files and may compile. What an engine keeps
    on disk is there for the later ones, as are the files in memory. An engine's last process is
    kept for the sections that follow.
    """
    sizes, fleet = bench.sizes, bench.fleet
    floor = bench.floors.import_torch_seconds
    first = bench.row("first launch", "first launch to first token", "s", higher=False)
    row = bench.row(
        "launch",
        "first token after launch",
        "s",
        higher=False,
        floor=floor,
        at_most=LAUNCH_SECONDS,
    )
    if LLAMA_CPP in fleet.names():
        try:
            fleet.prepare()
        except PeerError as error:
            for each in (first, row):
                each.missing[LLAMA_CPP] = str(error)

    def seconds(name: str) -> float:
        fleet.close(name)
        peer = fleet.start(name)
        try:
            fleet.load(peer, name)
            fleet.answer(peer, [sizes.text_ids[: sizes.prompt]], 1, [])
        except BaseException:
            peer.close()
            raise
        taken = time.perf_counter() - peer.start
        fleet.keep(name, peer)
        return taken

    turns(
        first,
        {name: one for name, one in bench.each(seconds).items() if name not in first.missing},
        rounds=1,
        deadline=0.0,
        say=bench.say,
        warm_up=False,
    )
    row.missing |= first.missing
    engines = {name: one for name, one in bench.each(seconds).items() if name not in row.missing}
    deadline = time.monotonic() + bench.seconds
    turns(row, engines, rounds=bench.rounds, deadline=deadline, say=bench.say, warm_up=False)


def image(bench: Bench) -> None:
    """Time to first token of a prompt with one image, mapping the image included."""
    sizes = bench.sizes
    prompt = sizes.image_ids(sizes.image_text)
    length = sizes.scale.num_patches + sizes.image_text
    floor = bench.floors.prompt_seconds([length], 1)
    name = f"time to first token, 1 image, {length} tokens"
    row = bench.row("image", name, "s", higher=False, floor=floor)
    row.missing.setdefault(LLAMA_CPP, NO_TOWER)

    def seconds(name: str, seeds: list[int]) -> float:
        answer = bench.fleet.ask(name, [prompt], 1, images=seeds)
        row.details.setdefault("first_token", {})[name] = answer["first_tokens"][0]
        return first_seconds(answer, 1)

    bench.turns(row, bench.each_with_images(1, seconds), 1.0)


def decode(bench: Bench) -> None:
    """Tokens per second of sequences that decode together, each behind a text prompt."""
    for count in bench.sizes.decodes:
        name = f"decode, {count} sequence{'s' * (count > 1)}"
        row = decode_row(bench, f"decode {count}", name, count)
        bench.turns(row, bench.each(rate_of(bench, row, count)), 1 / len(bench.sizes.decodes))


def prefill(bench: Bench) -> None:
    """Tokens per second of reading a text prompt."""
    sizes = bench.sizes
    length = sizes.prefill
    floor = length / bench.floors.prompt_seconds([length], 0)
    name = f"text prefill, {length} tokens"
    row = bench.row("prefill", name, "tokens/s", higher=True, floor=floor)

    def rate(name: str) -> float:
        answer = bench.fleet.ask(name, [sizes.text_ids[:length]], 1)
        return length / first_seconds(answer, 1)

    bench.turns(row, bench.each(rate), 1.0)


def requests(bench: Bench) -> None:
    """Requests with an image each, all at once, from the first to the last token."""
    sizes = bench.sizes
    count, num_tokens = sizes.num_requests, sizes.request_answer
    name = f"{count} × (image + {sizes.request_text} → {num_tokens} tokens), end to end"
    floor = bench.floors.requests_seconds()
    row = bench.row("requests", name, "s", higher=False, floor=floor)
    row.missing.setdefault(LLAMA_CPP, NO_TOWER)
    prompts = [sizes.image_ids(sizes.request_text)] * count

    def seconds(name: str, seeds: list[int]) -> float:
        return last_seconds(bench.fleet.ask(name, prompts, num_tokens, images=seeds))

    bench.turns(row, bench.each_with_images(count, seconds), 1.0)


def memory(bench: Bench) -> None:
    """Memory of each engine's processes after it has answered, against weights and KV cache.

    Memory that processes share counts once. Files that are mapped count where they were read.
    """
    sizes, fleet = bench.sizes, bench.fleet
    size = (fleet.checkpoint / "model.safetensors").stat().st_size  # bfloat16
    size = size * sizes.scale.item_size // 2 + sizes.kv_bytes
    most = (MEMORY_SHARE * size + MEMORY_REST) / 2**20
    row = bench.row(
        "memory", "resident memory", "MiB", higher=False, floor=size / 2**20, at_most=most
    )
    row.details["kv_bytes"] = {}
    row.details["llama.cpp"] = NO_TOWER

    def mebibytes(name: str) -> float:
        peer = fleet.get(name)
        count = max(sizes.decodes)
        fleet.answer(peer, [sizes.text_ids[: sizes.prompt]] * count, 2, [])
        row.details["kv_bytes"][name] = fleet.loaded[name]["kv_bytes"]
        return peer.resident_bytes() / 2**20

    engines = {name: one for name, one in bench.each(mebibytes).items() if name not in row.missing}
    turns(row, engines, rounds=1, deadline=0.0, say=bench.say, warm_up=False)


def context(bench: Bench) -> None:
    """Time of a token of one sequence against what it attends to, and the slope of it.

    The floor of the slope is the bytes that a token takes in the KV cache, over the bandwidth.
    """
    sizes = bench.sizes
    points: list[tuple[float, Row]] = []
    for length in sizes.contexts:
        prompt = length - sizes.num_decoded
        middle = prompt + sizes.num_decoded / 2
        floor = bench.floors.step_seconds([round(middle)]) * 1e3
        name = f"a token after {length} tokens"
        row = bench.row(f"context {length}", name, "ms", higher=False, floor=floor)

        def milliseconds(name: str, prompt: int = prompt) -> float:
            ids = sizes.text_ids[:prompt]
            return 1e3 / decode_rate(bench.fleet.ask(name, [ids], sizes.num_decoded), 1)

        bench.turns(row, bench.each(milliseconds), 1 / len(sizes.contexts))
        points.append((middle, row))
    floor = bench.floors.kv_seconds_per_token * 1e9
    row = bench.row("slope", "a token's time for each token of context", "ns", higher=False)
    row.floor = floor
    row.details["contexts"] = [middle for middle, _ in points]
    for name in bench.fleet.names():
        medians = [(middle, value) for middle, r in points if (value := r.median(name)) is not None]
        if len(medians) > 1:
            xs, ys = zip(*medians, strict=True)
            row.rounds[name] = [slope(xs, ys) * 1e6]
            bench.say(f"{row.name} · {name}: {row.rounds[name][0]:.4g} ns")
        else:
            row.missing[name] = "fewer than two contexts were measured"


def busy(bench: Bench) -> None:
    """Decode of one sequence while another process keeps one core busy, all by turns.

    The share that is left of the rate without it is in the details, if that was measured.
    """
    row = decode_row(bench, "busy", "decode, 1 sequence, beside a busy process", 1)
    figure = rate_of(bench, row, 1)
    for name in bench.fleet.names():  # loaded before the machine is kept busy
        try:
            bench.fleet.get(name)
        except PeerError as error:
            row.missing[name] = str(error)
    with busy_process():
        bench.turns(row, bench.each(figure), 1.0)
    alone = bench.known.get("decode 1")
    row.details["share_of_alone"] = {
        name: value / before
        for name in row.rounds
        if alone is not None
        and (before := alone.median(name))
        and (value := row.median(name)) is not None
    }


@contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes without end on one core; it ends with its parent."""
    code = "import os\np = os.getppid()\nwhile os.getppid() == p:\n    sum(range(1000000))"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


SECTIONS: Mapping[str, Callable[[Bench], None]] = {
    "launch": launch,
    "memory": memory,
    "decode": decode,
    "prefill": prefill,
    "image": image,
    "context": context,
    "busy": busy,
    "requests": requests,
    "quantized": quantized,
}


def measure_floors(fleet: Fleet, seconds: float) -> tuple[Floors, dict[str, Any]]:
    """Bandwidth, matrix rate and the import of torch, and all that was found on the way.

    Raises:
        PeerError: torch doesn't do what it should.
    """
    sizes = fleet.sizes
    fleet.hush()
    peer = Peer(
        sys.executable, "run_floors.py", fleet.environment(OURS), fleet.folder / "floors.log"
    )
    try:
        told = peer.ask("load", 300.0, threads=fleet.threads)
        limit = 60.0 + 20 * seconds
        read = peer.ask("bandwidth", limit, num_bytes=sizes.read_bytes, seconds=seconds)
        fleet.say(f"floors · read bandwidth: {read['bytes_per_second'] / 1e9:.3g} GB/s")
        rates = {}
        for dtype in ("float32", "bfloat16"):
            rates[dtype] = peer.ask(
                "products", limit, shapes=sizes.products, dtype=dtype, seconds=seconds
            )
            rate = rates[dtype]["flops_per_second"] / 1e9
            fleet.say(f"floors · matrix rate, {dtype}: {rate:.4g} GFLOP/s")
    finally:
        peer.close()
    floors = Floors(
        read["bytes_per_second"],
        # A CPU without instructions for bfloat16 is held to what it does in float32.
        max(rate["flops_per_second"] for rate in (rates["float32"], rates[fleet.dtype])),
        told["import_torch_seconds"],
        sizes,
    )
    return floors, {**told, "bandwidth": read, "products": rates}
