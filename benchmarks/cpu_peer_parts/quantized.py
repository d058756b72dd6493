"""8- and 4-bit weights: how fast one sequence decodes, and how far the logits are off."""

from __future__ import annotations

import numpy as np

from cpu_peer_parts.bench import Bench, decode_row, rate_of
from cpu_peer_parts.client import PeerError
from cpu_peer_parts.fleet import LLAMA_CPP, TRANSFORMERS, VLLM
from cpu_peer_parts.rows import OURS
from cpu_peer_parts.sizes import QUANTIZATION_OF_LLAMA_CPP, QUANTIZED_BITS

NOT_ASKED = "no 8- or 4-bit weights of a random checkpoint without a conversion of its own"


def quantized(bench: Bench) -> None:
    """Decode of one sequence, and the error of the logits after some prompts.

    The error is the root of the mean square of what differs from the same engine's own logits
    without quantisation, in parts of the standard deviation of these.
    """
    for kind, bits in QUANTIZED_BITS.items():
        row = decode_row(bench, kind, f"decode, 1 sequence, {kind} weights", 1, bits)
        error = bench.row(
            f"{kind} error", f"logit error, {kind} weights", "of the deviation", higher=False
        )
        for each in (row, error):
            for name in (TRANSFORMERS, VLLM):
                each.missing.setdefault(name, NOT_ASKED)
            each.details["llama.cpp"] = QUANTIZATION_OF_LLAMA_CPP[kind].upper()
        try:
            share = 1 / len(QUANTIZED_BITS)
            bench.turns(row, bench.each(rate_of(bench, row, 1, kind)), share)
            for name in (OURS, LLAMA_CPP):
                if name not in error.missing:
                    try:
                        error.rounds[name] = [logit_error(bench, name, kind)]
                        bench.say(f"{error.name} · {name}: {error.rounds[name][0]:.4g}")
                    except PeerError as failed:
                        error.missing[name] = str(failed)
        finally:
            for name in (OURS, LLAMA_CPP):
                bench.fleet.close(name, kind)


def logit_error(bench: Bench, engine: str, kind: str) -> float:
    """How far an engine's logits are off with quantised weights.

    Raises:
        PeerError: the engine can't tell.
    """
    exact, other = (bench.fleet.logits(engine, each) for each in (None, kind))
    return float(np.sqrt(np.square(other - exact).mean()) / exact.std())
