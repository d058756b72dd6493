"""Structured output: an answer is held to all of what was asked, or the request is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_engine.errors import RequestError
from mm_engine.request import Request
from mm_engine.sampling_params import MAX_GRAMMAR_LENGTH, SamplingParams, StructuredOutputsParams
from mm_engine.sequence import Sequence
from mm_engine.worker.grammars import Grammars, forbid, forbid_on_device
from mm_engine.worker.sampler import Sampler
from structured import EOS, answer

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "label": {"enum": ["a", "b"]}},
    "required": ["x", "label"],
}


@pytest.mark.parametrize("seed", range(8))
def test_answers_keep_to_their_structure(grammars: Grammars, tokenizer: Any, seed: int) -> None:
    text = answer(grammars, tokenizer, seed, regex=r"[a-c]{2}-\d{1,3}")
    assert text is not None and re.fullmatch(r"[a-c]{2}-\d{1,3}", text)
    choices = ("yes", 'no "not"\n', "c\\d é")
    assert answer(grammars, tokenizer, seed, choice=choices) in choices
    text = answer(grammars, tokenizer, seed, grammar='root ::= "x" root | "y"')
    assert text is None or re.fullmatch("x*y", text)
    text = answer(grammars, tokenizer, seed, json=POINT)
    assert text is not None
    point = json.loads(text)
    assert isinstance(point["x"], int) and point["label"] in ("a", "b") and len(point) == 2
    text = answer(grammars, tokenizer, seed, json_object=True)
    assert text is None or isinstance(json.loads(text), dict)


def test_without_a_structure_noise_is_nothing_of_the_kind(tokenizer: Any) -> None:
    logits = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    sequence = Sequence(Request("r", (1,), SamplingParams(temperature=0.0)))
    (token,) = Sampler(0).sample(logits, [sequence])
    assert not re.match("[xy]", tokenizer.decode([token.token_id]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_neighbours_sample_what_they_sample_alone(
    grammars: Grammars, tokenizer: Any, seed: int, num_steps: int
) -> None:
    structure = StructuredOutputsParams(json=POINT)
    held = SamplingParams(seed=3, structured_outputs=structure)
    grammar = grammars.compile(structure)

    def run(*requests: Request) -> list[list[int]]:
        sequences, sampler = [Sequence(r) for r in requests], Sampler(0, grammars)
        noise = torch.Generator().manual_seed(seed)
        for _ in range(num_steps):
            row = torch.randn(1, len(tokenizer), generator=noise)
            row[0, EOS] = -100.0
            for sequence, token in zip(
                sequences, sampler.sample(row.repeat(len(sequences), 1), sequences), strict=True
            ):
                assert token.token_id is not None
                sequence.token_ids.append(token.token_id)
        return [sequence.output_token_ids for sequence in sequences]

    free = Request("free", (1, 2), SamplingParams(seed=4))
    structured = Request("structured", (1, 2), held, grammar=grammar)
    assert run(free, structured, free) == [*run(free), *run(structured), *run(free)]
    assert run(free) != run(structured)


@pytest.mark.parametrize(
    ("structure", "told"),
    [
        ({"regex": "[a-"}, "the regex can't be compiled: .*Unclosed"),
        ({"regex": "a(?=b)b"}, "lookaheads"),
        ({"regex": "a^b"}, r"\^ and \$ in its middle"),
        ({"regex": r"\bword"}, "the regex can't be compiled"),
        ({"grammar": "root ::= foo"}, "the grammar can't be compiled: .*foo"),
        ({"grammar": "nothing"}, "the grammar can't be compiled"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": {"type": "banana"}}, "the JSON schema can't be compiled: .*banana"),
        ({"json": {"enum": []}}, "the JSON schema can't be compiled"),
        ({"json": False}, "the JSON schema can't be compiled"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum greater"),
        ({"structural_tag": "{}"}, "the structural tag can't be compiled"),
    ],
)
def test_what_cant_be_compiled_is_refused(
    grammars: Grammars, structure: dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError, match=told) as refused:
        grammars.compile(StructuredOutputsParams(**structure))
    message = str(refused.value)
    assert message.isprintable() and len(message) < 300 and ".cc" not in message


def test_a_grammar_that_takes_ever_longer_ends_its_request(
    grammars: Grammars, tokenizer: Any
) -> None:
    a = tokenizer.convert_tokens_to_ids("a")

    def follow(grammar: str) -> int:
        state = grammars.follow(grammars.compile(StructuredOutputsParams(grammar=grammar)))
        ids: list[int] = []
        while len(ids) < 1500:
            state.allowed(ids)
            ids.append(a)
        return len(ids)

    assert follow('root ::= "a" root | "a"') == 1500
    with pytest.raises(RequestError, match="takes too long to follow"):
        follow('root ::= root root root | "a" | ""')


def test_behind_its_end_a_grammar_is_asked_nothing(grammars: Grammars, tokenizer: Any) -> None:
    """An overlapped step samples one token too many; it is thrown away."""
    state = grammars.follow(grammars.compile(StructuredOutputsParams(choice=["a"])))
    a = tokenizer.convert_tokens_to_ids("a")
    assert state.allowed([]).any() and state.allowed([a]).any()
    assert state.allowed([a, EOS]).eq(-1).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 130), st.integers(0, 40), st.data())
def test_all_rows_are_masked_at_once_as_one_by_one(
    num_rows: int, num_ids: int, num_more: int, data: st.DataObject
) -> None:
    """By xgrammar's own code on a CPU, and by PyTorch alone on other devices."""
    width = -(-num_ids // 32)
    rows = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True))
    bits = {
        row: torch.tensor(
            [data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=width, max_size=width))],
            dtype=torch.int32,
        )
        for row in rows
    }
    logits = torch.randn(num_rows, num_ids + num_more)
    expected = logits.clone()
    for row, words in bits.items():
        for token in range(logits.shape[1]):
            word, bit = divmod(token, 32)
            if word >= width or not (int(words[0, word]) >> bit) & 1:
                expected[row, token] = float("-inf")
    masked = logits.clone()
    forbid(masked, bits)
    assert torch.equal(masked, expected)
    on_device, within = logits.clone(), min(32 * width, logits.shape[1])
    forbid_on_device(
        on_device[:, :within], torch.tensor(list(rows)), torch.cat([bits[row] for row in rows])
    )
    assert torch.equal(on_device[:, :within], expected[:, :within])


def test_a_column_is_not_taken_for_a_row() -> None:
    logits = torch.zeros(2, 1)
    forbid(logits, {0: torch.tensor([[1]], dtype=torch.int32)})
    assert logits.tolist() == [[0.0], [0.0]]
    forbid(logits, {0: torch.tensor([[0]], dtype=torch.int32)})
    assert logits.tolist() == [[float("-inf")], [0.0]]


def test_answers_of_one_request_share_its_time(grammars: Grammars, tokenizer: Any) -> None:
    a = tokenizer.convert_tokens_to_ids("a")
    grammar = grammars.compile(
        StructuredOutputsParams(grammar='root ::= root root root | "a" | ""')
    )

    def length(num_answers: int) -> int:
        state, ids = grammars.follow(grammar, num_answers), list[int]()

        def go_on() -> None:
            while True:
                state.allowed(ids)
                ids.append(a)

        with pytest.raises(RequestError, match="takes too long to follow"):
            go_on()
        return len(ids)

    assert length(32) < length(1)


@pytest.mark.parametrize(
    ("given_fields", "told"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "exactly one"),
        ({"json_object": False}, "exactly one"),
        ({"regex": ""}, "regex must be a text"),
        ({"regex": 3}, "regex must be a text"),
        ({"choice": []}, "choice must hold strings"),
        ({"choice": ["a", 3]}, "choice must hold strings"),
        ({"choice": "ab"}, "choice must hold strings"),
        ({"choice": ["a", ""]}, "no empty string"),
        ({"json": {"a": {1}}}, "json must be a JSON schema"),
        ({"grammar": "x" * (MAX_GRAMMAR_LENGTH + 1)}, "at most 65,536 characters"),
    ],
)
def test_malformed_structures_are_refused(given_fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        StructuredOutputsParams(**given_fields)


@pytest.mark.parametrize("field", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_what_contradicts_a_structure_is_refused(field: dict[str, Any]) -> None:
    structure = StructuredOutputsParams(regex="a")
    assert SamplingParams(structured_outputs=structure).structured_outputs is structure
    with pytest.raises(RequestError, match="can't be combined with structured output"):
        SamplingParams(structured_outputs=structure, **field)
