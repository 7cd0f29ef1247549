"""Tokenizers: lossless, equal to Hugging Face's ids, saved without pickle, clear about what they cannot read."""

import base64
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.corpus.tokenizer.bpe import BpeTokenizer, train_bpe
from distgpt.corpus.tokenizer.loading import gpt2, tokenizer_from_json
from distgpt.corpus.tokenizer.simple import ByteTokenizer, CharTokenizer
from distgpt.errors import DataError, UsageError

WORDS = [
    "the",
    "The",
    "don't",
    "we'll",
    "naïve",
    "日本語",
    "🙂",
    "12345",
    "...",
    "\n",
    "\n\n",
    "\t",
    "  ",
    "\r\n",
    "\u3000",
    "\x85",
]
LITERAL = "before<|endoftext|>after"


def nonsense(seed: int, words: int) -> str:
    source = random.Random(seed)
    return "".join(source.choice(WORDS) + source.choice(["", " ", " ", ", "]) for _ in range(words))


@pytest.fixture(scope="module")
def trained() -> BpeTokenizer:
    return train_bpe([nonsense(seed, 300) for seed in range(20)], 400)


def huggingface_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    loaded = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    loaded.encode_special_tokens = True
    ids: list[int] = loaded.encode(text).ids
    return ids


def test_characters_have_the_ids_of_the_seed_project_on_both_paths() -> None:
    for text in ("hello world", "grüße, 日本語 🙂"):
        characters = sorted(set(text))
        tokenizer = CharTokenizer(text, end_of_text=False)
        assert tokenizer.vocab_size == len(characters)
        assert tokenizer.eot_id is None
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert ids.tolist() == [characters.index(character) for character in text]
        assert tokenizer.decode(ids) == text


def test_an_ascii_text_under_a_vocabulary_beyond_ascii_takes_the_same_ids() -> None:
    tokenizer = CharTokenizer("abcé日", end_of_text=True)
    assert tokenizer.encode("cab").tolist() == [2, 0, 1]
    assert tokenizer.eot_id == 5
    assert tokenizer.vocab_size == 6


@pytest.mark.parametrize(
    ("text", "named"), [("hex", "'x' (U+0078)"), ("heé", "'é' (U+00E9)"), ("h\n", r"'\n' (U+000A)")]
)
def test_an_unknown_character_is_named(text: str, named: str) -> None:
    with pytest.raises(DataError, match="not in the vocabulary") as caught:
        CharTokenizer("he", end_of_text=True).encode(text)
    assert named in str(caught.value)


def test_more_ids_than_uint16_holds_are_uint32() -> None:
    characters = [chr(0x10000 + index) for index in range(65_536)]
    ids = CharTokenizer(characters, end_of_text=False).encode(characters[-1])
    assert ids.tolist() == [65_535]
    assert ids.dtype == np.uint16
    ids = CharTokenizer([*characters, "a"], end_of_text=True).encode("a" + characters[-1])
    assert ids.tolist() == [0, 65_536]
    assert ids.dtype == np.uint32


def every_kind(trained: BpeTokenizer) -> list[Tokenizer]:
    text = nonsense(0, 100) + LITERAL
    kinds: list[Tokenizer] = [CharTokenizer(text, end_of_text=False), ByteTokenizer(end_of_text=False), trained]
    return kinds + [tokenizer.with_end_of_text() for tokenizer in kinds]


def test_every_kind_is_lossless_and_survives_saving(trained: BpeTokenizer, tmp_path: Path) -> None:
    text = nonsense(0, 100) + LITERAL
    for tokenizer in every_kind(trained):
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
        for loaded in (tokenizer, load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
            ids = loaded.encode(text)
            assert ids.dtype == np.uint16
            assert np.array_equal(ids, tokenizer.encode(text))
            assert loaded.decode(ids) == text
            assert loaded.decode_bytes(ids) == text.encode()
            assert (loaded.kind, loaded.vocab_size, loaded.eot_id) == (
                *(tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id),
            )
            assert loaded.token_bytes()[ids].sum() == len(text.encode())
            assert loaded.eot_id not in ids


def test_end_of_text_is_one_more_id_that_counts_no_bytes(trained: BpeTokenizer) -> None:
    for tokenizer in every_kind(trained)[:3]:
        with_end = tokenizer.with_end_of_text()
        assert with_end.eot_id == tokenizer.vocab_size == with_end.vocab_size - 1
        assert with_end.token_bytes().shape == (with_end.vocab_size,)
        assert with_end.token_bytes()[with_end.eot_id] == 0
        assert with_end.decode([with_end.eot_id]) == "<|endoftext|>"
        assert with_end.with_end_of_text() is with_end


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for ids in ([256], [-1]):
        with pytest.raises(DataError, match="outside the vocabulary of 256"):
            ByteTokenizer(end_of_text=False).decode_bytes(ids)


def test_half_a_character_decodes_to_a_replacement() -> None:
    tokenizer = ByteTokenizer(end_of_text=False)
    assert tokenizer.decode_bytes(tokenizer.encode("é")[:1]) == b"\xc3"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_bpe_ids_equal_those_of_hugging_face(trained: BpeTokenizer) -> None:
    assert trained.vocab_size == 400
    tokenizer = trained.with_end_of_text()
    loaded = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert loaded.token_to_id("<|endoftext|>") == tokenizer.eot_id
    assert loaded.get_vocab_size() == tokenizer.vocab_size
    for seed in range(200):
        text = nonsense(seed, 60) + LITERAL
        assert tokenizer.encode(text).tolist() == huggingface_ids(text, tokenizer)
    assert not tokenizer.is_slow


def test_training_gives_the_same_vocabulary_for_any_number_of_threads(trained: BpeTokenizer) -> None:
    program = (
        "import sys; from distgpt.corpus.tokenizer.bpe import train_bpe;"
        "print(train_bpe(sys.stdin.read().split(chr(0)), 400).to_json())"
    )
    texts = "\0".join(nonsense(seed, 300).replace("\r", "") for seed in range(20))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=texts.encode(),
            env={"RAYON_NUM_THREADS": threads, "PYTHONUTF8": "1"},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(outputs) == 1


def crafted(merges: list[list[str]], products: list[str]) -> BpeTokenizer:
    """Return a tokenizer.json of the 256 bytes and these merges, ids in the order of `products`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return BpeTokenizer(
        json.dumps(
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "use_regex": True,
                    "trim_offsets": True,
                },
                "added_tokens": [],
                "model": {
                    "type": "BPE",
                    "vocab": {token: id_ for id_, token in enumerate([*alphabet, *products])},
                    "merges": merges,
                },
            }
        )
    )


def test_ids_that_do_not_follow_the_merges_are_still_right() -> None:
    tokenizer = crafted([["a", "b"], ["b", "c"]], ["bc", "ab"])
    assert tokenizer.encode("abc bc").tolist() == huggingface_ids("abc bc", tokenizer)


def test_merges_that_tiktoken_would_get_wrong_are_noticed_before_any_text() -> None:
    # "abc" has a merge of its own, but "bc" comes first and leaves nothing to merge "ab" with.
    tokenizer = crafted([["b", "c"], ["a", "b"], ["ab", "c"]], ["bc", "ab", "abc"])
    assert tokenizer.is_slow
    assert tokenizer.encode("abc").tolist() == huggingface_ids("abc", tokenizer)


def test_tiktoken_is_used_only_if_it_gives_the_ids_of_hugging_face() -> None:
    source = random.Random(3)
    slow = 0
    for _ in range(300):
        tokens, merges = ["a", "b", "c"], list[list[str]]()
        while len(merges) < 7:
            left, right = source.choice(tokens), source.choice(tokens)
            if left + right not in tokens and len(left + right) < 9:
                merges.insert(source.choice([0, *[len(merges)] * 20]), [left, right])
                tokens.append(left + right)
        tokenizer = crafted(merges, tokens[3:])
        slow += tokenizer.is_slow
        for _ in range(20):
            text = "".join(source.choices("abc ", k=40))
            assert tokenizer.encode(text).tolist() == huggingface_ids(text, tokenizer)
    assert 30 < slow < 270


def test_two_merges_with_one_result_are_encoded_by_hugging_face() -> None:
    tokenizer = crafted([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]], ["ab", "bc", "abc"])
    assert tokenizer.encode("abc").tolist() == huggingface_ids("abc", tokenizer)


def test_a_run_of_spaces_too_long_for_tiktoken_is_encoded(trained: BpeTokenizer) -> None:
    text = " " * 1_050_000 + "the"
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("slow", [False, True])
def test_a_text_that_is_not_utf8_is_one_clear_error(slow: bool, trained: BpeTokenizer) -> None:
    tokenizer = crafted([["b", "c"], ["a", "b"], ["ab", "c"]], ["bc", "ab", "abc"]) if slow else trained
    with pytest.raises(DataError, match=r"^'\\udce9' \(U\+DCE9\) in the text is not a character: it must be UTF-8$"):
        tokenizer.encode(b"caf\xe9".decode(errors="surrogateescape"))


def test_a_long_run_without_a_space_is_learned_from_in_linear_time() -> None:
    line = "".join(random.Random(1).choices("ACGT", k=300_000))  # uncut, about half a minute
    started = time.monotonic()
    assert train_bpe([line], 2_000).vocab_size == 2_000
    assert time.monotonic() - started < 10


def test_short_words_give_the_vocabulary_of_hugging_face(trained: BpeTokenizer) -> None:
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    reference.train_from_iterator([nonsense(seed, 300) for seed in range(20)], trainer)
    assert trained.to_json() == reference.to_str()


def test_a_tiktoken_file_gives_the_same_ids(trained: BpeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.tiktoken"
    tokens = [trained.decode_bytes([id_]) for id_ in range(trained.vocab_size)]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    loaded = load_tokenizer(path)
    assert loaded.notes == ["a .tiktoken file does not say how it splits a text into words: using GPT-2's pattern"]
    assert loaded.eot_id == 400
    text = nonsense(7, 500) + LITERAL
    assert np.array_equal(loaded.encode(text), trained.encode(text))
    assert loaded.encode(text).tolist() == huggingface_ids(text, loaded)


def saved(tokenizer: BpeTokenizer, path: Path, **changes: object) -> Path:
    """Write the tokenizer.json with these entries changed."""
    path.write_text(json.dumps({**json.loads(tokenizer.to_json()), **changes}))
    return path


def added(id_: int, content: str, **flags: bool) -> dict[str, object]:
    """Return an entry of added_tokens, not special."""
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": id_, "content": content, "normalized": True, **off, **flags}


@pytest.mark.parametrize("slow", [False, True])
def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied_and_noted(
    slow: bool, trained: BpeTokenizer, tmp_path: Path
) -> None:
    owner = tokenizers.Tokenizer.from_str(trained.to_json())
    owner.enable_truncation(5)
    owner.enable_padding(length=3000)
    content = json.loads(owner.to_str())
    content["model"]["ignore_merges"] = slow
    (tmp_path / "cut.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path / "cut.json")
    text = nonsense(1, 300)
    assert loaded.encode(text).tolist() == huggingface_ids(text, trained)
    assert huggingface_ids(text, loaded) == huggingface_ids(text, trained), "what is saved cuts nothing either"
    assert loaded.notes == ["its truncation and padding will not be applied: every document is tokenized whole"]
    assert trained.notes == []


def test_a_post_processor_that_adds_tokens_is_noted(trained: BpeTokenizer, tmp_path: Path) -> None:
    path = saved(trained, tmp_path / "t.json", post_processor={"type": "TemplateProcessing"})
    [note] = load_tokenizer(path).notes
    assert note.startswith("its post-processor will not be applied")


def test_added_tokens_that_are_not_special_have_the_ids_of_hugging_face(trained: BpeTokenizer, tmp_path: Path) -> None:
    runs = [added(400 + index, " " * (31 - index)) for index in range(30)]
    loaded = load_tokenizer(saved(trained, tmp_path / "codegen.json", added_tokens=runs))
    code = "def f(x):\n        if x:\n            return 1\n" * 50 + LITERAL
    ids = loaded.encode(code).tolist()
    assert ids == huggingface_ids(code, loaded)
    assert max(ids) >= 400
    assert loaded.decode(ids) == code
    assert loaded.with_end_of_text().encode(code).tolist() == ids
    loaded.check(code)


@pytest.mark.parametrize("token", [added(400, "New York"), added(400, "x", lstrip=True), added(400, "x", rstrip=True)])
def test_added_tokens_that_a_cut_could_divide_need_a_whole_text(
    token: dict[str, object], trained: BpeTokenizer, tmp_path: Path
) -> None:
    loaded = load_tokenizer(saved(trained, tmp_path / "t.json", added_tokens=[token]))
    assert loaded.needs_whole_text
    text = "to New York x  x y"
    assert loaded.encode(text).tolist() == huggingface_ids(text, loaded)
    special = load_tokenizer(saved(trained, tmp_path / "t.json", added_tokens=[{**token, "special": True}]))
    assert special.eot_id is None
    assert not special.needs_whole_text


def test_an_end_of_text_in_the_vocabulary_is_used(trained: BpeTokenizer, tmp_path: Path) -> None:
    content = json.loads(trained.to_json())
    content["model"]["vocab"]["<|endoftext|>"] = 400
    (tmp_path / "t.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path / "t.json").with_end_of_text()
    assert (loaded.eot_id, loaded.vocab_size) == (400, 401)
    assert tokenizers.Tokenizer.from_str(loaded.to_json()).token_to_id("<|endoftext|>") == 400
    assert 400 not in loaded.encode(LITERAL)


def test_an_end_of_text_that_is_not_special_is_still_never_produced(trained: BpeTokenizer, tmp_path: Path) -> None:
    loaded = load_tokenizer(saved(trained, tmp_path / "t.json", added_tokens=[added(400, "<|endoftext|>")]))
    assert loaded.eot_id == 400
    for text in (LITERAL, " " * 1_050_000 + LITERAL):  # fast, and too long for the fast encoder
        assert 400 not in loaded.encode(text)
    loaded.check(LITERAL)


def test_a_tokenizer_json_of_2020_without_a_model_type_is_read(trained: BpeTokenizer, tmp_path: Path) -> None:
    model = json.loads(trained.to_json())["model"]
    legacy = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "vocab": model["vocab"],
        "merges": [" ".join(merge) for merge in model["merges"]],
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    loaded = load_tokenizer(saved(trained, tmp_path / "gpt2.json", model=legacy, pre_tokenizer=byte_level))
    text = nonsense(3, 300)
    assert loaded.encode(text).tolist() == huggingface_ids(text, trained) == huggingface_ids(text, loaded)


def test_a_tiktoken_file_of_another_pattern_is_refused(tmp_path: Path) -> None:
    for token in (b");\n", b"(hello", b"12 34", b"a1"):
        tokens = [bytes([value]) for value in range(256)]
        tokens += [token[:end] for end in range(2, len(token) + 1)]
        path = tmp_path / "other.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
        with pytest.raises(
            DataError, match=r"other\.tiktoken: token \d+, .* spans several words of the pattern gpt2: .* --bpe-pattern"
        ):
            load_tokenizer(path)


def test_ids_that_differ_from_hugging_face_are_an_error(trained: BpeTokenizer) -> None:
    text = nonsense(2, 100)
    trained.check(text)
    wrong = BpeTokenizer(trained.to_json())
    wrong.__dict__["ids_of_ranks"] = wrong.ids_of_ranks[::-1]
    with pytest.raises(DataError, match=r"after '' its ids are \[.*\] here and \[.*\] with Hugging Face tokenizers"):
        wrong.check(text)


def test_a_merge_that_the_vocabulary_lacks_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="its merge of 'b' and 'c' is not among the tokens of its vocabulary"):
        crafted([["a", "b"], ["b", "c"]], ["ab"])


def test_a_file_that_hugging_face_cannot_read_is_one_clear_error(trained: BpeTokenizer, tmp_path: Path) -> None:
    broken = {"id": 400, "content": "x"}
    loaded = load_tokenizer(saved(trained, tmp_path / "t.json", added_tokens=[broken]))
    with pytest.raises(DataError, match=r"^Hugging Face tokenizers cannot read it \(.*missing field"):
        loaded.check("text")


@pytest.mark.parametrize("id_", [-1, 2**20, 10**12])
def test_an_absurd_id_is_one_clear_error(id_: int, trained: BpeTokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"its ids go from .* and distgpt reads 0 to 1,048,575"):
        load_tokenizer(saved(trained, tmp_path / "t.json", added_tokens=[added(id_, "x")]))


GPT2_LIKE = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("broken.json", "{", "not a tokenizer that distgpt reads"),
        ("list.json", "[]", "not a tokenizer that distgpt reads"),
        ("latin.json", b"\xff\xfe", "not a tokenizer that distgpt reads"),
        ("newer.json", '{"format": "distgpt-tokenizer", "version": 2}', "version 2"),
        ("kind.json", '{"format": "distgpt-tokenizer", "version": 1, "kind": "x", "end_of_text": true}', "kind 'x'"),
        ("unigram.json", '{"model": {"type": "Unigram"}}', "Hugging Face tokenizers cannot read it"),
        ("few.json", json.dumps({"pre_tokenizer": GPT2_LIKE, "model": {"type": "BPE", "vocab": {"a": 0}}}), "256"),
        ("text.tiktoken", "hello\n", "lines of a base64 token"),
        ("few.tiktoken", "YQ== 0\n", "all 256 bytes"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_one_clear_error(
    name: str, content: str | bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=reason) as caught:
        load_tokenizer(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_json_round_trip_keeps_control_characters() -> None:
    text = 'a\x00\x7f\u2028\n"\\'
    tokenizer = CharTokenizer(text, end_of_text=False)
    assert tokenizer_from_json(tokenizer.to_json()).encode(text).tolist() == tokenizer.encode(text).tolist()


def test_without_tiktoken_the_ids_are_the_same(trained: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    without = BpeTokenizer(trained.to_json())
    for text in (*WORDS, " ".join(WORDS), LITERAL, ""):
        assert without.encode(text).tolist() == trained.encode(text).tolist()
    with pytest.raises(UsageError, match="needs the package tiktoken: pip install tiktoken, or pass the file"):
        gpt2()
