"""A CUDA card that isn't there: its tensors lie in the CPU's memory, and its rules are a card's.

What is on it are `CardTensor`s, which compute on the CPU. As on a card

- tensors of the card and of the host don't mix;
- what is known to make the host wait is noted, and forbidden while a graph is captured;
- a copy to pinned memory has arrived when an event behind it has been waited for, and is garbage
  before; pinned memory that is on its way to the card may not be written to;
- a captured graph repeats its launches over the same tensors, and what was allocated while it was
  captured is overwritten by every other graph's replay.

Time, memory and streams are not pretended: what is launched is done at once. `pretend_cuda` tells
PyTorch of it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pretend_tensor import CardTensor, Dispatch, as_tensors, is_pinned, on_card, spoil, to_host

aten = torch.ops.aten

#: Files whose lines are told: of the engine, its plugins and transformers, wherever they lie.
PACKAGE = re.compile(
    r"/(core/mm_engine|kernels/mm_engine_kernels|plugins/mm_\w+/mm_\w+|site-packages/transformers)/"
)

#: The sizes of their results hang on numbers, or the result is a number.
ASKING = frozenset(
    (
        aten._local_scalar_dense,
        aten._unique,
        aten._unique2,
        aten.bincount,
        aten.equal,
        aten.masked_select,
        aten.nonzero,
        aten.repeat_interleave,
        aten.unique_consecutive,
        aten.unique_dim,
    )
)
INDEXING = frozenset((aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_))


@dataclass(frozen=True)
class Wait:
    """One time that the host waited for the device."""

    what: str
    lines: list[str]  # of the engine, its plugins and transformers, that led to it

    @property
    def where(self) -> str:
        """The innermost line."""
        return self.lines[-1] if self.lines else ""


@dataclass
class Launches:
    """A graph: what was launched, each with the tensors that it allocated."""

    made: list[tuple[Callable[[], Any], list[Tensor]]] = field(default_factory=list)


@dataclass
class Card:
    """The card that is pretended, and what was seen of it."""

    waits: list[Wait] = field(default_factory=list)
    graphs: list[Launches] = field(default_factory=list)
    num_replays: int = 0
    num_kernels: int = 0  # that were launched past PyTorch
    num_copies: int = 0  # that the host didn't wait for
    capturing: Launches | None = None
    _to_host: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    _to_card: list[tuple[int, ref[Tensor], Tensor]] = field(default_factory=list)

    def wait(self, what: str) -> None:
        """The host waits for all that was launched.

        Raises:
            RuntimeError: a graph is being captured.
        """
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        lines = [
            f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.line}"
            for frame in traceback.extract_stack()
            if PACKAGE.search(frame.filename)
        ]
        self.waits.append(Wait(what, lines))
        self.arrive(self.num_copies)

    def arrive(self, number: int) -> None:
        """All copies up to this one are done.

        Raises:
            AssertionError: memory that was being copied to the card was written to meanwhile.
        """
        with torch.inference_mode():
            for own, target, numbers in self._to_host:
                if own <= number:
                    target.copy_(numbers)
        self._to_host = [one for one in self._to_host if one[0] > number]
        for own, source, numbers in self._to_card:
            alive = source()
            if own <= number and alive is not None:
                assert torch.equal(alive, numbers), "written to while it was copied to the card"
        self._to_card = [one for one in self._to_card if one[0] > number]

    def launch(self, function: Callable[[], Any], *, allocates: bool) -> Any:
        """Do what is launched, and note it for a graph."""
        made = function()
        if self.capturing is not None:
            outs = [x for x in tree_leaves(made) if isinstance(x, Tensor)] if allocates else []
            self.capturing.made.append((function, outs))
        return made

    def kernel(self, function: Callable[..., Any], *, allocates: bool) -> Callable[..., Any]:
        """A function over the host's tensors as a kernel that is launched past PyTorch."""

        def launched(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if not any(isinstance(x, CardTensor) for x in tensors):
                return function(*args, **kwargs)
            if not all(isinstance(x, CardTensor) for x in tensors):
                raise ValueError("a kernel can't read the host's memory")
            hosts, options = tree_map(to_host, (args, kwargs))
            self.num_kernels += 1
            made = self.launch(lambda: function(*hosts, **options), allocates=allocates)
            return CardTensor(made) if allocates else made

        return launched

    @contextmanager
    def capture(self) -> Iterator[Launches]:
        """Note what is launched, as a graph."""
        assert self.capturing is None
        self.capturing = graph = Launches()
        try:
            yield graph
        finally:
            self.capturing = None
        self.graphs.append(graph)

    def replay(self, graph: Launches) -> None:
        """Launch all of a graph again; others' tensors lie in the same memory."""
        self.num_replays += 1
        with torch.inference_mode():
            for other in self.graphs:
                for _, outs in other.made if other is not graph else ():
                    for out in outs:
                        spoil(out)
            for function, outs in graph.made:
                made = [x for x in tree_leaves(function()) if isinstance(x, Tensor)]
                for out, numbers in zip(outs, made, strict=False):
                    out.copy_(numbers)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute one of PyTorch's operators where its tensors are.

        Raises:
            RuntimeError: they are here and there.
        """
        leaves = tree_leaves((args, kwargs))
        ours = {id(x.host): x for x in leaves if isinstance(x, CardTensor)}
        if not ours and not on_card(kwargs.get("device")):
            return func(*args, **kwargs)
        if func._can_decompose():
            with Dispatch():
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        packet = func.overloadpacket
        if packet is aten.copy_:
            return self.copy_to(args[0], args[1], unblocked=bool((*args, False)[2]))
        if packet is aten._to_copy:
            return self.copy_of(args[0], **kwargs)
        if packet is aten._fused_sdp_choice:
            return 0  # plain products: what PyTorch has for cards has no form for CPUs
        self._check(packet, args, leaves)
        hosts, options = tree_map(to_host, (args, kwargs))
        if on_card(options.get("device")):
            options["device"] = torch.device("cpu")
        allocates = not any(out.alias_info for out in func._schema.returns)
        made = self.launch(lambda: func(*hosts, **options), allocates=allocates)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return ours[id(x)] if id(x) in ours else CardTensor(x)

        return tree_map(wrapped, made)

    def get(self, tensor: CardTensor, index: Any) -> Tensor:
        """`tensor[index]`."""
        index = as_tensors(index)
        by_tensors = self._check_indices(tree_leaves(index))
        at = tree_map(to_host, index)
        return CardTensor(self.launch(lambda: tensor.host[at], allocates=by_tensors))

    def put(self, tensor: CardTensor, index: Any, value: Any) -> None:
        """`tensor[index] = value`. A number, too, is copied to the card, unless it is behind a mask
        or a slice (`THPVariable_setitem` and `_index_put_impl_` of PyTorch)."""
        index, of_host = as_tensors(index), not isinstance(value, CardTensor)
        tensors = [x for x in tree_leaves(index) if isinstance(x, Tensor)]
        is_single = of_host and not (isinstance(value, Tensor) and value.dim())
        if is_single and len(tensors) == 1 and tensors[0].dtype == torch.bool:
            self._check_indices(tensors, masks_wait=False)
        else:
            self._check_indices(tensors)
            if tensors and of_host and not is_single:
                raise mixed("index_put_")
            if of_host and (tensors or isinstance(value, Tensor)):
                self.wait("what the host puts at an index")
        at, numbers = tree_map(to_host, (index, value))
        self.launch(lambda: tensor.host.__setitem__(at, numbers), allocates=False)

    def copy_to(self, target: Tensor, source: Tensor, *, unblocked: bool) -> Tensor:
        """`target.copy_(source)`."""
        numbers = to_host(source)
        if isinstance(target, CardTensor):
            self._bring(source, unblocked=unblocked)
            self.launch(lambda: target.host.copy_(numbers), allocates=False)
        elif unblocked and is_pinned(target):
            if self.capturing is not None:
                raise RuntimeError("a graph would write to the host")
            self.num_copies += 1
            self._to_host.append((self.num_copies, target, numbers.clone()))
            spoil(target)
        else:
            self.wait("a copy to the host")
            target.copy_(numbers)
        return target

    def copy_of(
        self, source: Tensor, *, device: Any = None, non_blocking: bool = False, **options: Any
    ) -> Tensor:
        """`source.to(device, …)`."""
        numbers = to_host(source)
        if device is not None and not on_card(device):
            self.wait("a copy to the host")
            copied: Tensor = aten._to_copy.default(numbers, **options)
            return copied
        self._bring(source, unblocked=non_blocking)
        made = self.launch(lambda: aten._to_copy.default(numbers, **options), allocates=True)
        return CardTensor(made)

    def _bring(self, source: Tensor, *, unblocked: bool) -> None:
        """What it takes to have the host's numbers on the card."""
        if isinstance(source, CardTensor):
            return
        if not (unblocked and is_pinned(source)):
            self.wait("a copy to the card of memory that isn't pinned")
            return
        self.num_copies += 1
        self._to_card.append((self.num_copies, ref(source), source.clone()))

    def _check(self, packet: Any, args: Any, leaves: list[Any]) -> None:
        strangers = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, CardTensor)]
        if packet in ASKING:
            self.wait(packet.__name__)
        if packet in INDEXING:
            self._check_indices(args[1])
            strangers = [x for x in strangers if all(x is not index for index in args[1])]
            if strangers and not strangers[0].dim():
                self.wait("what the host puts at an index")
        if any(x.dim() for x in strangers):  # single numbers travel with the launch
            raise mixed(packet.__name__)

    def _check_indices(self, indices: list[Any], *, masks_wait: bool = True) -> bool:
        """Whether there are tensors among them."""
        tensors = [x for x in indices if isinstance(x, Tensor)]
        if masks_wait and any(x.dtype in (torch.bool, torch.uint8) for x in tensors):
            self.wait("an index by a mask")
        if any(not isinstance(x, CardTensor) for x in tensors):
            self.wait("an index that is on the host")
        if any(not x.dim() and x.dtype != torch.bool for x in tensors):
            self.wait("an index that is one number")
        return bool(tensors)


def mixed(name: str) -> RuntimeError:
    """As PyTorch says it."""
    return RuntimeError(
        f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu"
    )
