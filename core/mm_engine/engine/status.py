"""What the engine says of itself: once at startup (`EngineInfo`), at any time (`EngineStats`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """What takes the memory of the device, or of the first of several: bytes."""

    weights: int = 0
    peak: int = 0  # of a step, beside weights and KV cache
    outside: int = 0  # taken by libraries beside PyTorch; 0 on a CPU, as are
    graphs: int = 0  # CUDA graphs
    kv_cache: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded and what it can hold."""

    num_blocks: int
    block_size: int  # tokens
    kv_cache_tokens: int
    max_model_len: int  # tokens, prompt and output together
    dtype: str
    device: str
    plugin: str  # name and version of its distribution
    architecture: str
    num_parameters: int
    load_seconds: float
    profile_seconds: float = 0.0  # the dummy data's run, and the KV cache's allocation
    memory: MemoryInfo = MemoryInfo()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    num_running: int  # sequences
    num_waiting: int  # sequences
    num_used_blocks: int
    num_blocks: int
    num_kept_blocks: int  # hold what can be found by its key, in use or not
    num_prefix_queries: int  # tokens of sequences when they were admitted
    num_prefix_hits: int  # of these, tokens whose keys and values were there already
    encoder_rows: int  # rows of features kept
    max_encoder_rows: int
    num_encoder_hits: int  # items whose features were there already
    num_encodes: int
    num_preemptions: int
    num_prompt_tokens: int  # of prompts computed
    num_generation_tokens: int
    num_steps: int
    num_drafts: int  # of speculative decoding
    num_draft_tokens: int
    num_accepted_tokens: int  # of these, tokens that the answers really went on with
