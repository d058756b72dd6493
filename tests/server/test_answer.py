"""`Answer`: several prompts as one, over a stand-in for the engine that the tests can steer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TypeVar

import pytest

from mm_engine.errors import EngineDead, Overloaded, PluginError
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.request import Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.server.answer import Answer
from submitting import Submitting

T = TypeVar("T")


def run(work: Coroutine[object, object, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 60))


class Scripted(Submitting):
    """Answers each request with the outputs of its script; an exception is raised."""

    def __init__(self, **scripts: list[RequestOutput | Exception]) -> None:
        super().__init__()
        self.scripts = scripts
        self.left: list[str] = []

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        try:
            for step in self.scripts[request.request_id]:
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                yield step
            if not self.scripts[request.request_id]:
                await asyncio.Event().wait()
        finally:
            self.left.append(request.request_id)


def request(name: str) -> Request:
    return Request(name, (1,), SamplingParams())


def output(name: str, text: str, *, finished: bool = False) -> RequestOutput:
    return RequestOutput(name, [CompletionOutput(0, text)], finished)


async def collect(engine: Scripted, *names: str) -> list[tuple[int, str]]:
    with Answer(engine, [request(name) for name in names]) as answer:  # type: ignore[arg-type]
        return [(news.prompt, news.output.outputs[0].text) async for news in answer]


def test_outputs_of_all_prompts_come_with_their_index() -> None:
    engine = Scripted(
        a=[output("a", "1"), output("a", "2", finished=True)],
        b=[output("b", "3", finished=True)],
    )
    news = run(collect(engine, "a", "b"))
    assert sorted(news) == [(0, "1"), (0, "2"), (1, "3")]


def test_the_error_of_one_ends_all() -> None:
    engine = Scripted(a=[], b=[output("b", "1"), PluginError("broken")])
    with pytest.raises(PluginError, match="broken"):
        run(collect(engine, "a", "b"))
    assert engine.aborted == ["a"]


def test_an_engine_that_is_gone_is_told_at_once_and_nothing_is_left_behind() -> None:
    class Dying(Scripted):
        def submit(self, request: Request, tell: Callable[..., None]) -> None:
            if request.request_id == "b":
                raise EngineDead("gone")
            super().submit(request, tell)

    engine = Dying(a=[], b=[])
    with pytest.raises(EngineDead, match="gone"):
        run(collect(engine, "a", "b"))
    assert engine.aborted == ["a"]


def test_leaving_early_aborts_all() -> None:
    async def leave() -> None:
        with Answer(engine, [request("a"), request("b")]) as answer:  # type: ignore[arg-type]
            await anext(answer)

    engine = Scripted(a=[], b=[output("b", "1"), output("b", "2")])
    run(leave())
    assert engine.aborted == ["a", "b"]


def test_an_answer_can_be_failed_from_outside() -> None:
    async def wait() -> None:
        with Answer(engine, [request("a")]) as answer:  # type: ignore[arg-type]
            answer.fail(Overloaded("enough"))
            await anext(answer)

    engine = Scripted(a=[])
    with pytest.raises(Overloaded, match="enough"):
        run(wait())


async def collect_slowly(engine: Scripted, *names: str) -> list[list[str]]:
    """What a reader gets at a time who is only there when the engine has told all."""
    got: list[list[str]] = []
    with Answer(engine, [request(name) for name in names]) as answer:  # type: ignore[arg-type]
        try:
            async for news in answer:
                while len(engine.left) < len(names):
                    await asyncio.sleep(0)
                got.append([one.output.outputs[0].text for one in (news, *answer.waiting())])
        except PluginError as error:
            got.append([str(error)])
    return got


def test_what_has_come_meanwhile_is_there_at_once() -> None:
    engine = Scripted(
        a=[output("a", "1"), output("a", "2"), output("a", "3", finished=True)],
        b=[output("b", "4", finished=True)],
    )
    got = run(collect_slowly(engine, "a", "b"))
    assert sorted(text for texts in got for text in texts) == ["1", "2", "3", "4"]
    assert len(got) <= 2 and len(got[0]) >= 2


def test_an_error_behind_what_has_come_is_raised_after_it() -> None:
    engine = Scripted(a=[output("a", "1"), output("a", "2"), PluginError("broken")])
    assert run(collect_slowly(engine, "a")) == [["1", "2"], ["broken"]]


def test_nothing_waits_where_the_reader_keeps_pace() -> None:
    engine = Scripted(a=[output("a", "1"), output("a", "2", finished=True)])

    async def read() -> list[int]:
        with Answer(engine, [request("a")]) as answer:  # type: ignore[arg-type]
            return [len([*answer.waiting()]) async for _ in answer]

    assert run(read()) == [0, 0]


def test_what_fails_after_the_end_takes_nothing_back() -> None:
    """A deadline, say, while a client reads slowly what the engine has told in full."""
    engine = Scripted(a=[output("a", "1"), output("a", "2", finished=True)])

    async def read() -> list[str]:
        with Answer(engine, [request("a")]) as answer:  # type: ignore[arg-type]
            first = await anext(answer)
            while not engine.left:
                await asyncio.sleep(0)
            answer.fail(Overloaded("too late"))
            return [one.output.outputs[0].text for one in (first, *[n async for n in answer])]

    assert run(read()) == ["1", "2"]
