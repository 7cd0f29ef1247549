"""Tokenizers of every shape, trained here: the ids of the library of their format, and texts that come back right."""

import base64
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from distgpt.corpus import shards
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.corpus.tokenizer.bpe import BpeTokenizer, train_bpe
from distgpt.corpus.tokenizer.huggingface import PATTERNS
from distgpt.corpus.tokenizer.libraries import HuggingFaceTokenizer
from distgpt.errors import DataError, UsageError
from distgpt.prepare import main, parse

WORDS = [
    "the",
    "The",
    "don't",
    "WE'LL",
    "naïve",
    "日本語",
    "🙂",
    "12345",
    "...",
    "HTMLParser",
    "x_y",
    "Straße",
    "\u017f",
]
SPACES = ["", " ", " ", "  ", "\n", "\r\n", "\n\n  ", "\t", ", ", "\u3000", "\xa0"]
LITERALS = ["<s>", "</s>", "<|endoftext|>", "[UNK]", "<0x41>", "▁"]


def nonsense(seed: int, words: int, spaces: list[str] = SPACES) -> str:
    source = random.Random(seed)
    return "".join(source.choice(WORDS) + source.choice(spaces) for _ in range(words))


CORPUS = [nonsense(seed, 200) for seed in range(30)]


def byte_level(pattern: str, **options: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    byte_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def llama2() -> tokenizers.Tokenizer:
    """BPE with bytes for characters that it lacks, as Llama 2 and Mistral have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=special, limit_alphabet=40, max_token_length=12
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def unigram() -> tokenizers.Tokenizer:
    """As T5, ALBERT and XLNet have it."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    """As BERT has it."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, show_progress=False, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


SHAPES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "llama3": lambda: byte_level(PATTERNS["llama3"], ignore_merges=True),
    "gpt4o": lambda: byte_level(PATTERNS["gpt4o"]),
    "qwen": lambda: byte_level(PATTERNS["qwen"]),
    "starcoder": lambda: byte_level(r"\p{N}|'(?:[sdmt]|ll)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "llama2": llama2,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_hugging_face_and_survive_saving(shape: str, tmp_path: Path) -> None:
    owner = SHAPES[shape]()
    owner.save(str(tmp_path / "tokenizer.json"))
    owner.encode_special_tokens = True
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, BpeTokenizer if shape in ("llama3", "gpt4o", "qwen") else HuggingFaceTokenizer)
    assert tokenizer.vocab_size == owner.get_vocab_size()
    assert tokenizer.needs_whole_text
    (tmp_path / "again.json").write_text(tokenizer.with_end_of_text().to_json())
    for loaded in (tokenizer, load_tokenizer(tmp_path / "again.json")):
        for seed in range(150):
            text = nonsense(seed + 1000, 40) + random.Random(seed).choice(LITERALS) + nonsense(seed, 3)
            ids = loaded.encode(text)
            assert ids.tolist() == owner.encode(text, add_special_tokens=False).ids
            assert ids.dtype == np.uint16
            loaded.check(text)
    if isinstance(tokenizer, BpeTokenizer):
        assert not tokenizer.is_slow


@pytest.mark.parametrize("shape", SHAPES)
def test_token_by_token_decoding_gives_the_text(shape: str, tmp_path: Path) -> None:
    owner = SHAPES[shape]()
    owner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    source = random.Random(4)
    for seed in range(100):
        ids = tokenizer.encode(nonsense(seed, 30)).tolist()
        streamed = b"".join(tokenizer.decode_bytes([id_]) for id_ in ids).decode()
        assert streamed.removeprefix(" ") == owner.decode(ids, skip_special_tokens=False).removeprefix(" ")
        assert tokenizer.decode(ids) == owner.decode(ids, skip_special_tokens=False)
        # In the middle of a text a space stays where a word begins.
        cut = source.randrange(len(ids))
        first, second = (tokenizer.decode_bytes(part) for part in (ids[:cut], ids[cut:]))
        assert (first + second).decode() == streamed


def test_punctuation_follows_a_word_without_a_space_if_the_file_says_so(tmp_path: Path) -> None:
    owner = wordpiece()
    owner.decoder = decoders.WordPiece(cleanup=True)
    owner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("the x, the... x").tolist()
    assert tokenizer.decode(ids) == "the x, the... x" == owner.decode(ids)


def test_the_end_of_a_text_is_the_token_that_the_model_has_for_it(tmp_path: Path) -> None:
    ends = {}
    for shape, make in SHAPES.items():
        make().save(str(tmp_path / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path).with_end_of_text()
        assert tokenizer.eot_id is not None
        ends[shape] = tokenizer.decode_bytes([tokenizer.eot_id]).decode()
        assert tokenizer.token_bytes()[tokenizer.eot_id] == 0
    assert ends == {
        **dict.fromkeys(("llama3", "gpt4o", "qwen", "starcoder"), "<|end_of_text|>"),
        "llama2": "</s>",
        "unigram": "</s>",
        "wordpiece": "[SEP]",
    }


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_of_sentencepiece_gives_its_ids(kind: str, byte_fallback: bool, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(CORPUS).splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=400,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        minloglevel=5,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    owner = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.eot_id == owner.eos_id()
    (tmp_path / "tokenizer.json").write_text(tokenizer.with_end_of_text().to_json())
    for loaded in (tokenizer, load_tokenizer(tmp_path)):
        for seed in range(100):
            text = nonsense(seed, 40) + random.Random(seed).choice(LITERALS)
            ids = loaded.encode(text).tolist()
            assert ids == owner.encode(text)
            if byte_fallback:
                assert loaded.decode(ids) == owner.decode(ids)


def test_an_empty_model_of_sentencepiece_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "t.model").touch()
    with pytest.raises(DataError, match=r"t\.model: it has no tokens$"):
        load_tokenizer(tmp_path / "t.model")


def test_without_the_package_a_model_of_sentencepiece_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "t.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"t\.model: it needs the package sentencepiece: pip install sentencepiece"):
        load_tokenizer(tmp_path / "t.model")


@pytest.mark.parametrize("pattern", ["gpt4", "gpt4o"])
def test_a_tiktoken_file_with_its_pattern_gives_the_ids_of_tiktoken(pattern: str, tmp_path: Path) -> None:
    learned = train_bpe(CORPUS, 500, PATTERNS[pattern])
    ranks = {learned.decode_bytes([id_]): id_ for id_ in range(learned.vocab_size)}
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (tmp_path / "own.tiktoken").write_bytes(b"".join(lines))
    tokenizer = load_tokenizer(tmp_path / "own.tiktoken", pattern)
    owner = tiktoken.Encoding("own", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    assert (list(tokenizer.notes), tokenizer.eot_id) == ([], learned.vocab_size)
    for seed in range(100):
        text = nonsense(seed, 50)
        assert tokenizer.encode(text).tolist() == owner.encode_ordinary(text)
        tokenizer.check(text)
    with pytest.raises(DataError, match=r"spans several words of the pattern gpt2: .* --bpe-pattern gpt2\|gpt4"):
        load_tokenizer(tmp_path / "own.tiktoken")


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "llama3"])
def test_every_character_is_of_one_kind_for_tiktoken_and_hugging_face(pattern: str) -> None:
    tokenizer = train_bpe(CORPUS, 400, PATTERNS[pattern])
    characters = [chr(code) for code in (*range(0x80, 0xD800), *range(0xE000, 0x32000, 3))]
    text = "".join(f"a{character}a1{character}1!{character}'{character} {character}\n" for character in characters[::7])
    tokenizer.check(text)


def prepared(tmp_path: Path, *arguments: object) -> shards.Dataset:
    """Prepare a dataset with `python -m distgpt.prepare` in this process."""
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as changed:
        command = ["prepare", *map(str, arguments), "--output", str(output), "--workers", "1"]
        changed.setattr("sys.argv", command)
        main()
    dataset = shards.open_dataset(output)
    shards.verify_dataset(dataset, always=True)
    return dataset


def test_a_large_vocabulary_makes_uint32_files_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(SHAPES["llama3"]().to_str())
    content["model"]["vocab"] = {token: id_ + 66_000 for token, id_ in content["model"]["vocab"].items()}
    content["added_tokens"] = []
    (tmp_path / "large.json").write_text(json.dumps(content))
    documents = [nonsense(seed, 300) for seed in range(10)]
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", tmp_path / "large.json")
    dataset = prepared(tmp_path, *arguments, "--val-fraction", "0.3")
    assert "ids takes 4 bytes a token: the .bin files are uint32" in capsys.readouterr().err
    assert dataset.meta["dtype"] == "uint32"
    tokenizer = load_tokenizer(dataset.path)
    found = [text for split in (dataset.train, dataset.val) for text in texts_of(split, tokenizer)]
    assert sorted(found) == sorted(documents)
    assert dataset.train.shards[0].dtype == np.uint32
    assert dataset.train.shards[0].min() >= 66_000
    assert not (dataset.path / "train.bin").exists(), "nanoGPT reads uint16"


def texts_of(split: shards.Split, tokenizer: Tokenizer) -> list[str]:
    tokens = split.shards[0]
    ends = np.flatnonzero(tokens == tokenizer.eot_id)
    return [tokenizer.decode(document[document != tokenizer.eot_id]) for document in np.split(tokens, ends + 1)[:-1]]


def test_a_text_longer_than_a_piece_is_refused_where_its_parts_have_other_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SHAPES["llama2"]().save(str(tmp_path / "tokenizer.json"))
    text = "some words\nand more\n" * (9 * 2**20 // 20)
    (tmp_path / "in.txt").write_text(text)
    with pytest.raises(DataError, match=r"in\.txt is a text of more than 8 MiB, .* --document-separator"):
        prepared(tmp_path, "--input", tmp_path / "in.txt", "--tokenizer", tmp_path / "tokenizer.json")


def test_a_vocabulary_is_learned_with_the_pattern_asked_for(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CORPUS))
    bpe = ("--tokenizer", "bpe", "--vocab-size", 400)
    dataset = prepared(tmp_path, "--input", tmp_path / "in.jsonl", *bpe, "--bpe-pattern", "llama3")
    assert dataset.meta["options"]["bpe_pattern"] == "llama3"
    tokenizer = load_tokenizer(dataset.path)
    assert isinstance(tokenizer, BpeTokenizer)
    assert tokenizer.pattern == PATTERNS["gpt4"]
    assert tokenizer.vocab_size == 400
    with pytest.raises(UsageError, match=r"--bpe-pattern belongs to --tokenizer bpe or a \.tiktoken file"):
        parse(["--tokenizer", "char", "--bpe-pattern", "gpt4"])
