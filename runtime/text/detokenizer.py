"""Text out of token ids as they come, and stop strings out of the text.

A token may end in the middle of a character, and a chunk of text in the middle of a stop string. Both are held back
until more arrives, so that whatever is handed out never has to be taken back:

    ids        ->  Detokenizer  ->  text  ->  StopStrings  ->  text to show
    F0 9F | 98 80      held: F0 9F           held: "</to"      "...", matched?
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class Detokenizer:
    """Decodes one sequence of token ids, a few at a time.

    However the ids are grouped, the pieces that `push` and `finish` return join to what `Tokenizer.decode` gives for
    all of them at once. Bytes that cannot be UTF-8 become U+FFFD, one for each maximal invalid part (Unicode, section
    3.9), as soon as they can no longer become valid.

    `pieces` are the bytes of every token, `skipped` the ids that leave no text. `strip_space` removes the one space
    that a SentencePiece model puts before the first word. An id that is not in the vocabulary leaves no text.
    """

    __slots__ = ("_decoder", "_pieces", "_skipped", "_strip_space")

    def __init__(self, pieces: Sequence[bytes], *, skipped: frozenset[int], strip_space: bool) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete. May be empty, and may hold text from earlier ids."""
        pieces, skipped, size = self._pieces, self._skipped, len(self._pieces)
        data = b"".join([pieces[i] for i in ids if 0 <= i < size and i not in skipped])
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    @property
    def is_within_character(self) -> bool:
        """Whether the last ids may have begun a character that is not complete."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """What was held back: U+FFFD if the ids ended within a character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Watches a stream of text for the earliest of several stop strings.

    The match that ends first wins; of those that end together, the longest. Text from its start on is dropped. The
    cost is linear in the text, whatever the stop strings are (Aho and Corasick, "Efficient string matching", 1975):
    text is never read twice. At most the length of the longest stop string is held back.
    """

    __slots__ = ("_automaton", "_held", "_matched", "_state")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = _Automaton([stop for stop in stops if stop])
        self._state = 0
        self._held = ""
        self._matched = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string has been met. After a match all text is dropped."""
        if self._matched:
            return "", True
        automaton = self._automaton
        if not automaton.goto[0]:
            return text, False
        state = self._state
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            state = automaton.step(state, char)
            if length := automaton.match_length[state]:
                self._matched, self._held = True, ""
                return pending[: end - length], True
        self._state = state
        safe = len(pending) - automaton.depth[state]
        self._held = pending[safe:]
        return pending[:safe], False

    def finish(self) -> str:
        """The text that was held back because a stop string might have begun in it."""
        held, self._held, self._state = self._held, "", 0
        return held


class _Automaton:
    """A trie of the stop strings with failure links. The depth of a state is how much of the text's end it covers:
    the longest end of the text that begins a stop string, so exactly what must be held back."""

    __slots__ = ("depth", "failure", "goto", "match_length")

    def __init__(self, words: Sequence[str]) -> None:
        self.goto: list[dict[str, int]] = [{}]
        self.failure = [0]
        self.depth = [0]
        self.match_length = [0]
        for word in words:
            self._insert(word)
        self._link()

    def step(self, state: int, char: str) -> int:
        goto, failure = self.goto, self.failure
        while True:
            target = goto[state].get(char)
            if target is not None:
                return target
            if state == 0:
                return 0
            state = failure[state]

    def _insert(self, word: str) -> None:
        state = 0
        for char in word:
            target = self.goto[state].get(char)
            if target is None:
                target = len(self.goto)
                self.goto[state][char] = target
                self.goto.append({})
                self.failure.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match_length.append(0)
            state = target
        self.match_length[state] = len(word)

    def _link(self) -> None:
        queue = list(self.goto[0].values())
        for state in queue:
            for char, target in self.goto[state].items():
                self.failure[target] = self.step(self.failure[state], char)
                if not self.match_length[target]:
                    self.match_length[target] = self.match_length[self.failure[target]]
                queue.append(target)
