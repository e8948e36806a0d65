"""The pocket tokenizer: CLIP's own format, one token a word, any text."""

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from raybooth import pocket
from raybooth.pocket import world
from raybooth.pocket.tokenizer import known_words, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pocket.path() / "tokenizer")


def test_known_words_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    split = [word for word in known_words() if len(tokenizer(word).input_ids) != 3]
    assert split == []
    assert len(known_words()) > 1000


def test_rare_words_are_single_tokens_with_ids_of_their_own(tokenizer: CLIPTokenizer) -> None:
    ids = [tokenizer(word).input_ids[1:-1] for word in world.RARE_WORDS]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(world.RARE_WORDS)


@pytest.mark.parametrize(
    "text", ["", "Grüße, 日本 😀!", "x" * 500, "a\tb\nc", "<|endoftext|>", "émigré\u2019s"]
)
def test_any_text_encodes_to_77_positions(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in ids


def test_bytes_survive_the_round_trip(tokenizer: CLIPTokenizer) -> None:
    assert "grüße" in tokenizer.decode(tokenizer("Grüße").input_ids)


def test_writing_it_again_gives_the_shipped_files(tmp_path: Path) -> None:
    tokens = write_tokenizer(tmp_path)
    shipped = pocket.path() / "tokenizer"
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes()
    config = json.loads((pocket.path() / "text_encoder" / "config.json").read_text())
    assert config["vocab_size"] == tokens
