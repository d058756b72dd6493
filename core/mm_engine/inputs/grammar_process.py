"""Compiles grammars: `python -m mm_engine.inputs.grammar_process FD PARENT_PID`.

Their sources are anyone's, and one may take hours or all memory, or end the process that compiles
it. So it is done here, where that harms nobody; `GrammarCompiler` starts and ends it.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from multiprocessing.connection import Connection

import msgspec
import psutil

from mm_engine.processes import end_with_parent, leave_signals_to_parent
from mm_engine.sampling_params import StructuredOutputsParams

MAX_MEMORY = 2**30  # bytes of addresses beyond those of the libraries


class Compiled(msgspec.Struct, tag=True):
    """What came of a grammar: its bytes, or why there are none."""

    grammar: bytes | None
    why: str = ""


def main(fd: int, parent_pid: int) -> int:
    """Compile what comes, until the other end is closed. First comes the vocabulary."""
    leave_signals_to_parent()
    end_with_parent(parent_pid)
    connection = Connection(fd)
    from mm_engine.errors import RequestError
    from mm_engine.worker.grammars import compile_grammar, load_xgrammar

    with contextlib.suppress(EOFError, BrokenPipeError):
        xgrammar = load_xgrammar()
        vocabulary = xgrammar.TokenizerInfo.deserialize_json(connection.recv_bytes().decode())
        _limit_memory()
        connection.send_bytes(b"ready")
        while True:
            structure = msgspec.msgpack.decode(
                connection.recv_bytes(), type=StructuredOutputsParams
            )
            try:
                answer = Compiled(compile_grammar(vocabulary, structure))
            except RequestError as error:
                answer = Compiled(None, str(error))
            except MemoryError:
                answer = Compiled(None, "the grammar takes too much memory. Simplify it.")
            except Exception as error:  # a library's, about anything; no traceback leaves here
                name = type(error).__name__
                answer = Compiled(None, f"the grammar can't be compiled ({name}). Simplify it.")
            connection.send_bytes(msgspec.msgpack.encode(answer))
    return 0


def _limit_memory() -> None:
    limit = psutil.Process().memory_info().vms + MAX_MEMORY
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
