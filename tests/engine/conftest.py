"""Fixtures of the engine's tests: requests, and an engine over a stand-in for the device."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from checking_runner import (
    EOS_ID,
    PLACEHOLDER_ID,
    CheckingRunner,
    all_pasts,
    content,
    expected_tokens,
)
from engine_process import CONFIG
from mm_engine.config import EngineConfig
from mm_engine.engine.client import EngineClient
from mm_engine.engine.engine import Engine
from mm_engine.engine.pace import Pace
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.outputs import RequestOutput
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import Sequence
from mm_engine.worker.loader import open_model

VOCAB_SIZE = 300  # of the byte-level tokenizer below


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 256 bytes, some merges, and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "a red circle left of a blue square, and there are three small green stars below it"
    tokenizer.train_from_iterator([text, "the large yellow ring is above two crosses"], trainer)
    tokenizer.add_special_tokens(["</s>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    assert len(made) <= VOCAB_SIZE
    return made


@pytest.fixture(scope="session")
def new_request() -> Callable[..., Request]:
    """`new_request("id", [3, "a", 2], ...)`: three tokens, the image a, two tokens.

    An image's length in tokens is given by `lengths`, 4 if it isn't; `salt` is the request's
    `cache_salt`. Further keywords are sampling parameters.
    """

    def make(
        request_id: str,
        parts: list[int | str],
        *,
        lengths: dict[str, int] | None = None,
        salt: str = "",
        priority: int = 0,
        **params: Any,
    ) -> Request:
        ids: list[int] = []
        items: list[Item] = []
        for part in parts:
            if isinstance(part, int):
                ids += [1 + (len(ids) + i) % 50 for i in range(part)]
                continue
            length = (lengths or {}).get(part, 4)
            place = PlaceholderRange("image", len(items), len(ids), length)
            items.append(Item(place, part, {"pixel_values": torch.zeros(1)}))
            ids += [PLACEHOLDER_ID] * length
        sampling_params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **params})
        return Request(
            request_id, tuple(ids), sampling_params, tuple(items), (EOS_ID,), salt, priority
        )

    return make


@pytest.fixture(scope="module")
def overlaps() -> bool:
    """Whether `new_engine` makes engines whose steps overlap, unless told otherwise."""
    return False


@pytest.fixture(scope="module")
def new_engine(
    tokenizer: PreTrainedTokenizerFast, overlaps: bool
) -> Callable[..., tuple[Engine, CheckingRunner]]:
    """`new_engine(num_blocks=8, block_size=2, ...)`: an engine over a `CheckingRunner`."""

    def make(
        *,
        num_blocks: int = 64,
        max_rows: int = 64,
        vocab: int = 20,
        pace: Pace | None = None,
        **options: Any,
    ) -> tuple[Engine, CheckingRunner]:
        given = {"model": "none", "block_size": 4, "async_scheduling": overlaps, **options}
        config = EngineConfig(**given)
        runner = CheckingRunner(config, num_blocks, max_rows, vocab)
        engine = Engine(
            runner,
            config,
            tokenizer,
            num_blocks=num_blocks,
            max_encoder_rows=max_rows,
            pace=pace,
        )
        return engine, runner

    return make


@pytest.fixture(scope="session")
def run_all() -> Callable[..., dict[str, RequestOutput]]:
    """`run_all(engine)`: step until nothing is left; the sums of the outputs by request id.

    Given `sums` of earlier steps are added to. With `num_steps` it stops after so many.
    """

    def run(
        engine: Engine,
        sums: dict[str, RequestOutput] | None = None,
        *,
        num_steps: int | None = None,
        max_steps: int = 5000,
    ) -> dict[str, RequestOutput]:
        sums, num_done = {} if sums is None else sums, 0
        while engine.has_work and num_done != num_steps:
            for output in engine.step():
                sums.setdefault(output.request_id, RequestOutput(output.request_id)).extend(output)
            num_done += 1
            assert num_done < max_steps, "no end in sight"
        return sums

    return run


@pytest.fixture(scope="session")
def expected() -> Callable[..., list[int]]:
    """`expected(request, index, vocab)`: the tokens that this completion must be."""
    return expected_tokens


@pytest.fixture(scope="session")
def check_blocks() -> Callable[[Engine, CheckingRunner, dict[bytes, list[bytes]]], None]:
    """`check_blocks(engine, runner, known)` after each step: what holds for blocks between steps.

    Each running sequence has as many as its computed tokens take, each block's users are counted
    exactly, and each block that is kept holds what its key says. `known` is empty at first; `left`
    are sequences that may have left in the step.
    """

    def check(
        engine: Engine,
        runner: CheckingRunner,
        known: dict[bytes, list[bytes]],
        left: Iterable[Sequence] = (),
    ) -> None:
        cache, running = engine.kv_cache, engine.scheduler.running
        size = cache.block_size
        departures = engine.scheduler.departures
        holders = {*running, *departures._new, *departures._holding}
        for sequence in holders:
            num_needed = -(-sequence.num_computed_tokens // size)
            assert len(sequence.block_table) == num_needed or sequence.finished
        for sequence in {*holders, *left}:
            if all(key in known for key in sequence.block_keys):
                continue
            rows = content(sequence.request) + sequence.output_token_ids
            pasts = all_pasts(sequence.request.cache_salt, rows)
            for number, key in enumerate(sequence.block_keys):
                known[key] = pasts[number * size : (number + 1) * size]
        uses = Counter(block for sequence in holders for block in sequence.block_table)
        assert [uses[block] for block in range(cache.num_blocks)] == cache._num_users
        for key, block in cache._block_of_key.items():
            slots = range(block * size, (block + 1) * size)
            assert [runner.slots[slot] for slot in slots] == known[key]

    return check


@pytest.fixture(scope="session")
def pipeline() -> InputPipeline:
    """The inputs of the bundled demo checkpoint."""
    return InputPipeline(open_model(CONFIG))


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """Runs what a test awaits of an engine process."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def start_client(
    loop: asyncio.Runner, pipeline: InputPipeline
) -> Iterator[Callable[[EngineConfig], EngineClient]]:
    """`start_client(config)`: an engine process, closed with the module's last test."""
    clients: list[EngineClient] = []

    def start(config: EngineConfig) -> EngineClient:
        clients.append(loop.run(EngineClient.start(config, pipeline.dummy_request())))
        return clients[-1]

    yield start
    for client in clients:
        loop.run(client.close())


@pytest.fixture(scope="session")
def ask(pipeline: InputPipeline) -> Callable[..., Request]:
    """`ask(max_tokens=…)`: a question about a picture, answered at length."""
    picture = Image.new("RGB", (96, 96), "red")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the image."}]

    def make(**params: Any) -> Request:
        given = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **params}
        prepared = pipeline.prepare_chat([{"role": "user", "content": parts}])
        return pipeline.request(prepared, SamplingParams(**given))

    return make
