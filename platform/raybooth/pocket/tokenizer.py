"""The pocket tokenizer: CLIP's byte-level BPE, grown so that every listed word is one token and any text encodes."""

import json
import os
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from raybooth.pocket import world

LENGTH = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


def known_words() -> list[str]:
    """Every word that is one token: the world's, the rare ones, and `words.txt`; sorted, each once."""
    listed = resources.files("raybooth.pocket").joinpath("words.txt").read_text(encoding="utf-8").split()
    return sorted({*listed, *world.vocabulary()})


def write_tokenizer(folder: Path) -> int:
    """Writes vocab.json, merges.txt and their configs for `CLIPTokenizer`; returns the number of tokens."""
    merges = _merges(known_words())
    alphabet = _byte_alphabet()
    vocabulary = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    vocabulary += list(dict.fromkeys(left + right for left, right in merges))
    vocabulary += [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    _write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges)]) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    settings = {**special, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    return len(vocabulary)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that rebuild each word: replaying them in order on a training word always ends in one token."""
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=[],
        end_of_word_suffix="</w>",
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(words, trainer)
    return [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]


def _byte_alphabet() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [*(chr(byte) for byte in printable), *(chr(256 + i) for i in range(len(rest)))]


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
