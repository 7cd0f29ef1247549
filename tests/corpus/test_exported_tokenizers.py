"""Exported tokenizers give the same ids in Hugging Face tokenizers, and text that comes back whole."""

import random

import pytest
import tokenizers

from distgpt.corpus.tokenizer.base import Tokenizer
from distgpt.corpus.tokenizer.bpe import train_bpe
from distgpt.corpus.tokenizer.exported import to_hugging_face
from distgpt.corpus.tokenizer.loading import tokenizer_from_json
from distgpt.corpus.tokenizer.simple import ByteTokenizer, CharTokenizer

CHARACTERS = "\0\t\n\r  'abcdeABC012.,<|>_äß\u00a0\u2028漢\u0301\ufeff😀🇩"
SUBJECTS: dict[str, Tokenizer] = {
    "char": CharTokenizer(CHARACTERS, end_of_text=False),
    "char with end of text": CharTokenizer(CHARACTERS, end_of_text=True),
    "bytes": ByteTokenizer(end_of_text=False),
    "bytes with end of text": ByteTokenizer(end_of_text=True),
    "bpe": train_bpe(["abc abd ab  'a\n\nABC 012 " * 20], 300).with_end_of_text(),
}
each_tokenizer = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


@each_tokenizer
def test_the_ids_are_equal_and_decode_to_the_text(subject: Tokenizer) -> None:
    theirs = tokenizers.Tokenizer.from_str(to_hugging_face(subject))
    assert theirs.get_vocab_size() == subject.vocab_size
    draw = random.Random(3)
    for length in [0, 1, 2, *[draw.randrange(3, 60) for _ in range(200)]]:
        text = "".join(draw.choices(CHARACTERS, k=length))
        found = theirs.encode(text)
        assert found.ids == subject.encode(text).tolist(), repr(text)
        assert theirs.decode(found.ids) == text


@each_tokenizer
def test_an_exported_tokenizer_can_be_read_again(subject: Tokenizer) -> None:
    again = tokenizer_from_json(to_hugging_face(subject))
    assert (again.vocab_size, again.eot_id) == (subject.vocab_size, subject.eot_id)
    assert again.encode(CHARACTERS).tolist() == subject.encode(CHARACTERS).tolist()
    assert to_hugging_face(again) == to_hugging_face(subject)


def test_an_unknown_character_is_an_error_there_as_well() -> None:
    theirs = tokenizers.Tokenizer.from_str(to_hugging_face(SUBJECTS["char"]))
    with pytest.raises(Exception, match=r"\[UNK\]"):
        theirs.encode("aZ")


def test_special_tokens_that_are_added_to_a_text_are_left_out() -> None:
    content = SUBJECTS["bpe"].to_json()
    adds = '"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"a","type_id":0}},'
    adds += '{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}}],'
    adds += '"special_tokens":{"a":{"id":"a","ids":[64],"tokens":["a"]}}}'
    changed = content.replace('"post_processor":null', adds)
    assert changed != content
    assert tokenizers.Tokenizer.from_str(changed).encode("bc").ids != SUBJECTS["bpe"].encode("bc").tolist()
    theirs = tokenizers.Tokenizer.from_str(to_hugging_face(tokenizer_from_json(changed)))
    assert theirs.encode("bc").ids == SUBJECTS["bpe"].encode("bc").tolist()
