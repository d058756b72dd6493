"""Sharing out a backbone of transformers to several processes, by transformers' own plan for it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mm_engine.config import Piece, Shard
from mm_engine.models.transformers_attention import LAYER, PagedAttention
from mm_engine.models.transformers_parts import CalledLinear

#: Styles of a plan that leave a module whole, and what comes in and goes out of it too.
WHOLE = ("replicated_with_grad_allreduce", "replicated")


def share_out(backbone: nn.Module, plan: Mapping[str, str] | None, shard: Shard) -> int:
    """Give each process its pieces of the linear layers that the plan shares out; how many.

    A plan names modules by pattern and how each is cut: `colwise` ones by their outputs, then
    `rowwise` ones by their inputs, whose results are summed. The modules of one block (attention,
    or MLP) are cut together or not at all: where the plan asks for more than these two, as for
    experts and fused projections, each process holds and computes the whole block.

    Raises:
        StartupError: heads or rows can't be shared out evenly.
    """
    blocks: dict[str, dict[str, str]] = defaultdict(dict)
    for pattern, style in (plan or {}).items():
        block, _, name = pattern.rpartition(".")
        blocks[block][name] = style
    num_cut = 0
    for block, styles in blocks.items():
        cut = {name: style for name, style in styles.items() if style not in WHOLE}
        if set(cut.values()) != {"colwise", "rowwise"}:
            continue
        places = re.compile(re.escape(block).replace(r"\*", r"[^.]+"))
        for path, module in list(backbone.named_modules()):
            if places.fullmatch(path):
                num_cut += _cut_block(module, cut, shard)
    return num_cut


def _cut_block(block: nn.Module, styles: Mapping[str, str], shard: Shard) -> int:
    parts: dict[str, CalledLinear] = {}
    for name in styles:
        part = getattr(block, name, None)
        if not isinstance(part, CalledLinear):
            return 0
        parts[name] = part
    layer = getattr(block, LAYER, None)
    pieces: dict[str, Piece] = {}
    for name, part in parts.items():
        size = part.out_features if styles[name] == "colwise" else part.in_features
        piece = _piece(size, layer, shard)
        if piece is None:
            return 0
        pieces[name] = piece
    for name, part in parts.items():
        if styles[name] == "colwise":
            part.cut(rows=pieces[name])
        else:
            part.cut(columns=pieces[name])
    if isinstance(layer, PagedAttention):
        layer.num_heads = layer.spec.num_heads // shard.size
        layer.num_kv_heads = max(1, layer.spec.num_kv_heads // shard.size)
        layer.spec = replace(layer.spec, num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads)
    return len(parts)


def _piece(size: int, layer: Any, shard: Shard) -> Piece | None:
    """This process's piece of a block's inner width: whole heads, where it is attention's.

    None: the width is neither the queries' nor the keys'.
    """
    if not isinstance(layer, PagedAttention):
        return shard.piece(size, 1, "rows of the MLP")
    spec = layer.spec
    if spec.value_dim != spec.head_dim:
        return None
    if size == spec.num_heads * spec.head_dim:
        return shard.piece(spec.num_heads, spec.head_dim, "attention heads")
    if size == spec.num_kv_heads * spec.head_dim:
        return shard.piece(spec.num_kv_heads, spec.head_dim, "key/value heads", shared=True)
    return None
