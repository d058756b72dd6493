"""A small deterministic stand-in for the device, so that the engine's decisions can be tested.

`CheckingRunner` computes no model: the next token is a hash of everything before it. It keeps
what was written to each slot of the cache, and holds every step to what the engine promises.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine_process import CONFIG
from mm_engine.config import EngineConfig
from mm_engine.engine.client import EngineClient
from mm_engine.engine.engine import Engine
from mm_engine.engine.pace import Pace
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.outputs import ErrorInfo, RequestOutput
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from mm_engine.worker.loader import open_model

VOCAB_SIZE = 300  # of the byte-level tokenizer below
PLACEHOLDER_ID = 299
EOS_ID = 298


def content(request: Request) -> list[Any]:
    """What stands at each position of a prompt: a token id, or a row of an item's features."""
    rows: list[Any] = list(request.prompt_token_ids)
    for item in request.items:
        for row in range(item.placeholder.length):
            rows[item.placeholder.offset + row] = (item.content_key, row)
    return rows


def next_token(rows: list[Any], index: int, vocab: int) -> int:
    """The pretended model: a hash of all rows before, one of `vocab` letters or the end."""
    digest = hashlib.sha256(repr((rows, index)).encode()).digest()
    choice = int.from_bytes(digest[:4], "big") % (vocab + 1)
    return EOS_ID if choice == vocab else 65 + choice


def all_pasts(salt: str, rows: list[Any]) -> list[bytes]:
    """For each position a digest of all up to it: keys and values of layers depend on just that."""
    past, pasts = salt.encode(), list[bytes]()
    for row in rows:
        past = hashlib.sha256(past + repr(row).encode()).digest()
        pasts.append(past)
    return pasts


def expected_tokens(request: Request, index: int, vocab: int) -> list[int]:
    """What completion `index` must be, computed without an engine."""
    params, rows, output = request.sampling_params, content(request), list[int]()
    assert params.max_tokens is not None
    while len(output) < params.max_tokens:
        output.append(next_token(rows + output, index, vocab))
        if output[-1] in request.eos_token_ids and not params.ignore_eos:
            break
    return output


class CheckingRunner:
    """Runs steps by hashing, and asserts that each step is one that a device could run."""

    def __init__(self, config: EngineConfig, num_blocks: int, max_rows: int, vocab: int) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.max_rows = max_rows
        self.vocab = vocab
        self.slots: dict[int, bytes] = {}  # slot -> all that its key and value depend on
        self.features: dict[str, int] = {}  # content key -> rows
        self.raises: dict[str, BaseException] = {}  # by request id, while its share is in a step
        self.bad_items: dict[str, ErrorInfo] = {}  # by content key, when it is encoded
        self.after_run: Callable[[], None] = lambda: None
        self.says: Callable[[list[Any]], int] | None = None  # the next token, by all before it
        self.failed = False
        self.num_computed = 0  # tokens
        self.num_mixed_steps = 0  # prefill chunks and decodes together
        self.num_cut_items = 0  # chunks that end inside an item
        self.encoded: list[str] = []
        self.begun: dict[str, float] = {}  # content key of what is encoded in slices -> seconds
        self.num_slices = 0
        self.order: list[list[tuple[str, int]]] = []  # per step: (request id, tokens and draft)

    def run(self, batch: ScheduledBatch) -> StepResult:
        self._check_sizes(batch)
        for key in batch.evict:
            self.features.pop(key, None)
            self.begun.pop(key, None)
        errors: dict[str, ErrorInfo] = {}
        self._encode_slice(batch)
        for item in batch.encode:
            self.begun.pop(item.content_key, None)
            assert item.content_key not in self.features or self.failed, "encoded twice"
            if item.content_key in self.bad_items:
                errors[item.content_key] = self.bad_items[item.content_key]
                continue
            self.features[item.content_key] = item.placeholder.length
            self.encoded.append(item.content_key)
        assert sum(self.features.values()) + self._begun_rows <= self.max_rows
        self._raise_if_told(batch)
        sampled = [self._compute(share, errors) for share in batch.sequences]
        self.order.append([(s.sequence.request.request_id, s.num_rows) for s in batch.sequences])
        self.after_run()
        return StepResult(sampled, slice_is_last=not self.begun)

    def _encode_slice(self, batch: ScheduledBatch) -> None:
        """A second for each row. A bad item fails when it is needed."""
        self._begun_rows = 0
        if batch.encode_slice is None:
            return
        self.num_slices += 1
        item, key = batch.encode_slice.item, batch.encode_slice.item.content_key
        assert not batch.encode, "and no other one whole"
        assert key not in self.features, "encoded twice"
        assert self.begun.keys() <= {key}, "one at a time"
        for share in batch.sequences:
            for other in share.sequence.request.items:
                place = other.placeholder
                touched = place.offset < share.end and place.end > share.start
                assert other.content_key != key or not touched, "it isn't there yet"
        self.begun[key] = self.begun.get(key, 0.0) + batch.encode_slice.seconds
        if self.begun[key] < item.placeholder.length:
            self._begun_rows = item.placeholder.length
            return
        del self.begun[key]
        if key not in self.bad_items:
            self.features[key] = item.placeholder.length
            self.encoded.append(key)

    def _check_sizes(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert batch.num_tokens or batch.encode or batch.evict
        assert len(batch.sequences) <= self.config.max_num_seqs
        assert len({id(share.sequence) for share in batch.sequences}) == len(batch.sequences)
        keys = [item.content_key for item in batch.encode]
        assert len(set(keys)) == len(keys)
        num_rows = sum(item.placeholder.length for item in batch.encode)
        assert num_rows <= self.config.max_num_batched_tokens or len(keys) == 1
        kinds = {share.sequence.num_output_tokens > 0 for share in batch.sequences}
        self.num_mixed_steps += len(kinds) == 2

    def _raise_if_told(self, batch: ScheduledBatch) -> None:
        for share in batch.sequences:
            error = self.raises.get(share.sequence.request.request_id)
            if error is not None:
                self.failed = True  # the same may come once more
                raise error

    def _compute(self, share: ScheduledSequence, errors: dict[str, ErrorInfo]) -> SampledToken:
        sequence, size = share.sequence, self.config.block_size
        assert not sequence.finished
        assert share.num_new_tokens > 0 and share.end <= sequence.num_tokens
        draft, end = list(share.draft_token_ids), share.start + share.num_rows
        if draft:
            self._check_draft(share)
        num_needed = -(-end // size)  # repeated without its draft, a share has more
        assert len(sequence.block_table) == num_needed or self.failed, "as many as needed"
        assert len(set(sequence.block_table)) == len(sequence.block_table)
        rows = content(sequence.request) + sequence.output_token_ids + draft
        pasts = all_pasts(sequence.request.cache_salt, rows[:end])
        self.num_computed += share.num_rows
        for position in range(end):
            slot = sequence.block_table[position // size] * size + position % size
            assert 0 <= slot < self.num_blocks * size
            if position >= share.start:
                row = rows[position]
                if isinstance(row, tuple):
                    if row[0] in errors:
                        return SampledToken(error=errors[row[0]])
                    assert row[1] < self.features[row[0]], "features must be there"
                self.slots[slot] = pasts[position]
            assert self.slots[slot] == pasts[position], (
                "what is read must be what would be computed"
            )
        for item in sequence.request.items:
            self.num_cut_items += item.placeholder.offset < share.end < item.placeholder.end
        if not share.samples:
            return SampledToken()
        sampled: list[SampledToken] = []
        for number in range(len(draft) + 1):
            known = rows[: sequence.num_tokens + number]
            says = self.says or (lambda rows: next_token(rows, sequence.index, self.vocab))
            token_id = says(known)
            sampled.append(SampledToken(token_id, -1.5, 1, [(token_id, -1.5), (64, -2.5)]))
            if draft[number : number + 1] != [token_id]:
                break
        sampled[-1].accepted = tuple(sampled[:-1])
        return sampled[-1]

    def _check_draft(self, share: ScheduledSequence) -> None:
        sequence, params = share.sequence, share.sequence.request.sampling_params
        assert share.samples and share.num_new_tokens == 1 and sequence.num_output_tokens > 0
        num = len(share.draft_token_ids)
        assert num <= self.config.num_speculative_tokens
        assert sequence.num_output_tokens + num < (params.max_tokens or 0), "can't all be taken"
        assert PLACEHOLDER_ID not in share.draft_token_ids


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


@pytest.fixture(scope="session")
def new_engine(tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Engine, CheckingRunner]]:
    """`new_engine(num_blocks=8, block_size=2, ...)`: an engine over a `CheckingRunner`."""

    def make(
        *,
        num_blocks: int = 64,
        max_rows: int = 64,
        vocab: int = 20,
        pace: Pace | None = None,
        **options: Any,
    ) -> tuple[Engine, CheckingRunner]:
        config = EngineConfig(**{"model": "none", "block_size": 4, **options})
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
    exactly, and each block that is kept holds what its key says. `known` is empty at first.
    """

    def check(engine: Engine, runner: CheckingRunner, known: dict[bytes, list[bytes]]) -> None:
        cache, running = engine.kv_cache, engine.scheduler.running
        size = cache.block_size
        for sequence in running:
            num_needed = -(-sequence.num_computed_tokens // size)
            assert len(sequence.block_table) == num_needed or sequence.finished
            rows = content(sequence.request) + sequence.output_token_ids
            pasts = all_pasts(sequence.request.cache_salt, rows)
            for number, key in enumerate(sequence.block_keys):
                known[key] = pasts[number * size : (number + 1) * size]
        uses = Counter(block for sequence in running for block in sequence.block_table)
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
