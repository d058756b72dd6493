"""How the engine was asked to run (`EngineConfig`) and what a model is (`ModelContext`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mm_engine.errors import StartupError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

#: `max_decode_slowdown` of `engine serve`, unless its flag says otherwise.
SERVED_DECODE_SLOWDOWN = 1.75
SERVED_OUTPUT_INTERVAL = 0.02  # seconds; likewise
MAX_PROMPT_LOOKUP = 32  # tokens; every length is looked up, and kept, for every token
QUANTIZATIONS = ("fp8", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")  # the last two are one, as in vLLM
DEFAULT_LIMITS: Mapping[str, int] = {"image": 8}
MIN_QUEUED_REQUESTS = 16  # see `default_queued_requests`
MAX_OUTPUT_INTERVAL = 1.0  # seconds; with longer ones answers would seem to stand still
#: The attention backends by name; auto takes the first of the rest that can serve.
ATTENTION_BACKENDS = ("auto", "flash-attn", "triton", "varlen", "cpu", "torch")
#: vLLM's names for them, in lower case with hyphens.
_BACKENDS_OF_VLLM = {"triton-attn": "triton", "cpu-attn": "cpu", "torch-sdpa": "torch"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The engine's options; `LLM(...)` takes them as keywords and `engine serve` as flags.

    Sizes are in tokens or bytes as named. None means: found at startup.
    """

    model: str  # a checkpoint's folder, a Hub id, or the name of a bundled demo
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda
    #: The text backbone's weights are quantised at load: fp8 (activations, too), int8 or int4.
    quantization: str | None = None
    #: A folder that keeps a CPU's quantised weights for the next start; None: they aren't kept.
    packed_cache: str | None = None
    kv_cache_dtype: str = "auto"  # auto: the dtype of the weights; fp8: half of what 16 bits take
    max_model_len: int | None = None  # prompt and output together, tokens
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int = 2048  # tokens in one step, prefill chunks and decodes together
    #: How many times as long a step may take for the prompts and images that it holds beside
    #: decodes. `inf`: as long as max_num_batched_tokens make it.
    max_decode_slowdown: float = math.inf
    #: Tokens in one block of the KV cache; rounded up to a multiple of what the attention backend
    #: takes (flash-attn: 256).
    block_size: int = 16
    kv_cache_memory: int | None = None  # bytes; None: what is left after the profile run
    enable_prefix_caching: bool = True  # prompts that begin alike are computed once
    #: Bytes of features of images that are kept; None: 128 MiB, and no less than a step needs.
    encoder_cache_memory: int | None = None
    #: Bytes of mapped images that are kept, in the front and in the engine process each; 0: none.
    mm_processor_cache_memory: int = 256 * 2**20
    #: Prepare each step while the device computes the one before it. None: on a CUDA device, unless
    #: there is speculative decoding, whose guesses wait for the tokens before them.
    async_scheduling: bool | None = None
    enforce_eager: bool = False  # no graphs: each step's kernels are launched one by one
    memory_utilization: float = 0.9  # of the device's memory; on a CPU, of what is available
    #: Speculative decoding by n-gram lookup: the most tokens that a step guesses of one answer; 0:
    #: off. The newest `prompt_lookup_max` tokens are looked up in what came before, then fewer,
    #: down to `prompt_lookup_min`.
    num_speculative_tokens: int = 0
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    seed: int = 0
    load_format: str = "auto"  # auto (safetensors) or dummy (random weights)
    attention_backend: str = "auto"  # or one of `ATTENTION_BACKENDS`, also as vLLM writes them
    tensor_parallel_size: int = 1  # processes, each with a device, that share one model's weights
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_LIMITS))
    plugins: tuple[str, ...] = ()  # `--plugin`: `Architecture=distribution`, or a path to one file
    hook_timeout: float = 30.0  # seconds that one call of a plugin's hook or mapper may take
    #: Seconds between two tellings of what is new of an answer, from its first token on to its end:
    #: tokens that come sooner are told together. 0: each step tells of its own.
    output_interval: float = 0.0
    step_timeout: float = 300.0  # seconds that a step may take before the process counts as stuck
    progress: bool = True  # progress bars on stderr

    def __post_init__(self) -> None:
        """Refuse what no engine could run with.

        Raises:
            StartupError: naming the option and its value.
        """
        _check_choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        folder = self.packed_cache
        ok = folder is None or (isinstance(folder, str) and folder != "")
        _check(ok, "packed_cache", folder, "a folder's name")
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "tensor_parallel_size",
        ):
            value = getattr(self, name)
            _check(type(value) is int and value >= 1, name, value, "a positive integer")
        for name in ("kv_cache_memory", "encoder_cache_memory"):
            value = getattr(self, name)
            ok = value is None or (type(value) is int and value >= 1)
            _check(ok, name, value, "a positive integer")
        for name, least, most in (
            ("num_speculative_tokens", 0, None),
            ("prompt_lookup_max", 1, MAX_PROMPT_LOOKUP),
            ("prompt_lookup_min", 1, self.prompt_lookup_max),
        ):
            value = getattr(self, name)
            ok = type(value) is int and value >= least and (most is None or value <= most)
            above = "of at least 0" if most is None else f"from {least} to {most}"
            _check(ok, name, value, f"an integer {above}")
        ahead = self.async_scheduling
        _check(ahead is None or type(ahead) is bool, "async_scheduling", ahead, "True or False")
        eager = self.enforce_eager
        _check(type(eager) is bool, "enforce_eager", eager, "True or False")
        if ahead and self.num_speculative_tokens:
            raise StartupError(
                "async_scheduling and speculative decoding don't go together: a guess waits for "
                "the tokens before it. Leave one of them out."
            )
        kept = self.mm_processor_cache_memory
        ok = type(kept) is int and kept >= 0
        _check(ok, "mm_processor_cache_memory", kept, "an integer of at least 0")
        ok = isinstance(self.step_timeout, int | float) and self.step_timeout > 0
        _check(ok, "step_timeout", self.step_timeout, "a number of seconds above 0")
        interval = self.output_interval
        ok = isinstance(interval, int | float) and 0 <= interval <= MAX_OUTPUT_INTERVAL
        at_most = f"a number of seconds from 0 to {MAX_OUTPUT_INTERVAL:g}"
        _check(ok, "output_interval", interval, at_most)
        slowdown = self.max_decode_slowdown
        ok = isinstance(slowdown, int | float) and slowdown > 1
        _check(ok, "max_decode_slowdown", slowdown, "a number above 1, or inf for no limit")
        share = self.memory_utilization
        ok = isinstance(share, int | float) and 0 < share <= 1
        _check(ok, "memory_utilization", share, "a number above 0 and up to 1")
        for modality, limit in self.limit_mm_per_prompt.items():
            ok = type(limit) is int and limit >= 0
            _check(ok, f"limit_mm_per_prompt of {modality}", limit, "an integer of at least 0")
        backend_name(self.attention_backend)


def default_queued_requests(max_num_seqs: int) -> int:
    """How many prompts may be in flight by default: as many as the engine runs at once.

    Then whoever is taken in finds a seat there, however many come, but for a few on an engine that
    runs hardly any: a page or an editor may well send several requests at once.
    """
    return max(MIN_QUEUED_REQUESTS, max_num_seqs)


def backend_name(text: str) -> str:
    """One of `ATTENTION_BACKENDS`, in any case, with hyphens or underscores, or vLLM's name for it.

    Raises:
        StartupError: it isn't one.
    """
    name = str(text).lower().replace("_", "-")
    name = _BACKENDS_OF_VLLM.get(name, name)
    if name not in ATTENTION_BACKENDS:
        raise StartupError(
            f"attention backend is not known: {text}. "
            f"Use {', '.join(ATTENTION_BACKENDS[:-1])} or {ATTENTION_BACKENDS[-1]}."
        )
    return name


def speculation_options(
    speculative_config: object, *, beside: Iterable[str] = ()
) -> dict[str, Any]:
    """Fields of `EngineConfig` for a `speculative_config` in vLLM's shape.

    As in vLLM, one of `prompt_lookup_max` and `prompt_lookup_min` alone stands for both. `beside`
    names the fields that are given by themselves.

    Raises:
        StartupError: a key or a method that isn't known, or one that is missing; no tokens to
            guess; a field of speculation that is given by itself as well.
    """
    keys = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
    if not isinstance(speculative_config, Mapping):
        raise StartupError(
            f"speculative_config can't be read: {speculative_config!r}. "
            'Write {"method": "ngram", "num_speculative_tokens": 5}.'
        )
    for key in speculative_config:
        if key not in keys:
            raise StartupError(
                f"speculative_config has a key that isn't known: {key!r}. Use {', '.join(keys)}."
            )
    method, number = (speculative_config.get(key) for key in keys[:2])
    if method != "ngram":
        raise StartupError(f"speculative_config's method isn't known: {method!r}. Use 'ngram'.")
    if number is None:
        raise StartupError(
            "speculative_config has no num_speculative_tokens. Say how many a step may guess."
        )
    if type(number) is not int or number < 1:
        raise StartupError(
            f"speculative_config's num_speculative_tokens is out of range: {number!r}. Give a "
            "positive integer; to guess none, leave speculative_config out."
        )
    for name in beside:
        if name in keys:
            raise StartupError(
                f"two places say how to speculate: speculative_config and {name}. "
                "Put all of it into speculative_config."
            )
    given = {key: speculative_config[key] for key in keys[2:] if key in speculative_config}
    if len(given) == 1:
        given = dict.fromkeys(keys[2:], *given.values())
    return {"num_speculative_tokens": number, **given}


def _check_choice(name: str, value: object, known: tuple[str | None, ...]) -> None:
    if value not in known:
        names = ", ".join("None" if choice is None else choice for choice in known)
        raise StartupError(f"{name} is not known: {value!r}. Use one of {names}.")


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise StartupError(f"{name} is out of range: {value!r}. Give {wanted}.")


class Group(Protocol):
    """What the processes that hold parts of one model do together; each calls the same."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the processes' `x`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """`[size, *x.shape]`: every process's `x`, by rank."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows (or columns) from `start` on, `length` of them, of a weight that has `whole`.

    The last processes' pieces may reach past the whole; what lies there is nobody's.
    """

    start: int
    length: int
    whole: int
    shard: Shard

    @property
    def num_real(self) -> int:
        """How many of `length` lie inside the whole."""
        return max(0, min(self.length, self.whole - self.start))


class Shard:
    """Which part of a model this process holds: the one of `rank` among `size` equal ones."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        assert 0 <= rank < size
        self.rank, self.size = rank, size
        self._group: Group | None = None  # joined when all processes are there

    def __repr__(self) -> str:
        return f"Shard({self.rank}, {self.size})"

    def join(self, group: Group) -> None:
        """Compute with the processes of `group` from now on."""
        self._group = group

    @property
    def group(self) -> Group:
        """The processes that hold the parts; more than one."""
        assert self._group is not None, "a shard has joined its group before it computes"
        return self._group

    def piece(self, num: int, unit: int, what: str, *, shared: bool = False) -> Piece:
        """This process's part of `num` things, such as heads, of `unit` rows each.

        With `shared`, several processes may hold the same one where there are fewer than processes.

        Raises:
            StartupError: they can't be shared out evenly; the message names `what`.
        """
        if num % self.size == 0:
            length = num // self.size
            return Piece(self.rank * length * unit, length * unit, num * unit, self)
        if shared and self.size % num == 0:
            return Piece(self.rank * num // self.size * unit, unit, num * unit, self)
        fitting = [n for n in range(1, num + 1) if num % n == 0 and n <= self.size]
        raise StartupError(
            f"{num} {what} can't be shared out to {self.size} processes. "
            f"Use --tensor-parallel-size {max(fitting)}."
        )

    def padded_piece(self, num: int) -> Piece:
        """This process's part of `num` rows that needn't be a multiple of `size`."""
        length = -(-num // self.size)
        return Piece(self.rank * length, length, num, self)


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a plugin is told about the model that it serves; the first argument of every hook.

    Frozen, and the same object for all calls in one process.
    """

    hf_config: PretrainedConfig  # config.json, as transformers' AutoConfig reads it
    checkpoint: Path  # the folder of config.json, weights, tokenizer and image processor
    tokenizer: PreTrainedTokenizerFast
    dtype: torch.dtype  # of the weights and embeddings; of the KV cache unless it is in fp8
    max_model_len: int  # the most tokens of prompt and answer together
    limits: Mapping[str, int]  # items per prompt, by modality: {"image": 8}
    architecture: str  # the one in config.json, by which the plugin was found
    shard: Shard = field(default_factory=Shard)  # which part of the weights this process holds

    @property
    def text_config(self) -> Any:
        """The text backbone's part of the config (the whole one if it isn't nested)."""
        return self.hf_config.get_text_config()
