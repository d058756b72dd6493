"""Structured output: what a grammar allows as the next token, by xgrammar.

A grammar is compiled once, apart from the engine (it may take long, and its source is anyone's),
and travels with its request as bytes. Here it says before each token which ids may come.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mm_engine.errors import RequestError
from mm_engine.sampling_params import StructuredOutputsParams
from mm_engine.worker.json_schema import check_regex, check_schema
from mm_engine.worker.transfers import move, to_device

if TYPE_CHECKING:
    from mm_engine.worker.loader import OpenedModel

PARAM = "structured_outputs"
MAX_COMPILED = 8 * 2**20  # bytes of one compiled grammar
MAX_KEPT = 64  # compiled grammars that an engine keeps for requests to come
#: Processor time that following a grammar may take: at its start, and more for each token. Some
#: grammars are so ambiguous that each token takes longer than the one before it.
START_SECONDS, TOKEN_SECONDS = 0.5, 0.005
_PLACE = re.compile(r"^\[[0-9:]+\] \S+: ")  # of the library's source
_MAX_TOLD = 200  # characters of what the library says


def load_xgrammar() -> Any:
    """The library.

    Raises:
        RequestError: it isn't installed, and the request needs it.
    """
    try:
        return importlib.import_module("xgrammar")
    except ImportError:
        raise RequestError(
            "structured output isn't available here: xgrammar can't be imported. "
            "Install it where the engine runs.",
            param=PARAM,
        ) from None


class Grammars:
    """Grammars over one model's vocabulary. Nothing is imported before the first one."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._info: Any = None
        self._printing: Tensor | None = None
        self._kept: OrderedDict[bytes, Any] = OrderedDict()  # by the digest of their bytes
        self._compiled: OrderedDict[StructuredOutputsParams, bytes] = OrderedDict()

    @classmethod
    def of(cls, opened: OpenedModel) -> Grammars:
        """Those over a model's vocabulary."""
        size = int(opened.ctx.text_config.vocab_size)
        return cls(opened.ctx.tokenizer, size, opened.eos_token_ids)

    @property
    def vocabulary(self) -> Any:
        """xgrammar's `TokenizerInfo`.

        Raises:
            RequestError: there is no xgrammar.
        """
        if self._info is None:
            xgrammar = load_xgrammar()
            self._info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._eos_token_ids
            )
        return self._info

    def compile(self, structure: StructuredOutputsParams) -> bytes:
        """What `follow` takes. May take long; a server has it done by a process of its own.

        Raises:
            RequestError: it can't be compiled, and why; or there is no xgrammar.
        """
        grammar = self._compiled.get(structure)
        if grammar is None:
            grammar = compile_grammar(self.vocabulary, structure)
        _keep(self._compiled, structure, grammar)
        return grammar

    @property
    def printing(self) -> Tensor:
        """The bits of all ids without a control character: `[1, ceil(vocab / 32)]` int32."""
        if self._printing is None:
            mask = torch.zeros(1, -(-self._vocab_size // 32) * 32, dtype=torch.bool)
            for token_id, text in enumerate(self.vocabulary.decoded_vocab):
                mask[0, token_id] = not text or min(text) >= 0x20
            words = mask.view(1, -1, 32).to(torch.int64) << torch.arange(32)
            self._printing = words.sum(-1).to(torch.int32)
        return self._printing

    def follow(
        self, grammar: bytes, num_answers: int = 1, *, on_one_line: bool = False
    ) -> GrammarState:
        """The state of a new answer (one of so many of its request) that keeps to `grammar`.

        `on_one_line`, as JSON is written here, it has no control character either: of strings that
        have a length xgrammar lets some through.
        """
        digest = hashlib.sha256(grammar).digest()
        compiled = self._kept.get(digest)
        if compiled is None:
            xgrammar = load_xgrammar()
            compiled = xgrammar.CompiledGrammar.deserialize_json(grammar.decode(), self.vocabulary)
        _keep(self._kept, digest, compiled)
        within = self.printing if on_one_line else None
        return GrammarState(compiled, self._vocab_size, 1 / num_answers, within)


def _keep(cache: OrderedDict[Any, Any], key: object, value: object) -> None:
    """Put it last into what is kept; the first goes if those are too many."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > MAX_KEPT:
        cache.popitem(last=False)


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(
        self, compiled: Any, vocab_size: int, share: float = 1.0, within: Tensor | None = None
    ) -> None:
        """`share` is this answer's of the time that those of its request may take; of the ids that
        the grammar allows, those that aren't `within` these bits are left out."""
        xgrammar = load_xgrammar()
        self._share = share
        self._within = within
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._num_tokens = 0
        self._seconds = 0.0

    def allowed(self, token_ids: Sequence[int]) -> Tensor:
        """Which ids may follow `token_ids`, all of the answer so far: `[1, ceil(vocab / 32)]`
        int32 on the CPU, a bit for each.

        Each call's ids begin with those of the call before.

        Raises:
            RequestError: none may, or the grammar takes too long to follow.
        """
        start = time.thread_time()
        for token_id in token_ids[self._num_tokens :]:
            if not self._matcher.accept_token(token_id):
                raise RequestError(
                    "the answer has left its grammar: a token doesn't fit. Simplify the grammar.",
                    param=PARAM,
                )
        self._num_tokens = len(token_ids)
        if self._matcher.is_terminated():  # what follows its end is thrown away
            return self._bits.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._bits)
        if self._within is not None:
            self._bits &= self._within
        self._seconds += time.thread_time() - start
        if not self._bits.any():
            raise RequestError(
                "the grammar allows no token of this model here. Change it.", param=PARAM
            )
        if self._seconds > self._share * (START_SECONDS + TOKEN_SECONDS * self._num_tokens):
            raise RequestError(
                "the grammar takes too long to follow: it is too ambiguous. Simplify it.",
                param=PARAM,
            )
        return self._bits


def forbid(logits: Tensor, allowed: Mapping[int, Tensor]) -> None:
    """Set all logits `[N, vocab]` of the rows in `allowed` to -inf, in place, but for those whose
    bits are set: `[1, ceil(vocab / 32)]` int32 on the CPU for each row. All rows at once."""
    rows = list(allowed)
    picked = to_device(rows, logits.device)
    bits = torch.cat([allowed[row] for row in rows])
    width = min(32 * bits.shape[1], logits.shape[1])
    if logits.device.type == "cpu" and logits.shape[1] > 1:  # xgrammar takes a column for a row
        mask = bits.new_full((logits.shape[0], bits.shape[1]), -1)
        mask[rows] = bits
        apply = load_xgrammar().apply_token_bitmask_inplace
        apply(logits, mask, vocab_size=width, indices=rows)
    else:
        forbid_on_device(logits[:, :width], picked, bits)
    if width < logits.shape[1]:  # ids that the tokenizer hasn't got
        logits[:, width:].index_fill_(0, picked, float("-inf"))


def forbid_on_device(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """The same for logits on any device, where `rows` are, with PyTorch alone."""
    bits = move(bits, logits.device)
    shifts = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = ((bits[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


def compile_grammar(vocabulary: Any, structure: StructuredOutputsParams) -> bytes:
    """Compile for xgrammar's `TokenizerInfo`.

    Raises:
        RequestError: it can't be compiled, or is too large.
    """
    xgrammar = load_xgrammar()
    if structure.kind == "json":
        assert isinstance(structure.json, str)
        check_schema(structure.json)
    if structure.regex is not None:
        check_regex(structure.regex)
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
    try:
        compiled = _compile(xgrammar, compiler, structure)
        state = GrammarState(compiled, vocabulary.vocab_size)
        size = compiled.memory_size_bytes
    except (RuntimeError, ValueError, TypeError) as error:
        raise _refusal(structure, _told(error)) from None
    state.allowed(())  # or nothing may come at all
    if size > MAX_COMPILED:
        raise _refusal(structure, "it is too large")
    serialized = compiled.serialize_json().encode()
    if len(serialized) > MAX_COMPILED:
        raise _refusal(structure, "it is too large")
    return bytes(serialized)


def _compile(xgrammar: Any, compiler: Any, structure: StructuredOutputsParams) -> Any:
    if structure.json is not None or structure.json_object:
        # On one line, as json.dumps writes it: where any whitespace may come, weak models write
        # nothing else.
        schema = structure.json or '{"type": "object"}'
        return compiler.compile_json_schema(schema, any_whitespace=False)
    if structure.regex is not None:
        return compiler.compile_regex(structure.regex)
    if structure.choice is not None:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in structure.choice)
        return compiler.compile_grammar(f"root ::= {choices}")
    if structure.grammar is not None:
        return compiler.compile_grammar(structure.grammar)
    assert structure.structural_tag is not None
    tag = json.loads(structure.structural_tag)
    return compiler.compile_structural_tag(json.dumps(_on_one_line(xgrammar, tag)))


def _on_one_line(xgrammar: Any, part: Any) -> Any:
    """A structural tag whose JSON is written as above: it has no word for that itself."""
    if isinstance(part, list):
        return [_on_one_line(xgrammar, member) for member in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "json_schema":
        schema = json.dumps(part.get("json_schema"))
        check_schema(schema)
        if not part.keys() <= {"type", "json_schema"}:
            return part
        grammar = xgrammar.Grammar.from_json_schema(schema, any_whitespace=False)
        return {"type": "grammar", "grammar": str(grammar)}
    return {
        key: value if key == "json_schema" else _on_one_line(xgrammar, value)
        for key, value in part.items()
    }


def _told(error: Exception) -> str:
    """What the library says, without its place and on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = "".join(c if c.isprintable() else "?" for c in _PLACE.sub("", lines[0]))
    return text[:_MAX_TOLD].rstrip(" .:")


def _refusal(structure: StructuredOutputsParams, why: str) -> RequestError:
    what = {"json": "JSON schema", "structural_tag": "structural tag"}.get(
        structure.kind, structure.kind
    )
    return RequestError(f"the {what} can't be compiled: {why}. Change it.", param=PARAM)
