"""The engine in its own process: the real child, the real model, the bundled demo checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine_process import CONFIG, collect, idle, until
from mm_engine.config import EngineConfig
from mm_engine.engine.build import build_engine
from mm_engine.engine.client import EngineClient
from mm_engine.errors import PluginError, RequestError
from mm_engine.outputs import RequestOutput
from mm_engine.sampling_params import SamplingParams
from mm_engine.worker.loader import open_model


@pytest.fixture(scope="module")
def shared(start_client: Callable[[EngineConfig], EngineClient]) -> EngineClient:
    """One engine process for the tests that leave it alive."""
    return start_client(CONFIG)


def test_answers_equal_those_of_the_engine_in_process(loop, shared, pipeline, ask) -> None:
    request = ask(n=2, temperature=1.0, seed=3, logprobs=2, stop=("zzz",))
    engine = build_engine(open_model(CONFIG), CONFIG, pipeline.dummy_request())
    engine.add(request)
    wanted = RequestOutput(request.request_id)
    while engine.has_work:
        for output in engine.step():
            wanted.extend(output)
    assert loop.run(collect(shared, request)) == wanted
    assert len(wanted.outputs[1].token_ids) == 20
    measured = ("load_seconds", "profile_seconds", "memory")
    found = {name: getattr(shared.info, name) for name in measured}
    assert shared.info == replace(engine.info, **found)


def test_many_at_once_each_get_their_own_answer(loop, shared, ask) -> None:
    requests = [ask(max_tokens=5 + number) for number in range(12)]

    async def run() -> list[RequestOutput]:
        return await asyncio.gather(*(collect(shared, request) for request in requests))

    whole = loop.run(collect(shared, ask(max_tokens=16))).outputs[0].token_ids
    for request, answer in zip(requests, loop.run(run()), strict=True):
        assert answer.request_id == request.request_id
        wanted = request.sampling_params.max_tokens
        assert answer.outputs[0].token_ids == whole[:wanted]


def test_the_answer_comes_in_increments(loop, shared, ask) -> None:
    async def run() -> list[int]:
        return [len(out.outputs[0].token_ids) async for out in shared.generate(ask())]

    assert loop.run(run()) == [1] * 20


def test_callers_that_come_and_go_leave_nothing(loop, shared, ask) -> None:
    requests = [ask(max_tokens=10 + number) for number in range(40)]
    whole = loop.run(collect(shared, ask(max_tokens=50))).outputs[0].token_ids

    async def stay(number: int) -> RequestOutput | None:
        await asyncio.sleep(0.01 * (number % 7))
        try:
            async with asyncio.timeout(0.03 * (number % 5) if number % 3 == 0 else None):
                return await collect(shared, requests[number])
        except TimeoutError:
            return None

    async def run() -> list[RequestOutput | None]:
        answers = await asyncio.gather(*(stay(number) for number in range(len(requests))))
        await until(lambda: idle(shared))
        return answers

    answers = loop.run(run())
    assert None in answers  # some left
    for number, answer in enumerate(answers):
        if answer is not None:
            assert answer.outputs[0].token_ids == whole[: 10 + number]


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_leaving_early_aborts_the_request(loop, shared, ask, how: str) -> None:
    async def run() -> None:
        started = asyncio.Event()

        async def listen() -> None:
            async with contextlib.aclosing(shared.generate(ask(max_tokens=3000))) as outputs:
                async for _ in outputs:
                    started.set()
                    if how == "break":
                        break

        task = asyncio.create_task(listen())
        await started.wait()
        if how == "cancel":
            assert not await idle(shared)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: idle(shared))

    loop.run(run())


def test_a_refused_request_says_why_and_harms_nobody(loop, shared, pipeline, ask) -> None:
    over_pool = replace(
        ask(), sampling_params=SamplingParams(max_tokens=shared.info.max_model_len - 200)
    )
    over_pool = replace(over_pool, prompt_token_ids=over_pool.prompt_token_ids + (1,) * 2000)
    with pytest.raises(RequestError) as error:
        loop.run(collect(shared, over_pool))
    assert error.value.param == "max_tokens"
    assert len(loop.run(collect(shared, ask())).outputs[0].token_ids) == 20


def test_an_id_that_is_being_answered_is_refused(loop, shared, ask) -> None:
    request = ask()

    async def run() -> RequestOutput:
        first = asyncio.create_task(collect(shared, request))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="in use"):
            await collect(shared, request)
        return await first

    assert loop.run(run()).finished


def test_an_image_the_model_cannot_take_fails_its_request_only(loop, shared, ask) -> None:
    good = ask()
    item = good.items[0]
    tensors = {name: tensor[..., :-1] for name, tensor in item.tensors.items()}
    bad = replace(
        ask(), items=(replace(item, tensors=tensors, content_key="another"),), request_id="bad"
    )

    async def run() -> list[Any]:
        both = (collect(shared, request) for request in (bad, good))
        return await asyncio.gather(*both, return_exceptions=True)

    error, answer = loop.run(run())
    assert isinstance(error, PluginError)
    assert len(answer.outputs[0].token_ids) == 20
    loop.run(until(lambda: idle(shared)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_group_leave_the_engine_to_its_parent(loop, shared, ask, number) -> None:
    os.kill(shared.pid, number)
    assert loop.run(collect(shared, ask())).finished
    assert shared.alive
