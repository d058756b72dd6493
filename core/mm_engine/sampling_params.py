"""How one request wants its tokens chosen. The names and meanings are vLLM's and OpenAI's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256  # characters; the detokenizer holds back at most this much text
MAX_GRAMMAR_LENGTH = 2**16  # characters of a schema, regex or grammar, or of all choices


def _check(ok: bool, param: str, fact: str) -> None:
    if not ok:
        raise RequestError(f"{param} {fact}.", param=param)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What an answer must look like: exactly one of these, as vLLM names them.

    `json` may be given as a schema or as its text; it is kept as text.

    Raises:
        RequestError: none or several are given, or one is of the wrong type or too long.
    """

    json: str | Mapping[str, Any] | bool | None = None  # a JSON schema
    regex: str | None = None  # the whole answer matches it
    choice: tuple[str, ...] | None = None  # the answer is one of these
    grammar: str | None = None  # in xgrammar's EBNF; it begins at `root`
    json_object: bool | None = None  # any JSON object
    structural_tag: str | None = None  # xgrammar's: free text with structured parts, as JSON

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen: normalising is part of construction
        if self.json is not None and not isinstance(self.json, str):
            try:
                set_field(self, "json", json.dumps(self.json, allow_nan=False))
            except (TypeError, ValueError, RecursionError):
                _check(False, "structured_outputs.json", "must be a JSON schema")
        if isinstance(self.choice, list | tuple):
            set_field(self, "choice", tuple(self.choice))
        set_field(self, "json_object", self.json_object or None)  # False asks for nothing
        given = [name for name in _STRUCTURES if getattr(self, name) is not None]
        names = ", ".join(_STRUCTURES)
        _check(len(given) == 1, "structured_outputs", f"must have exactly one of {names}")
        self._check(given[0])

    def _check(self, name: str) -> None:
        value, param = getattr(self, name), f"structured_outputs.{name}"
        length = 0
        if name == "json_object":
            _check(value is True, param, "must be true")
        elif name == "choice":
            ok = isinstance(value, tuple) and value and all(isinstance(v, str) for v in value)
            _check(bool(ok), param, "must hold strings, at least one")
            _check(all(value), param, "must hold no empty string")
            length = sum(map(len, value))
        else:
            _check(isinstance(value, str) and bool(value), param, "must be a text that isn't empty")
            length = len(value)
        _check(
            length <= MAX_GRAMMAR_LENGTH, param, f"has at most {MAX_GRAMMAR_LENGTH:,} characters"
        )

    @property
    def kind(self) -> str:
        """Which of the fields is given."""
        return next(name for name in _STRUCTURES if getattr(self, name) is not None)


_STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling options of one request, checked when made.

    Raises:
        RequestError: a value is out of range or of the wrong type; `param` names it.
    """

    n: int = 1  # completions per prompt
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the likeliest token's probability
    seed: int | None = None  # completion i of n uses seed + i
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int | None = 16  # None: up to the model's length
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report; 0 reports the chosen token only
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        set_field = object.__setattr__  # frozen: normalising is part of construction
        set_field(self, "stop", tuple(stop or ()))
        set_field(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        set_field(self, "logit_bias", dict(self.logit_bias or {}))
        self._check()

    def _check(self) -> None:
        _check(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", f"must be from 1 to {MAX_N}")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.0, 100.0),
        ):
            value = getattr(self, name)
            ok = _is_number(value) and low <= value <= high
            _check(ok, name, f"must be a number from {low:g} to {high:g}")
        _check(self.top_p > 0, "top_p", "must be greater than 0")
        _check(self.repetition_penalty > 0, "repetition_penalty", "must be greater than 0")
        ok = _is_int(self.top_k) and -1 <= self.top_k < 2**63
        _check(ok, "top_k", "must be -1, 0 (both: all tokens) or a positive integer")
        ok = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**63 - MAX_N)
        _check(ok, "seed", "must be a 64-bit integer")
        ok = self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1)
        _check(ok, "max_tokens", "must be at least 1")
        _check(
            _is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", "must be at least 0"
        )
        ok = self.max_tokens is None or self.min_tokens <= self.max_tokens
        _check(ok, "min_tokens", "must not be greater than max_tokens")
        ok = self.logprobs is None or (
            _is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS
        )
        _check(ok, "logprobs", f"must be from 0 to {MAX_LOGPROBS}")
        _check(
            len(self.stop) <= MAX_STOP_STRINGS, "stop", f"takes at most {MAX_STOP_STRINGS} strings"
        )
        ok = all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in self.stop)
        _check(ok, "stop", f"must hold strings of 1 to {MAX_STOP_LENGTH} characters")
        ok = all(_is_int(t) and t >= 0 for t in self.stop_token_ids)
        _check(ok, "stop_token_ids", "must hold token ids")
        ok = all(
            _is_int(t) and t >= 0 and _is_number(b) and -100 <= b <= 100
            for t, b in self.logit_bias.items()
        )
        _check(ok, "logit_bias", "must map token ids to numbers from -100 to 100")
        self._check_structure()

    def _check_structure(self) -> None:
        structure = self.structured_outputs
        ok = structure is None or isinstance(structure, StructuredOutputsParams)
        _check(ok, "structured_outputs", "must be a StructuredOutputsParams")
        if structure is not None:  # its end is where the structure ends, and nowhere else
            _check(not self.ignore_eos, "ignore_eos", "can't be combined with structured output")
            _check(not self.min_tokens, "min_tokens", "can't be combined with structured output")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without drawing."""
        return self.temperature < 1e-5
