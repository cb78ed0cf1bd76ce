"""From token ids to text as it grows: whole characters only, cut at stop strings."""

from collections.abc import Callable, Sequence


class Detokenizer:
    """Turns tokens into text piece by piece; the pieces joined equal decoding all tokens at once.

    A character may span several tokens. Until it is complete, decoding ends in U+FFFD, and the text waits. Each piece
    is decoded together with the tokens of the piece before it, because the first token of a text may lose its space.

    Args:
        decode: ids -> text, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Text that became certain with this token, often all of it, sometimes none."""
        self._ids.append(token)
        return self._new(final=False)

    def finish(self) -> str:
        """What still waited, incomplete characters as U+FFFD."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        if text.endswith("\ufffd") and not final:
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(known) :]


class StopFilter:
    """Passes text through up to the first stop string; holds back what may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to show. After a stop string, `stopped` is set and nothing more comes."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._release(min(places))
        return self._release(len(self._held) - self._partial())

    def finish(self) -> str:
        """The held text, where no stop string came of it."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
