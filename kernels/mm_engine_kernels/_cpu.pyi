# The compiled module: see kernels/cpp/module.cpp. Tensors come as addresses, dtypes as numbers.

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> bool: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def num_asleep() -> int: ...
def packed_size(n: int, k: int, dtype: int) -> int: ...
def pack(weight: int, stride: int, n: int, k: int, dtype: int, out: int) -> None: ...
def unpack_rows(
    packed: int, n: int, k: int, dtype: int, rows: int, count: int, out: int
) -> None: ...
def linear(
    x: int,
    packed: int,
    bias: int,
    residual: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    x_stride: int,
    out_stride: int,
    dtype: int,
) -> None: ...
def rms_norm(
    x: int,
    residual: int,
    weight: int,
    out: int,
    total: int,
    rows: int,
    size: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    dtype: int,
) -> None: ...
def silu_mul(x: int, out: int, rows: int, size: int, stride: int, dtype: int) -> None: ...
def rotary(
    x: int,
    cos: int,
    sin: int,
    out: int,
    tokens: int,
    heads: int,
    half: int,
    token_stride: int,
    head_stride: int,
    cos_stride: int,
    sin_stride: int,
    dtype: int,
) -> None: ...
def scatter(
    rows: int,
    out: int,
    places: int,
    num: int,
    size: int,
    stride: int,
    block_size: int,
    block_stride: int,
    lowest: int,  # place that is allowed: -1 where padding is
    num_places: int,
    dtype: int,
    out_dtype: int,
) -> None: ...
def gather(
    table: int,
    rows: int,
    out: int,
    num: int,
    size: int,
    stride: int,
    num_rows: int,
    dtype: int,
    out_dtype: int,
) -> None: ...
def largest(
    x: int, values: int, places: int, num: int, size: int, stride: int, dtype: int
) -> None: ...
def copy(source: int, target: int, num_bytes: int) -> None: ...

class Recording:
    """Calls of the functions above that this thread made between `start` and `stop`."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...
    def __len__(self) -> int: ...

def sample(
    logits: int,
    uniform: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    sampled: int,
    kept: int,
    num: int,
    size: int,
    stride: int,
) -> None: ...
def attention(
    query: int,
    query_row: int,
    query_head: int,
    keys: tuple[int, int, int, int],
    values: tuple[int, int, int, int],
    tables: int,
    table_stride: int,
    wide_table: bool,
    block_size: int,
    query_starts: int,
    contexts: int,
    out: int,
    num_sequences: int,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int,
    scale: float,
    softcap: float,
    causal: bool,
    dtype: int,
    work: int,
) -> None: ...
def quantize_linear(
    weight: int, out: int, scales: int, n: int, k: int, stride: int, dtype: int, bits: int
) -> None: ...
def linear_quantized(
    x: int,
    weight: int,
    scales: int,
    bias: int,
    out: int,
    rows: int,
    n: int,
    k: int,
    x_stride: int,
    dtype: int,
    bits: int,
) -> None: ...
