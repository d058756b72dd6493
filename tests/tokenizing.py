"""Tokenizers of three kinds, and what transformers makes of messages with them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from checkpoints import CORPUS, SPECIAL, VOCAB_SIZE, make_tokenizer, wrap_tokenizer
from mm_engine.inputs.pipeline import InputPipeline

KINDS = ("bytes", "metaspace", "prefixed")


def sentencepiece_like(*, prefixed: bool) -> PreTrainedTokenizerFast:
    """Spaces as `▁` and unknown characters as bytes.

    With `prefixed` the first `▁` comes from a normalizer, as in checkpoints converted early, so
    that it comes again after each special token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 256, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    spec["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if prefixed:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrap_tokenizer(tokenizer)


def bytes_only() -> PreTrainedTokenizerFast:
    """One token for each byte: a word takes as many as it has letters."""
    names = ["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS`."""
    return make_tokenizer() if kind == "bytes" else sentencepiece_like(prefixed=kind == "prefixed")


def oracle_ids(pipeline: InputPipeline, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers makes of messages in which nobody typed a special token."""
    tokenizer: Any = pipeline.ctx.tokenizer
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=pipeline.chat.template,
        tokenize=False,
        add_generation_prompt=True,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
    return ids
