"""transformers' modelling code without the parts of torch that only compiling and training need.

To import it takes seconds and 150 MB more than to run it: decorators pull in `torch._dynamo` (and
with it sympy and triton), checks for distributed tensors pull in `torch.distributed.tensor`.
Processes of our own, in which nothing is compiled, import it through here first. A program that
embeds the engine does not: it may compile models by itself, or hold distributed tensors.

Nor is garbage looked for meanwhile: what is imported stays, and to go through all of it again and
again takes a seventh of the time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
#: What transformers' modules take of it while they are imported: the name of a submodule, the name.
USED_LATER = ("torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex")
ASKS = "is_torch_distributed_available"  # a function of transformers.utils
MARKS = ("allow_in_graph", "assume_constant_result", "disable")
MODULES = ("masking_utils", "integrations.sonicmoe", "modeling_utils", "image_processing_utils")


def import_transformers(*others: str) -> None:
    """Import transformers' modelling and processing code, and then `others`, modules that need it.

    What it lacks then is said above; nothing where the compiler is imported already. Call it before
    other threads start: for its while, modules of torch are stood in for.
    """
    with _no_collection():
        _import_transformers()
        for name in others:
            importlib.import_module(name)


def _import_transformers() -> None:
    import torch
    import transformers

    with _one_scan(), contextlib.suppress(Exception):  # whatever fails is imported as usual, later
        importlib.import_module("transformers.models")
    if COMPILER in sys.modules:
        return
    # It asks once, and keeps the answer. Older versions ask torch, but import nothing yet.
    ask = getattr(importlib.import_module("transformers.utils"), ASKS, lambda: None)
    with _replaced(torch.distributed, "is_available", lambda: False):
        ask()
    with _no_compiler(torch), contextlib.suppress(Exception):
        for name in MODULES:
            importlib.import_module(f"{transformers.__name__}.{name}")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Let objects be made without a look for garbage; nor is any looked for among them later."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextlib.contextmanager
def _one_scan() -> Iterator[None]:
    """transformers reads its thousands of files for what they define twice: by the name of their
    folder, which it keeps, and by that of a file therein. Here the second is taken for the first.
    """
    utils = importlib.import_module("transformers.utils.import_utils")
    scan: Callable[[Any], Any] = utils.create_import_structure_from_path

    def by_folder(path: Any) -> Any:
        return scan(Path(path).parent if Path(path).name == "__init__.py" else path)

    with _replaced(utils, "create_import_structure_from_path", by_folder):
        yield


@contextlib.contextmanager
def _no_compiler(torch: Any) -> Iterator[None]:
    """Have decorators that tell the compiler something leave a function as it is."""

    def mark(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else mark

    def used_later(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    module, name = USED_LATER
    compiler, part = ModuleType(COMPILER), ModuleType(module)
    compiler.__path__ = []  # a package
    for decorator in MARKS:
        setattr(compiler, decorator, mark)
    setattr(part, name, used_later)
    sys.modules.update({COMPILER: compiler, module: part})
    torch._dynamo = compiler
    try:
        with _replaced(torch.compiler, "disable", mark):
            yield
    finally:
        del torch._dynamo, sys.modules[COMPILER], sys.modules[module]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
