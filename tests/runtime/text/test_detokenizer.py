"""Text that comes in pieces is the text that would come at once."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.runtime.text.detokenizer import Detokenizer, StopStrings

BYTES = [bytes([byte]) for byte in range(256)]
PIECES = [*BYTES, b" the", "é".encode(), "😀".encode(), b"\xf0\x9f", b"\x98\x80", b"", b"<special>", b"\n\n", b" "]
SPECIAL = PIECES.index(b"<special>")


def detokenizer(*, strip_space=False):
    return Detokenizer(PIECES, skipped=frozenset({SPECIAL}), strip_space=strip_space)


def groups_of(items):
    return st.lists(st.lists(items, max_size=6), max_size=8)


@given(groups_of(st.integers(-2, len(PIECES) + 2)), st.booleans())
def test_any_grouping_of_any_ids_gives_the_same_text(groups, strip_space):
    ids = [i for group in groups for i in group]
    data = b"".join(PIECES[i] for i in ids if 0 <= i < len(PIECES) and i != SPECIAL)
    expected = (data.removeprefix(b" ") if strip_space else data).decode(errors="replace")
    grouped, single, at_once = (detokenizer(strip_space=strip_space) for _ in range(3))
    assert "".join(map(grouped.push, groups)) + grouped.finish() == expected
    assert "".join(single.push([i]) for i in ids) + single.finish() == expected
    assert at_once.push(ids) + at_once.finish() == expected


@given(data=st.data())
def test_any_grouping_of_real_ids_gives_what_decode_gives(data, smollm2):
    groups = data.draw(groups_of(st.integers(0, smollm2.vocab_size - 1)))
    stream = smollm2.detokenizer()
    text = "".join(map(stream.push, groups)) + stream.finish()
    assert text == smollm2.decode([i for group in groups for i in group])


@given(st.text(max_size=40), st.data())
def test_a_character_is_never_split(text, data):
    stream, shown = detokenizer(), ""
    for byte in text.encode():
        shown += stream.push([byte])
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_half_a_character_is_held_back_until_the_end():
    stream = detokenizer()
    assert stream.push([0xF0, 0x9F]) == ""
    assert stream.push([0x98]) == ""
    assert stream.finish() == "\ufffd"


def test_bytes_that_cannot_become_a_character_are_shown_at_once():
    stream = detokenizer()
    assert stream.push([0xF0, 0x9F]) == ""
    assert stream.push([ord("a")]) == "\ufffda"
    assert stream.push([0xFF]) == "\ufffd"


def test_sentencepiece_s_first_space_is_left_out_however_the_ids_come(sentencepiece_tokenizer):
    ids = sentencepiece_tokenizer.encode("All human beings")
    assert sentencepiece_tokenizer.token_bytes(ids[0]).startswith(b" ")
    stream = sentencepiece_tokenizer.detokenizer()
    assert "".join(stream.push([i]) for i in [1, *ids]) + stream.finish() == "All human beings"
    assert sentencepiece_tokenizer.decode(sentencepiece_tokenizer.encode("  two")) == "  two"


def naive_stop(text, stops):
    """The text up to the match that ends first, and of those the longest; and whether there is one."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(st.lists(st.text("ab", max_size=4), max_size=4), st.lists(st.text("abc", max_size=5), max_size=12))
def test_stop_strings_cut_as_a_search_of_the_whole_text_would(stops, chunks):
    watcher, shown, matched = StopStrings(stops), "", False
    for i, chunk in enumerate(chunks):
        safe, matched = watcher.push(chunk)
        shown += safe
        expected, expected_match = naive_stop("".join(chunks[: i + 1]), stops)
        assert matched == expected_match
        assert expected.startswith(shown)
        held = len(expected) - len(shown)
        assert held == 0 if matched else held < max(map(len, stops), default=1) or held == 0
    shown += watcher.finish()
    assert (shown, matched) == naive_stop("".join(chunks), stops)


def test_text_that_might_begin_a_stop_string_is_held_back():
    watcher = StopStrings(["</tool>", "STOP"])
    assert watcher.push("x </to") == ("x ", False)
    assert watcher.push("ast> S") == ("</toast> ", False)
    assert watcher.push("TOP and more") == ("", True)
    assert watcher.push("more") == ("", True)
    assert watcher.finish() == ""


def test_held_text_is_given_out_at_the_end():
    watcher = StopStrings(["</tool>"])
    assert watcher.push("a</too") == ("a", False)
    assert watcher.finish() == "</too"


@pytest.mark.parametrize("stops", [[], [""]])
def test_without_stop_strings_all_text_passes(stops):
    watcher = StopStrings(stops)
    assert watcher.push("anything") == ("anything", False)
    assert watcher.finish() == ""


def test_stop_strings_cost_time_in_proportion_to_the_text():
    """A stop string of many equal letters is the worst case for a search that starts again."""

    def seconds(length):
        watcher = StopStrings(["a" * 2000 + "b"])
        start = time.perf_counter()
        for _ in range(length):
            watcher.push("a")
        return time.perf_counter() - start

    seconds(1000)
    assert min(seconds(20_000) for _ in range(3)) < 20 * min(seconds(5_000) for _ in range(3))
