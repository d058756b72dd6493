"""An item is answered the same alone, among others, from the cache, and cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mm_engine.errors import RequestError
from mm_engine.request import Request
from mm_engine.testing.compare import LOGITS_TOLERANCE, difference
from mm_engine.testing.engine_run import Watched, answered, request_of
from mm_engine.testing.fault import Fault, Skip
from mm_engine.testing.prompts import prompts, shapes
from mm_engine.testing.registry import check
from mm_engine.testing.sizes import picture

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

NUM_TOKENS = 8
STATE = "does the model keep state from one call to the next, or write into what it was given?"


def requests_of(subject: Subject) -> list[Request]:
    """The requests of these checks."""
    return [
        request_of(subject, prompt.ids, prompt.images, NUM_TOKENS, f"r{index}")
        for index, prompt in enumerate(prompts(subject, NUM_TOKENS))
    ]


def alone(subject: Subject) -> tuple[list[Request], Watched]:
    """The requests, and what each was answered when nothing else ran; made once."""
    if "alone" not in subject.memory:
        requests = requests_of(subject)
        watched = Watched(subject.runner)
        for request in requests:
            one, _ = answered(subject, [request])
            watched.tokens.update(one.tokens)
            watched.logits.update(one.logits)
        subject.memory["alone"] = (requests, watched)
    found: tuple[list[Request], Watched] = subject.memory["alone"]
    return found


def different(requests: Sequence[Request], expected: Watched, got: Watched) -> str | None:
    """Say how answers differ: by their logits, up to the first token that differs by a tie."""
    for request in requests:
        name = request.request_id
        steps = zip(expected.logits[name], got.logits[name], strict=True)
        for position, (first, second) in enumerate(steps):
            gap = difference(first, second, LOGITS_TOLERANCE)
            if gap is not None:
                return f"logits of token {position} {gap}"
            if expected.tokens[name][position] != got.tokens[name][position]:
                break  # a tie: from here on they answer different prompts
    return None


@check("same-in-batch")
def same_in_batch(subject: Subject) -> str:
    """An image has the same features alone and among others, and its request the same answer."""
    tensors = []
    for size in shapes(subject):
        try:
            tensors.append(subject.map(picture(size)))
        except RequestError:
            continue
    single = [subject.embed([item])[0] for item in tensors]
    for order in (1, -1):
        together = subject.embed(tensors[::order])[::order]
        _compare_rows(subject, single, together)
    requests, expected = alone(subject)
    got, _ = answered(subject, requests)
    gap = different(requests, expected, got)
    if gap is not None:
        raise _fault(subject, f"the same answer among {len(requests)} requests as alone", gap)
    return f"{len(tensors)} images of different sizes, {len(requests)} requests"


def _compare_rows(subject: Subject, single: list[Tensor], together: list[Tensor]) -> None:
    for index, (expected, got) in enumerate(zip(single, together, strict=True)):
        gap = difference(expected, got)
        if gap is not None:
            raise subject.blame(
                "embed_images",
                f"the same rows for image {index} among {len(single)} as alone",
                gap,
                "are the images' tiles split apart again, in the right order? Does padding of "
                "one reach another?",
            )


@check("same-from-cache")
def same_from_cache(subject: Subject) -> str:
    """An image whose features are cached is answered as one that is encoded."""
    requests, expected = alone(subject)
    first = requests[-1]
    again = request_again(first)
    got, engine = answered(subject, [first, again], one_by_one=True)
    hits = engine.stats().num_encoder_hits
    if not hits:
        raise Skip("the second request encoded its images again: nothing was cached")
    got.logits[first.request_id] = got.logits[again.request_id]
    got.tokens[first.request_id] = got.tokens[again.request_id]
    gap = different([first], expected, got)
    if gap is not None:
        raise _fault(subject, "the same answer from cached features", gap)
    return f"{hits} of {len(again.items)} images from the cache"


def request_again(request: Request) -> Request:
    """The same request under another id."""
    return Request(
        f"{request.request_id}-again",
        request.prompt_token_ids,
        request.sampling_params,
        request.items,
        request.eos_token_ids,
    )


@check("same-in-chunks")
def same_in_chunks(subject: Subject) -> str:
    """A prompt computed in chunks that cut through its images is answered as in one."""
    requests, expected = alone(subject)
    smallest = min(item.placeholder.length for request in requests for item in request.items)
    if smallest < 2:
        raise Skip("not exercised: an image takes 1 token, which no chunk can cut")
    budget = max(len(requests) + 1, smallest // 2)
    got, _ = answered(subject, requests, max_num_batched_tokens=budget)
    if not got.num_cut:
        raise Skip(f"not exercised: no chunk of {budget} tokens cut an image")
    gap = different(requests, expected, got)
    if gap is not None:
        raise _fault(subject, f"the same answer in chunks of {budget} tokens", gap)
    return f"{got.num_cut} cuts through images, chunks of {budget} tokens"


def _fault(subject: Subject, expected: str, got: str) -> Fault:
    return subject.blame("forward", expected, got, STATE)
