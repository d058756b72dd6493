"""Bad input over the wire: the real child, all caches on, a neighbour with the same picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from engine_process import CONFIG, collect, idle, until
from mm_engine.config import EngineConfig
from mm_engine.engine.client import EngineClient
from mm_engine.errors import RequestError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.request import Item, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.worker.loader import open_model

MAX_ROWS = 150  # of the encoder cache; an image of the demo takes 144


@pytest.fixture(scope="module")
def client(start_client: Callable[[EngineConfig], EngineClient]) -> EngineClient:
    """An engine whose encoder cache holds one image."""
    hidden = int(open_model(CONFIG).ctx.text_config.hidden_size)
    return start_client(replace(CONFIG, encoder_cache_memory=MAX_ROWS * hidden * 4))


@pytest.fixture
def ask(pipeline: InputPipeline) -> Callable[..., Request]:
    """`ask("red", max_tokens=…)`: a question about a picture of this colour."""

    def make(colour: str, **params: Any) -> Request:
        picture = Image.new("RGB", (96, 96), colour)
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
        prepared = pipeline.prepare_chat([{"role": "user", "content": parts}])
        given = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, **params}
        return pipeline.request(prepared, SamplingParams(**given))

    return make


def over_pool(request: Request, client: EngineClient) -> Request:
    """As if the front's limit were larger than the pool."""
    ids = request.prompt_token_ids + (5,) * client.info.kv_cache_tokens
    return replace(request, prompt_token_ids=ids)


def over_features(request: Request, client: EngineClient) -> Request:
    """As if the plugin counted more tokens for one image than it says that there can be."""
    place = replace(request.items[0].placeholder, length=MAX_ROWS + 1)
    item = Item(place, "larger than any", request.items[0].tensors)
    ids = request.prompt_token_ids + (5,) * MAX_ROWS
    return replace(request, prompt_token_ids=ids, items=(item,))


CASES = {
    "pool": (over_pool, "exceed the KV cache"),
    "features": (over_features, rf"exceeds the encoder cache: {MAX_ROWS + 1} of {MAX_ROWS} tokens"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_is_one_error_and_a_neighbour_goes_on(
    loop, client, pipeline, ask, case: str
) -> None:
    neighbour, new = ask("red"), ask(f"#{len(case):02x}aa{ord(case[0]):02x}", max_tokens=4)
    alone = loop.run(collect(client, ask("red"))).outputs
    mapped = pipeline.processed.num_hits
    known = client.sent.num_hits

    async def run() -> Any:
        stream = client.generate(neighbour)
        tokens = list((await anext(stream)).outputs[0].token_ids)
        change, message = CASES[case]
        bad = change(ask("red"), client)
        with pytest.raises(RequestError, match=message):
            await collect(client, bad)
        async for output in stream:
            tokens += output.outputs[0].token_ids
        await until(lambda: idle(client))
        return tokens

    assert loop.run(asyncio.wait_for(run(), 60)) == alone[0].token_ids
    assert not client._asked and client.alive
    # The controls: the picture's tensors, features and blocks were found.
    assert client.sent.num_hits > known
    again = ask("red")
    assert pipeline.processed.num_hits > mapped
    encodes = loop.run(client.stats()).num_encodes
    answer = loop.run(collect(client, again))
    assert answer.outputs == alone and answer.num_cached_tokens > 0
    assert loop.run(client.stats()).num_encodes == encodes
    # What the bad one brought is not taken for sent: a new one with the same picture is answered.
    for request in (new, replace(new, request_id="another")):
        assert len(loop.run(collect(client, request)).outputs[0].token_ids) == 4
    stats = loop.run(client.stats())
    assert stats.encoder_rows <= stats.max_encoder_rows == MAX_ROWS
    loop.run(until(lambda: idle(client)))  # blocks are given back with the next step
