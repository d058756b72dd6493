"""What is imported, and by which of the ways in; never how long it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

#: What takes seconds to import and isn't needed to run a model.
UNNEEDED = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy")

ANSWER = """
from mm_engine.light_imports import import_transformers
import_transformers()
from PIL import Image
from mm_engine import LLM, SamplingParams
from mm_engine.plugins.discovery import demos
llm = LLM(min(demos()), dtype="float32", kv_cache_memory=2**24, progress=False)
content = [
    {"type": "image", "image": Image.new("RGB", (40, 40), "red")},
    {"type": "text", "text": "What colour is it?"},
]
(output,) = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=2))
assert output.error is None, output.error
fact = len(output.outputs[0].token_ids)
"""

COLLECTION = """
import gc
from mm_engine.light_imports import import_transformers
import_transformers("mm_engine.worker.loader")
fact = gc.isenabled(), gc.get_freeze_count() > 100_000, gc.get_stats()[2]["collections"]
"""

AFTERWARDS = """
import torch
import torch.compiler
disable = torch.compiler.disable
from mm_engine.light_imports import import_transformers
import_transformers()
from transformers import masking_utils, modeling_utils
from transformers.integrations import deepgemm
imported = "torch._dynamo" in sys.modules
masks = masking_utils.TransformGetItemToIndex()
import torch._dynamo
fact = {
    "imported": imported,
    "masks": type(masks).__module__,
    "compiler": torch._dynamo.__file__ is not None and callable(torch._dynamo.reset),
    "disable": torch.compiler.disable is disable,
    "distributed": torch.distributed.is_available(),
    "compiled": torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item(),
}
"""

UNKNOWN_VERSION = """
from mm_engine import light_imports
light_imports.USED_LATER = ("torch._dynamo.of_another_version", "Anything")
light_imports.import_transformers()
from transformers import masking_utils, modeling_utils
fact = masking_utils.TransformGetItemToIndex.__module__
"""

NOBODY_ASKS = """
import torch
from mm_engine import light_imports
light_imports.ASKS = "asked_in_no_version"
light_imports.import_transformers()
from transformers import modeling_utils
fact = torch.distributed.is_available()
"""


def run(code: str) -> tuple[Any, set[str]]:
    """`fact` of a program that a new interpreter runs, and the names of what it has imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import json, sys\nfact = None\n{code}\n"
            "print(json.dumps([fact, sorted(sys.modules)]))",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fact, modules = json.loads(done.stdout.splitlines()[-1])
    return fact, set(modules)


@pytest.mark.parametrize(
    "module", ["mm_engine", "mm_engine.engine.launch", "mm_engine.server.run", "mm_engine.cli.main"]
)
def test_these_import_no_torch(module: str) -> None:
    _, modules = run(f"import {module}")
    assert module in modules
    assert {"torch", "transformers"} & modules == set()


@pytest.mark.parametrize("module", ["mm_engine.inputs.fetch", "mm_engine.inputs.local_files"])
def test_images_of_other_hosts_take_no_client_until_one_is_fetched(module: str) -> None:
    _, modules = run(f"import {module}")
    assert module in modules
    assert {"httpx", "httpcore", "anyio", "torch"} & modules == set()


def test_an_answer_to_a_picture_takes_no_compiler() -> None:
    num_tokens, modules = run(ANSWER)
    assert num_tokens == 2
    assert {"torch", "transformers.modeling_utils"} <= modules
    assert set(UNNEEDED) & modules == set()


def test_no_garbage_is_looked_for_among_what_is_imported() -> None:
    fact, modules = run(COLLECTION)
    enabled, frozen, num_collections = fact
    assert enabled and frozen and num_collections <= 2  # what the interpreter did before
    assert "mm_engine.worker.loader" in modules


def test_after_it_everything_is_as_torch_has_it() -> None:
    fact, _ = run(AFTERWARDS)
    assert fact == {
        "imported": False,
        "masks": "torch._dynamo._trace_wrapped_higher_order_op",
        "compiler": True,
        "disable": True,
        "distributed": True,
        "compiled": 2.0,
    }


def test_another_version_of_transformers_is_imported_in_the_usual_way() -> None:
    fact, modules = run(UNKNOWN_VERSION)
    assert fact == "torch._dynamo._trace_wrapped_higher_order_op"
    assert "torch._dynamo" in modules


def test_a_version_that_asks_for_distributed_tensors_otherwise_is_imported() -> None:
    fact, modules = run(NOBODY_ASKS)
    assert fact is True
    assert "transformers.modeling_utils" in modules and "torch._dynamo" not in modules


@pytest.mark.parametrize(
    ("code", "given", "may_spin"),
    [
        ("import mm_engine", None, False),
        ("import torch, mm_engine", None, True),
        ("import torch, mm_engine", "passive", False),
        ("import mm_engine, torch", None, False),
    ],
)
def test_torch_that_was_imported_before_may_spin(
    code: str, given: str | None, may_spin: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    code += "; print(mm_engine.torch_threads.MAY_SPIN)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(may_spin)


@pytest.mark.parametrize(("given", "got"), [(None, "passive"), ("active", "active")])
def test_idle_threads_of_torch_do_not_spin_unless_told_to(given: str | None, got: str) -> None:
    """libgomp, which isn't torch's on every platform, reads it when it's loaded: before torch."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    code = "import sys, mm_engine, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [got, "False"]
