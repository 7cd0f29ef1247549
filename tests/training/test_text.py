"""Texts that grow token by token: what is shown of them, and where they end."""

import pytest

from distgpt.corpus.tokenizer.simple import ByteTokenizer, CharTokenizer
from distgpt.errors import DataError
from distgpt.training.text import Text

BYTES = ByteTokenizer(end_of_text=True)


def grown(added: bytes, *, stops: tuple[str, ...] = (), max_tokens: int = 99) -> tuple[Text, list[str]]:
    """Add bytes until the text ends; return it and what was new after each."""
    text, new = Text("prompt", BYTES, seed=0, max_tokens=max_tokens, stops=stops), list[str]()
    for token in added:
        if text.end is None:
            text.add(token)
            new.append(text.pop_new())
    return text, new


def test_each_token_is_shown_at_once() -> None:
    text, new = grown(b"abc")
    assert (new, text.end, text.written, text.tokens) == (["a", "b", "c"], None, "abc", 3)


def test_a_character_of_several_tokens_is_shown_when_it_is_whole() -> None:
    assert grown("a☃b".encode())[1] == ["a", "", "", "☃", "b"]


def test_a_character_that_is_cut_off_is_replaced() -> None:
    assert grown(b"a\xe2\x98", max_tokens=3)[1] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_text_ends_at_its_length() -> None:
    text, new = grown(b"abc", max_tokens=2)
    assert (new, text.end, text.tokens) == (["a", "b"], "length", 2)
    assert Text("prompt", BYTES, seed=0, max_tokens=0).end == "length"


def test_a_text_ends_at_the_end_of_text_without_it() -> None:
    text = Text("prompt", BYTES, seed=0, max_tokens=9)
    text.add(ord("a"))
    assert BYTES.eot_id is not None
    text.add(BYTES.eot_id)
    assert (text.written, text.end, text.tokens) == ("a", "end_of_text", 2)


@pytest.mark.parametrize(
    ("added", "stops", "new"),
    [
        (b"ab\n\ncd", ("\n\n",), ["a", "b", "", ""]),
        (b"a\nb\n\n", ("\n\n",), ["a", "", "\nb", "", ""]),  # one newline was no stop
        (b"aab", ("ab",), ["", "a", ""]),  # what was held back is shown when something else follows
        (b"xyzw", ("yzw", "z"), ["x", "", "y"]),  # the first that is complete
        (b"stop", ("stop",), ["", "", "", ""]),
    ],
)
def test_a_text_ends_before_a_stop_text_of_which_nothing_is_shown(
    added: bytes, stops: tuple[str, ...], new: list[str]
) -> None:
    text, shown = grown(added, stops=stops)
    assert (shown, text.end) == (new, "stop")
    assert text.written == "".join(new)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    text, new = grown(b"a\n", stops=("\n\n",), max_tokens=2)
    assert (new, text.end) == (["a", "\n"], "length")


def test_a_text_that_was_not_shown_for_long_still_ends_before_its_stop() -> None:
    text = Text("prompt", BYTES, seed=0, max_tokens=9, stops=("\n",))
    for token in b"abc\n":
        text.add(token)
    assert (text.pop_new(), text.pop_new(), text.end) == ("abc", "", "stop")


def test_a_prompt_with_an_unknown_character_is_refused() -> None:
    with pytest.raises(DataError):
        Text("ä", CharTokenizer("abc", end_of_text=False), seed=0, max_tokens=1)
