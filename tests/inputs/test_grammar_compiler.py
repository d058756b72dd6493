"""Grammars are compiled in a process of its own: none takes longer than it may, or harms another.

Row 13 of the robustness table: invalid and catastrophic ones, and one right after a valid one.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from transformers import AutoTokenizer

from mm_engine.errors import Overloaded, RequestError
from mm_engine.inputs import grammar_compiler
from mm_engine.inputs.grammar_compiler import GrammarCompiler
from mm_engine.plugins.discovery import demos
from mm_engine.sampling_params import StructuredOutputsParams
from mm_engine.worker.grammars import Grammars

GOOD = StructuredOutputsParams(regex=r"\d{3}")
ENDLESS = StructuredOutputsParams(regex="(" * 900 + "a" + "|b)*" * 900)
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = AutoTokenizer.from_pretrained(min(demos().items())[1])
    return Grammars(tokenizer, len(tokenizer), [2])


@pytest.fixture
def compiler(grammars: Grammars) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(grammars, TIMEOUT)
    yield compiler
    compiler.close()
    assert not children()


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if grammar_compiler.PROCESS in child.cmdline()
    ]


def test_what_comes_back_is_what_is_compiled_here(
    compiler: GrammarCompiler, grammars: Grammars
) -> None:
    assert not children()  # nothing before it is needed
    for structure in (GOOD, StructuredOutputsParams(json={"type": "object"})):
        assert compiler.compile(structure) == grammars.compile(structure)
    assert len(children()) == 1


def test_results_are_kept_and_refusals_too(compiler: GrammarCompiler) -> None:
    bad = StructuredOutputsParams(regex="[a")
    first = compiler.compile(GOOD)
    with pytest.raises(RequestError) as refused:
        compiler.compile(bad)
    (process,) = children()
    process.suspend()  # nobody is there who could do it again
    assert compiler.compile(GOOD) is first
    with pytest.raises(RequestError) as again:
        compiler.compile(bad)
    assert str(again.value) == str(refused.value)
    process.resume()


def test_an_endless_one_is_cut_off_and_the_next_is_compiled(compiler: GrammarCompiler) -> None:
    compiler.compile(GOOD)
    start = time.monotonic()
    with pytest.raises(RequestError, match="longer than 1 s to compile"):
        compiler.compile(ENDLESS)
    assert time.monotonic() - start < 10 * TIMEOUT
    assert compiler.compile(StructuredOutputsParams(regex=r"\d{4}"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process' addresses")
def test_the_process_cant_take_all_memory() -> None:
    program = (
        "from mm_engine.inputs import grammar_process as process\n"
        "getattr(process, {limit!r}, object)()\n"
        "try: bytearray(2 * process.MAX_MEMORY)\n"
        "except MemoryError: print('refused')\n"
        "else: print('taken')\n"
    )

    def run(limit: str) -> str:
        command = [sys.executable, "-c", program.format(limit=limit)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert (run("_limit_memory"), run("object")) == ("refused", "taken")


def test_a_process_that_ends_costs_one_grammar(compiler: GrammarCompiler) -> None:
    compiler.compile(GOOD)
    (process,) = children()
    killer = threading.Timer(0.3, process.kill)
    killer.start()
    with pytest.raises(RequestError, match="its compiler has ended"):
        compiler.compile(ENDLESS)
    assert compiler.compile(StructuredOutputsParams(regex="b+"))


def test_a_process_that_ended_while_idle_costs_none(compiler: GrammarCompiler) -> None:
    compiler.compile(GOOD)
    (process,) = children()
    process.kill()
    process.wait()
    assert compiler.compile(StructuredOutputsParams(regex="c+"))


def test_what_nobody_waits_for_any_more_is_given_up(compiler: GrammarCompiler) -> None:
    """Row 27: neither one that is being compiled holds up others, nor one that waits its turn."""
    patient = GrammarCompiler(compiler._grammars, 600.0)
    try:
        left = [threading.Event() for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(patient.compile, ENDLESS, None, event) for event in left]
            time.sleep(0.5)
            assert not any(job.done() for job in jobs)
            for event in left:
                event.set()
            assert all(isinstance(job.exception(60), RequestError) for job in jobs)
        assert patient.compile(GOOD)
    finally:
        patient.close()


def test_no_client_learns_that_another_had_brought_a_grammar(compiler: GrammarCompiler) -> None:
    compiler.compile(GOOD, b"alice")
    (process,) = children()
    process.suspend()
    assert compiler.compile(GOOD, b"alice")
    with pytest.raises(RequestError, match="longer than"):  # it has to be compiled
        compiler.compile(GOOD, b"bob")


def test_a_library_that_stumbles_is_no_dead_process(compiler: GrammarCompiler) -> None:
    before = [compiler.compile(GOOD), children()]
    for schema in ('{"type": "object", "patternProperties": 5}', '{"required": [["x"]]}'):
        with pytest.raises(RequestError, match="must be"):
            compiler.compile(StructuredOutputsParams(json=schema))
    assert [compiler.compile(GOOD), children()] == before


def test_too_many_that_wait_are_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_WAITING", 2)
    compiler.compile(GOOD)
    (process,) = children()
    process.suspend()
    with ThreadPoolExecutor(3) as pool:
        jobs = [
            pool.submit(compiler.compile, StructuredOutputsParams(regex=letter)) for letter in "abc"
        ]
        errors = [job.exception(30) for job in jobs]
    assert sum(isinstance(error, Overloaded) for error in errors) == 1
    # The first is cut off and its process ended; another compiles the one that waited.
    assert sum(isinstance(error, RequestError) for error in errors) == 1
    assert errors.count(None) == 1
    assert compiler.compile(StructuredOutputsParams(regex="d"))


def test_closing_ends_the_process_and_refuses_others(compiler: GrammarCompiler) -> None:
    compiler.compile(GOOD)
    compiler.close()
    assert not children()
    with pytest.raises((RequestError, Overloaded)):
        compiler.compile(StructuredOutputsParams(regex="e"))
