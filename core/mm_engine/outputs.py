"""What comes back. The shapes are vLLM's, so that code written for it reads the same here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One token's log-probability, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request: whole, or (from the engine, step by step) what is new of it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None  # per token: the chosen one and the top ones
    finish_reason: str | None = None  # "stop", "length" or "abort"
    stop_reason: int | str | None = None  # the stop string or token id that ended it

    def extend(self, new: CompletionOutput) -> None:
        """Append what a later step brought."""
        self.text += new.text
        self.token_ids += new.token_ids
        if new.logprobs is not None:
            self.logprobs = (self.logprobs or []) + new.logprobs
        self.finish_reason = new.finish_reason
        self.stop_reason = new.stop_reason


@dataclass(slots=True)
class ErrorInfo:
    """An error on its way from the engine to the caller; `name` is a class in `errors.py`."""

    name: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """How long the engine took until a request's first token: seconds of the engine's own clock."""

    queue: float  # from its arrival in the engine to the first step that it takes part in
    prefill: float  # from then to its first token


@dataclass(slots=True)
class RequestOutput:
    """The answer to a request. The engine sends increments; `LLM` returns the sum."""

    request_id: str
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False  # all of the request's completions have ended
    error: ErrorInfo | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] = field(
        default_factory=list
    )  # placeholders expanded; `LLM` fills it in
    num_cached_tokens: int = 0
    times: RequestTimes | None = field(default=None, compare=False)  # with the first token

    def extend(self, new: RequestOutput) -> None:
        """Add an increment to this sum; completions are kept in order of index."""
        by_index = {output.index: output for output in self.outputs}
        for output in new.outputs:
            if output.index in by_index:
                by_index[output.index].extend(output)
            else:
                self.outputs.append(output)
        self.outputs.sort(key=lambda output: output.index)
        self.finished = new.finished
        self.error = new.error
        self.num_cached_tokens = max(self.num_cached_tokens, new.num_cached_tokens)
        self.times = self.times or new.times
