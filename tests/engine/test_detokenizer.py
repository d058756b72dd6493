from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mm_engine.engine.detokenizer import Detokenizer, token_text
from mm_engine.sampling_params import SamplingParams

TEXTS = [
    "a red circle",
    "two  spaces and a\nnew line ",
    "你好，世界",
    "👩‍👩‍👧 family 🏳️‍🌈 flag 🙂",
    "ünïcödé e\u0301 ไทย हिन्दी",
    "x",
    " leading",
]


def byte_level() -> PreTrainedTokenizerFast:
    """As Qwen2's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 1's and 2's: words begin with a low line, unknown characters are bytes."""
    letters = sorted({char for char in "".join(TEXTS[:2]) if char not in " \n"})
    pieces = ["<unk>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *letters]
    merges = [("▁", "r"), ("▁", "a"), ("▁", "▁"), ("c", "i"), ("ci", "r"), ("▁r", "e")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {
    "byte_level": byte_level(),
    "byte_fallback": byte_fallback(),
    "metaspace": metaspace(),
}


@pytest.fixture(params=list(TOKENIZERS))
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def pieces(
    tokenizer: PreTrainedTokenizerFast, ids: list[int], params: SamplingParams | None = None
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, params or SamplingParams())
    return [
        detokenizer.push(token_id, last=position == len(ids) - 1)[0]
        for position, token_id in enumerate(ids)
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_equal_the_whole(any_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    got = pieces(any_tokenizer, ids)
    assert "".join(got) == any_tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in got)
    if any_tokenizer is not TOKENIZERS["metaspace"]:  # it knows no bytes, only <unk>
        assert "".join(got).strip() == text.strip()


def test_a_character_in_several_tokens_comes_whole() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("a🙂", add_special_tokens=False)
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🙂"]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_character_begun_and_never_ended_comes_out_at_the_end(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("a🙄", add_special_tokens=False)[:-1]
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert got[-1].strip("\ufffd") == ""
    assert "\ufffd" in got[-1]


def test_the_tail_comes_out_when_the_last_token_is_an_unwanted_one() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a🙄", add_special_tokens=False)[:-1]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    got = [detokenizer.push(token_id)[0] for token_id in ids]
    assert "".join(got) == "a"
    assert detokenizer.push(None, last=True)[0].startswith("\ufffd")


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_skipped_or_shown(
    any_tokenizer: PreTrainedTokenizerFast, skip: bool
) -> None:
    ids = any_tokenizer.encode("a red", add_special_tokens=False)
    ids = [*ids, any_tokenizer.eos_token_id, *ids]
    got = "".join(pieces(any_tokenizer, ids, SamplingParams(skip_special_tokens=skip)))
    assert got == any_tokenizer.decode(ids, skip_special_tokens=skip)
    assert ("</s>" in got) == (not skip)


@given(st.lists(st.integers(0, 400), max_size=40))
def test_any_ids_decode_as_a_whole_does(ids: list[int]) -> None:
    for name in ("byte_level", "metaspace"):  # ids beyond the vocabulary are nothing
        assert "".join(pieces(TOKENIZERS[name], ids)) == TOKENIZERS[name].decode(
            ids, skip_special_tokens=True
        )


@given(st.lists(st.integers(0, 300), max_size=40))
def test_bytes_that_are_no_characters_never_stop_the_text(ids: list[int]) -> None:
    """`decode` rewrites valid characters when an invalid byte follows; what was sent stays."""
    tokenizer = TOKENIZERS["byte_fallback"]
    got = "".join(pieces(tokenizer, ids))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert got == whole
    ends = tokenizer.encode(" red", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids + ends)).endswith("red")


def test_a_stop_string_ends_the_text_before_it(any_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = any_tokenizer.encode("a red circle", add_special_tokens=False)
    detokenizer = Detokenizer(any_tokenizer, SamplingParams(stop=("d ci",)))
    text, stop = "", None
    for token_id in ids:
        piece, stop = detokenizer.push(token_id)
        text += piece
        if stop:
            break
    assert (text, stop) == ("a re", "d ci")


def test_what_might_have_become_a_stop_string_comes_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a red", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("red circle",)))
    held = "".join(detokenizer.push(token_id)[0] for token_id in ids)
    assert held == "a "
    assert detokenizer.push(None, last=True) == ("red", None)


def test_token_text_shows_one_token_alone() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    token_id = tokenizer.encode(" red", add_special_tokens=False)
    assert "".join(token_text(tokenizer, i) for i in token_id) == " red"
    assert token_text(tokenizer, tokenizer.eos_token_id) == "</s>"
    assert token_text(tokenizer, 10_000) == ""
