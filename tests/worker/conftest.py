"""The demo's vocabulary, for grammars."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from mm_engine.plugins.discovery import demos
from mm_engine.worker.grammars import Grammars
from structured import EOS


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(min(demos().items())[1])
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(tokenizer, len(tokenizer), [EOS])
