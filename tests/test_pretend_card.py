"""The card that isn't there refuses what a card refuses, and sees what the host waits for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mm_engine.attention.triton_paged import triton_fault
from mm_engine.worker.transfers import HostCopy, fill, to_device
from pretend_card import Card
from pretend_cuda import pretending
from pretend_tensor import DEVICE, CardTensor

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card"),
    pytest.mark.skipif(triton_fault("cpu") is not None, reason="needs Triton and its interpreter"),
]


@pytest.fixture(autouse=True)
def card() -> Iterator[Card]:
    with pretending() as card, torch.inference_mode():
        yield card


def numbers(*values: float) -> Tensor:
    return to_device(list(values), DEVICE, torch.float32)


def test_what_is_computed_stays_on_the_card() -> None:
    made = (numbers(1, 2, 3) * 2 + 1).softmax(-1)
    assert isinstance(made, CardTensor) and made.device == DEVICE and made.is_cuda
    assert torch.equal(made.cpu(), (torch.tensor([3.0, 5.0, 7.0])).softmax(-1))


def test_views_share_their_numbers() -> None:
    base = numbers(1, 2, 3, 4)
    base.view(2, 2)[1].add_(10)
    assert base.tolist() == [1, 2, 13, 14]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(2),
        lambda x: torch.cat([x, torch.ones(2)]),
        lambda x: x @ torch.ones(2),
        lambda x: x.__setitem__(numbers(0).long(), torch.ones(1)),
    ],
    ids=["add", "cat", "matmul", "put"],
)
def test_tensors_of_card_and_host_do_not_mix(mix: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(numbers(1, 2))


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "of pageable memory": lambda x: x.copy_(torch.zeros(2), non_blocking=True),
    "of pinned memory": lambda x: x.copy_(torch.zeros(2).pin_memory()),
    "made there": lambda x: torch.tensor([1, 2], device=DEVICE),
    "mask": lambda x: x[x > 0],
    "index of the host": lambda x: x[torch.tensor([0])],
    "one number": lambda x: x[to_device(0, DEVICE)],
    "list": lambda x: x[[0, 1]],
    "number at an index": lambda x: x.__setitem__(numbers(0).long(), 1.0),
    "nonzero": lambda x: x.nonzero(),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waits_are_seen(card: Card, wait: Callable[[Tensor], object]) -> None:
    x = numbers(1, 2)
    assert not card.waits
    wait(x)
    assert card.waits
    with pytest.raises(RuntimeError, match="capturing"), card.capture():
        wait(x)


def test_what_does_not_wait(card: Card) -> None:
    x = numbers(1, 2, 3)
    fill(x, [4, 5, 6])
    x.index_fill_(0, numbers(0).long(), 7.0)
    x[x > 5] = -1.0
    x[2:] = 5
    made = torch.where(x > 0, x, 0.0).topk(2).values + 1 + torch.tensor(1.0)
    told = HostCopy(made)
    assert not card.waits
    assert told.tolist() == [7, 7]  # waits for its event alone
    assert not card.waits


def test_a_copy_has_arrived_when_its_event_says_so() -> None:
    host = torch.zeros(2).pin_memory()
    host.copy_(numbers(1, 2), non_blocking=True)
    assert host.tolist() != [1, 2]
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert host.tolist() == [1, 2]


@pytest.mark.parametrize("lives", [True, False])
def test_pinned_memory_on_its_way_is_not_written_to(lives: bool) -> None:
    host = torch.zeros(2).pin_memory()
    x = host.to(DEVICE, non_blocking=True)
    host.fill_(1)
    if lives:
        with pytest.raises(AssertionError, match="written to"):
            x.cpu()
    else:  # PyTorch keeps memory that is given up until it was copied
        del host
        gc.collect()
        assert x.tolist() == [0, 0]


def test_a_graph_repeats_its_launches_and_spoils_the_other_graphs(card: Card) -> None:
    x, out = numbers(1, 2), numbers(0, 0)
    with card.capture() as graph:
        inside = x * 2
        out.copy_(inside + 1)
    with card.capture() as other:
        kept = x * 3
    fill(x, [10, 20])
    card.replay(graph)
    assert out.tolist() == [21, 41] and inside.tolist() == [20, 40]
    assert kept.isnan().all()
    card.replay(other)
    assert kept.tolist() == [30, 60]
    assert inside.isnan().all() and out.tolist() == [21, 41]


def test_a_kernel_reads_no_memory_of_the_host(card: Card) -> None:
    double = card.kernel(lambda x: x * 2, allocates=True)
    assert double(numbers(1, 2)).tolist() == [2, 4]
    with pytest.raises(ValueError, match="host's memory"):
        card.kernel(torch.add, allocates=True)(numbers(1, 2), torch.ones(2))
