"""The native decoder: pre-norm blocks of rotary GQA attention and a gated MLP, by config.

`decoder_features.json` lists the config types that it covers, with what their config doesn't say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib import resources
from typing import Any, ClassVar

from mm_engine_kernels import ops
from torch import Tensor, nn
from torch.nn.functional import pad

from mm_engine.attention.backend import Attention
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.config import ModelContext, Piece, Shard
from mm_engine.errors import StartupError
from mm_engine.models.layers import Linear, RMSNorm, RotaryTable
from mm_engine.models.packed_weights import PackedEmbedding, pack_embedding
from mm_engine.models.transformers_decoder import TransformersDecoder

logger = logging.getLogger(__name__)


class DecoderAttention(nn.Module):
    """Fused projections, rotary positions, paged attention."""

    def __init__(
        self, config: Any, shard: Shard, *, qkv_bias: bool, out_bias: bool, window: int | None
    ) -> None:
        super().__init__()
        dim = self.head_dim = head_size(config)
        heads = shard.piece(config.num_attention_heads, dim, "attention heads")
        # Fewer than processes: several hold the same one.
        kv_heads = shard.piece(config.num_key_value_heads, dim, "key/value heads", shared=True)
        self.num_heads, self.num_kv_heads = heads.length // dim, kv_heads.length // dim
        self.qkv_proj = Linear(
            config.hidden_size,
            {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads},
            bias=qkv_bias,
        )
        self.o_proj = Linear(heads, config.hidden_size, bias=out_bias)
        self.attention = Attention(self.num_heads, self.num_kv_heads, dim, sliding_window=window)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], metadata: AttentionMetadata
    ) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        rotated = ops.rotary(heads[:, : self.num_heads + self.num_kv_heads], *rotary)
        query, key = rotated.split((self.num_heads, self.num_kv_heads), dim=1)
        value = heads[:, self.num_heads + self.num_kv_heads :]
        out: Tensor = self.o_proj(self.attention(query, key, value, metadata).flatten(1))
        return out


class DecoderMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up fused."""

    def __init__(self, config: Any, shard: Shard, *, bias: bool) -> None:
        super().__init__()
        size = shard.piece(config.intermediate_size, 1, "rows of the MLP")
        self.gate_up_proj = Linear(
            config.hidden_size, {"gate_proj": size, "up_proj": size}, bias=bias
        )
        self.down_proj = Linear(size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        out: Tensor = self.down_proj(ops.silu_mul(self.gate_up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    """One block; the residual stream is handed on beside its norm's input, to fuse the addition."""

    def __init__(
        self, config: Any, shard: Shard, *, qkv_bias: bool, out_bias: bool, window: int | None
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(
            config, shard, qkv_bias=qkv_bias, out_bias=out_bias, window=window
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config, shard, bias=getattr(config, "mlp_bias", False))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        metadata: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Returns the block's addition to the residual stream, and the stream without it."""
        if residual is None:
            normed, residual = self.input_layernorm(x), x
        else:
            normed, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(normed, rotary, metadata)
        normed, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(normed), residual


class Decoder(nn.Module):
    """A text backbone over the paged cache. Names of parameters are the Hub's.

    Raises:
        StartupError: the config's activation isn't `silu`.
    """

    activation: ClassVar[str] = "silu"

    def __init__(self, config: Any, ctx: ModelContext, features: dict[str, Any]) -> None:
        super().__init__()
        if config.hidden_act != self.activation:
            raise StartupError(
                f"activation of the text backbone is not supported: {config.hidden_act}. "
                f"The native decoder computes {self.activation}."
            )
        attention_bias = bool(getattr(config, "attention_bias", False))
        qkv_bias = attention_bias or bool(features.get("qkv_bias", False))
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                ctx.shard,
                qkv_bias=qkv_bias,
                out_bias=attention_bias,
                window=layer_window(config, i) if features.get("sliding_window") else None,
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings or ctx.hf_config.tie_word_embeddings
        self.vocab = ctx.shard.padded_piece(config.vocab_size)
        self.lm_head = None if tied else Linear(config.hidden_size, self.vocab)
        self.rotary = RotaryTable(config, head_size(config), ctx.max_model_len)

    #: Checkpoint names that differ from the attributes here (`embed_tokens` is a method).
    weight_aliases: ClassVar[dict[str, str]] = {"embed_tokens": "embedding"}

    def untie(self) -> Linear:
        """Make a head, uninitialised: the checkpoint brings one, whatever its config says."""
        like = self.embedding.weight
        self.lm_head = Linear(like.shape[1], self.vocab).to(like.device, like.dtype)
        return self.lm_head

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """`[T]` ids to `[T, hidden]`."""
        embeddings: Tensor = self.embedding(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attn_metadata: AttentionMetadata,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Run one step: `[T]` ids (or `[T, hidden]` embeddings) to normed hidden states."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = self.rotary(positions, x.dtype)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, rotary, attn_metadata)
        assert residual is not None
        return self.norm.add(x, residual)[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """`[N, hidden]` to `[N, vocab]`."""
        head: Callable[[Tensor], Tensor] | None = self.lm_head
        if head is None and isinstance(self.embedding, PackedEmbedding):
            head = self.embedding.logits
        return gathered_logits(self.vocab, hidden, self.embedding, head)

    def pack_head(self) -> None:
        """Lay out embeddings that are the head as well for the device that they are on."""
        if self.lm_head is None and self.vocab.shard.size == 1:  # else each takes a piece of them
            pack_embedding(self.embedding)


def gathered_logits(
    vocab: Piece,
    hidden: Tensor,
    embedding: nn.Embedding,
    head: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Logits `[N, vocab]` of `hidden` `[N, hidden]`, of which each process computes its piece.

    Without a `head`, which holds this process's piece, they are by the `embedding`, whose weight
    `[vocab, hidden]` each process has whole.
    """
    end = vocab.start + vocab.num_real
    if head is not None:
        logits = head(hidden)
    else:
        logits = ops.linear(hidden, embedding.weight[vocab.start : end])
    if vocab.shard.size == 1:
        return logits
    if logits.shape[1] < vocab.length:
        logits = pad(logits, (0, vocab.length - logits.shape[1]))
    gathered = vocab.shard.group.all_gather(logits)  # [size, N, length]
    return gathered.transpose(0, 1).flatten(1)[:, : vocab.whole]


def head_size(config: Any) -> int:
    """Size of one attention head; configs may leave it to follow from the others."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_window(config: Any, layer: int) -> int | None:
    """Sliding window of one layer in tokens; None attends to everything before."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return None
    return window


def build_decoder(config: Any, ctx: ModelContext) -> Decoder | TransformersDecoder:
    """The text backbone that `config` (a `text_config`) describes, weights still to be loaded.

    The native decoder where it covers the config, else transformers' own modules over our cache.

    Raises:
        StartupError: neither can serve it.
    """
    features = native_features(config)
    if features is not None:
        return Decoder(config, ctx, features)
    logger.info("Text backbone %s runs through transformers' modules.", config.model_type)
    return TransformersDecoder(config, ctx)


def native_features(config: Any) -> dict[str, Any] | None:
    """What the native decoder must know of this type of config; None if it doesn't cover it."""
    table = json.loads(resources.files(__package__).joinpath("decoder_features.json").read_text())
    features: dict[str, Any] | None = table.get(config.model_type)
    if features is None or config.hidden_act != Decoder.activation:
        return None
    kind = config.rope_parameters.get("rope_type", "default")
    return features if kind in RotaryTable.kinds else None
