"""Token ids to text, as they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mm_engine.engine.stop_strings import StopStrings
from mm_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Detokenizer:
    """The text of one sequence's output, piece by piece.

    The pieces joined are what the tokenizer's `decode` makes of all the output's ids, cut at the
    first stop string. (One exception: where bytes that a byte-fallback tokenizer has begun turn
    out to be no character, `decode` rewrites text that was already sent; that text then stays.)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, params: SamplingParams) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._ids: list[int] = []
        self._num_chars = 0  # of the decoded text that the stream has given so far

    def push(
        self, token_id: int | None, *, last: bool = False, may_stop: bool = True
    ) -> tuple[str, str | None]:
        """Decode the next token; returns the text that is now certain, and the stop string met.

        `token_id` None: a token whose text is not wanted. `last`: nothing follows, so that what
        was held back comes out. `may_stop` False: stop strings that this token completes are text.
        """
        text = "" if token_id is None else self._decode(token_id)
        if last:
            text += self._rest()
        released, stop = self._stops.feed(text, may_stop=may_stop)
        if last and stop is None:
            released += self._stops.flush()
        return released, stop

    def _decode(self, token_id: int) -> str:
        self._ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            # tokenizers raises a bare Exception where the decoded text no longer begins with what
            # it gave before (see the class's docstring). Start again behind what was sent.
            if "Invalid prefix" not in str(error):
                raise
            self._stream = DecodeStream(
                ids=list(self._ids), skip_special_tokens=self._skip_special_tokens
            )
            text = self._behind()
        self._num_chars += len(text)
        return text

    def _behind(self) -> str:
        """What `decode` makes of all ids, less what was given."""
        whole: str = self._tokenizer.decode(self._ids, self._skip_special_tokens)
        return whole[self._num_chars :]

    def _rest(self) -> str:
        """What the stream still holds: the beginning of a character that never came."""
        text = self._behind() if self._ids else ""
        self._num_chars += len(text)
        return text


def token_text(tokenizer: PreTrainedTokenizerFast, token_id: int) -> str:
    """The text of one token alone; bytes that are no character show as U+FFFD."""
    text: str = tokenizer.backend_tokenizer.decode([token_id], False)
    return text
