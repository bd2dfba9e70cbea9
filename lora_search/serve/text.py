"""From tokens to text as they come: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextSoFar:
    """The text of one answer.

    What is handed out is never taken back: an unfinished character, and what may yet become a stop string, is held.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._given = 0
        self.text = ""
        self.is_stopped = False
        """Whether a stop string has come."""

    @property
    def token_count(self) -> int:
        return len(self._tokens)

    def add(self, token: int) -> str:
        """Take a token; the text that is now certain."""
        if self.is_stopped:
            return ""
        self._tokens.append(token)
        self.text = self._decode(self._tokens)
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.is_stopped = self.text[: min(places)], True
            return self._give(len(self.text))
        certain = len(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        return self._give(certain - self._possible_stop(self.text[:certain]))

    def rest(self) -> str:
        """What was held back, once no token follows."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        start, self._given = self._given, max(self._given, end)
        return self.text[start : self._given]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest
