"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from mm_engine.outputs import CompletionOutput, Logprob
from mm_engine.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)

MIN_LOGPROB = -9999.0  # JSON has no infinity; vLLM's value


def chat_logprobs(output: CompletionOutput, num_top: int) -> ChatLogprobs | None:
    """The chat shape; `num_top` alternatives for each token."""
    if output.logprobs is None:
        return None
    content = []
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        chosen = _top(entries[token_id])
        top = [_top(entry) for entry in likeliest(entries, num_top)]
        content.append(TokenLogprob(**chosen, top_logprobs=top))
    return ChatLogprobs(content=content)


def completion_logprobs(
    output: CompletionOutput, num_top: int, text_offset: int
) -> CompletionLogprobs | None:
    """The completions shape; the first token's text starts at `text_offset`.

    `top_logprobs` holds the chosen token, too, as OpenAI's does.
    """
    if output.logprobs is None:
        return None
    shape = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        chosen = entries[token_id]
        text = chosen.decoded_token or ""
        top: dict[str, float] = {}
        for entry in (*likeliest(entries, num_top), chosen):  # of equal texts, the likeliest stays
            top.setdefault(entry.decoded_token or "", _finite(entry))
        shape["tokens"].append(text)
        shape["token_logprobs"].append(_finite(chosen))
        shape["top_logprobs"].append(top)
        shape["text_offset"].append(text_offset)
        text_offset += len(text)
    return shape


def likeliest(entries: dict[int, Logprob], num_top: int) -> list[Logprob]:
    """The `num_top` likeliest of a place's entries, the likeliest first."""
    return sorted(entries.values(), key=lambda entry: -entry.logprob)[:num_top]


def _top(entry: Logprob) -> TopLogprob:
    text = entry.decoded_token or ""
    return TopLogprob(token=text, logprob=_finite(entry), bytes=list(text.encode("utf-8")))


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, MIN_LOGPROB)
