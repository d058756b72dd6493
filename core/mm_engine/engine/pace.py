"""How much of a prompt may ride in a step beside decodes, so that they keep their pace."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence as Seq

MIN_PROMPT_TOKENS = 8  # a step always takes so many: a prompt is never starved by decodes
NUM_OBSERVED = 16  # steps by whose time all times are corrected


class Pace:
    """Bounds a step's time by `max_slowdown` times that of its decodes alone.

    `times` are pairs (tokens in a step, seconds it took), as measured on the machine at startup.
    Between them the time is taken to rise evenly, and behind the last in proportion to the
    tokens: no token of a larger step costs more than one of the last, which had its share of
    reading the weights, too. That is all that is assumed of the machine: on a CPU some tokens more
    cost next to nothing, because a decode waits for the weights; on a GPU it is hundreds.

    What was measured at startup, beside a busy neighbour maybe, is corrected by what `observe` is
    told of later steps: all times are multiplied by the least factor that one of the newest took.
    """

    def __init__(self, times: Seq[tuple[int, float]], max_slowdown: float) -> None:
        assert times and max_slowdown > 1
        self.max_slowdown = max_slowdown
        self._sizes, self._seconds = (list(column) for column in zip(*sorted(times), strict=True))
        # Noise only adds: where a larger step took less time, the smaller one was held up.
        for i in range(len(times) - 2, -1, -1):
            self._seconds[i] = min(self._seconds[i], self._seconds[i + 1])
        self._factors = deque([1.0], maxlen=NUM_OBSERVED)
        self._factor = 1.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note how long a step took that encoded nothing."""
        if num_tokens <= self._sizes[-1]:  # behind it the times are guesses
            self._factors.append(seconds / self._measured(num_tokens))
            self._factor = min(self._factors)  # noise only adds

    def seconds(self, num_tokens: int) -> float:
        """How long a step of so many tokens takes."""
        return self._factor * self._measured(num_tokens)

    def _measured(self, num_tokens: int) -> float:
        sizes, seconds = self._sizes, self._seconds
        if num_tokens <= sizes[0]:
            return seconds[0]
        if num_tokens >= sizes[-1]:
            return seconds[-1] * num_tokens / sizes[-1]
        right = bisect_right(sizes, num_tokens)
        return seconds[right - 1] + self._slope(right) * (num_tokens - sizes[right - 1])

    def spare_seconds(self, num_decodes: int) -> float:
        """By how much a step with so many decodes may be held up."""
        # Behind what was measured `seconds` errs upwards: a step may not be held up by its error.
        measured = min(num_decodes, self._sizes[-1])
        return (self.max_slowdown - 1.0) * self.seconds(measured)

    def num_tokens_more(self, num_tokens: int, seconds: float, most: int) -> int:
        """How many tokens, `most` at most, lengthen a step of `num_tokens` by up to `seconds`."""
        limit = self.seconds(num_tokens) + seconds
        low, high = 0, most
        while low < high:  # the time never falls as tokens are added
            middle = (low + high + 1) // 2
            if self.seconds(num_tokens + middle) <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _slope(self, right: int) -> float:
        seconds = self._seconds[right] - self._seconds[right - 1]
        return seconds / (self._sizes[right] - self._sizes[right - 1])
