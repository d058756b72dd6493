"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations


class StopStrings:
    """Passes text on up to the first stop string, however the text is cut into pieces.

    The first is the one that ends first; of several that end there, the longest. Only text that
    may yet turn into a stop string is held back.
    """

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include  # whether the stop string itself is passed on
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""  # the beginning of a stop string, or of several

    def feed(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Take the next piece; returns what can be passed on, and the stop string that was met.

        With `may_stop` False, stop strings that end in this piece are not looked for.
        """
        if not self._stops:
            return text, None
        num_seen = len(self._held)  # no stop string ends in what was seen
        text = self._held + text
        if may_stop:
            found = self._find(text, num_seen)
            if found is not None:
                end, stop = found
                self._held = ""
                return text[: end if self._include else end - len(stop)], stop
        num_held = self._num_to_hold(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        text, self._held = self._held, ""
        return text

    def _find(self, text: str, num_seen: int) -> tuple[int, str] | None:
        """The end of the first stop string that ends after `num_seen`, and which it is."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = text.find(stop, max(0, num_seen - len(stop) + 1))
            if at >= 0:
                candidate = (at + len(stop), at, stop)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else (best[0], best[2])

    def _num_to_hold(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string without being one."""
        for length in range(min(self._max_held, len(text)), 0, -1):
            if text[-length] in self._first_chars:
                end = text[-length:]
                if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                    return length
        return 0
