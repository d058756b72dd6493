from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.config import EngineConfig
from mm_engine.engine import wire
from mm_engine.engine.status import EngineInfo, EngineStats
from mm_engine.outputs import CompletionOutput, ErrorInfo, Logprob, RequestOutput, RequestTimes
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]

tensors = st.builds(
    lambda dtype, shape, seed: torch.randint(
        0, 2**30, shape, generator=torch.Generator().manual_seed(seed)
    ).to(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 9),
)
items = st.builds(
    Item,
    placeholder=st.builds(
        PlaceholderRange,
        st.just("image"),
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(1, 9),
    ),
    content_key=st.text(max_size=8),
    tensors=st.dictionaries(st.text(max_size=4), tensors, max_size=3),
)
token_ids = st.lists(st.integers(0, 2**31), max_size=9).map(tuple)
finite = st.floats(-2, 2)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 9),
    temperature=st.floats(0, 5),
    seed=st.one_of(st.none(), st.integers(-(2**63), 2**62)),
    presence_penalty=finite,
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    max_tokens=st.one_of(st.none(), st.integers(9, 99)),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
    ignore_eos=st.booleans(),
)
requests = st.builds(
    Request,
    request_id=st.text(max_size=9),
    prompt_token_ids=token_ids,
    sampling_params=params,
    items=st.lists(items, max_size=3).map(tuple),
    eos_token_ids=token_ids,
    cache_salt=st.text(max_size=3),
)


def send(message: wire.ToEngine, frames: list[wire.Frame]) -> tuple[wire.ToEngine, list[bytes]]:
    sent = [bytes(frame) for frame in wire.encode(message, frames)]
    return wire.decode_to_engine(sent), sent


def assert_same(got: Request, wanted: Request) -> None:
    for field in dataclasses.fields(Request):
        if field.name != "items":
            assert getattr(got, field.name) == getattr(wanted, field.name)
    assert len(got.items) == len(wanted.items)
    for mine, theirs in zip(got.items, wanted.items, strict=True):
        assert mine.placeholder == theirs.placeholder
        assert mine.content_key == theirs.content_key
        assert list(mine.tensors) == list(theirs.tensors)
        for name, tensor in mine.tensors.items():
            assert tensor.dtype == theirs.tensors[name].dtype
            assert tensor.shape == theirs.tensors[name].shape
            assert torch.equal(tensor, theirs.tensors[name])


@given(requests)
def test_a_request_arrives_as_it_was_sent(request: Request) -> None:
    frames: list[wire.Frame] = []
    message, sent = send(wire.Add(wire.pack_request(request, frames)), frames)
    assert isinstance(message, wire.Add)
    assert_same(wire.unpack_request(message.request, sent), request)


@given(requests)
def test_the_start_message_arrives_as_it_was_sent(request: Request) -> None:
    config = EngineConfig(
        model="m", plugins=("a=b",), limit_mm_per_prompt={"image": 3}, kv_cache_memory=1 << 40
    )
    frames: list[wire.Frame] = []
    message, sent = send(wire.Start(config, wire.pack_request(request, frames)), frames)
    assert isinstance(message, wire.Start)
    assert message.config == config
    assert_same(wire.unpack_request(message.profile_request, sent), request)


def image_request(tensor: torch.Tensor) -> Request:
    item = Item(PlaceholderRange("image", 0, 0, 1), "key", {"x": tensor})
    return Request("r", (1,), SamplingParams(), (item,))


def test_tensors_that_are_not_contiguous_arrive_in_order() -> None:
    tensor = torch.arange(12).reshape(3, 4).T[1:]
    frames: list[wire.Frame] = []
    message, sent = send(wire.Add(wire.pack_request(image_request(tensor), frames)), frames)
    assert torch.equal(wire.unpack_request(message.request, sent).items[0].tensors["x"], tensor)


def test_a_contiguous_tensor_is_sent_without_a_copy() -> None:
    tensor = torch.zeros(4)
    frames: list[wire.Frame] = []
    wire.pack_request(image_request(tensor), frames)
    tensor[0] = 1.0
    assert bytes(frames[0]) == tensor.numpy().tobytes()


def test_received_tensors_can_be_written_to_and_outlive_the_frames() -> None:
    frames: list[wire.Frame] = []
    message, sent = send(wire.Add(wire.pack_request(image_request(torch.ones(3)), frames)), frames)
    tensor = wire.unpack_request(message.request, sent).items[0].tensors["x"]
    kept = list(sent)
    tensor += 1
    assert sent == kept
    sent.clear()
    assert tensor.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "message",
    [wire.Abort("r"), wire.StatsRequest(), wire.Shutdown()],
    ids=lambda m: type(m).__name__,
)
def test_messages_to_the_engine_keep_their_kind(message: wire.ToEngine) -> None:
    assert send(message, [])[0] == message


OUTPUT = RequestOutput(
    "r",
    [
        CompletionOutput(
            1, "text", [5], [{5: Logprob(-0.5, 1, "t"), 6: Logprob(-1.0)}], "stop", stop_reason
        )
        for stop_reason in (None, "STOP", 7)
    ],
    True,
    ErrorInfo("RequestError", "no", "prompt"),
)


@pytest.mark.parametrize(
    "message",
    [
        wire.Ready(EngineInfo(1, 2, 3, 4, "float32", "cpu", "p 1", "A", 5, 6.0)),
        wire.Failed("StartupError", "no"),
        wire.Outputs([OUTPUT]),
        wire.Stats(EngineStats(*range(len(dataclasses.fields(EngineStats))))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_messages_from_the_engine_arrive_as_they_were_sent(message: wire.FromEngine) -> None:
    assert wire.decode_from_engine(wire.encode(message)) == message


def test_times_arrive_with_the_output() -> None:
    sent = RequestOutput("r", times=RequestTimes(0.25, 1.5))
    got = wire.decode_from_engine(wire.encode(wire.Outputs([sent, OUTPUT])))
    assert isinstance(got, wire.Outputs)
    assert [output.times for output in got.outputs] == [RequestTimes(0.25, 1.5), None]
