"""The pocket tokenizer: CLIP's byte-level BPE; every listed word is one token, any text encodes."""

import json
import os
from collections import Counter, defaultdict
from importlib import resources
from itertools import pairwise
from pathlib import Path

from raybooth.pocket import world

LENGTH = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


def known_words() -> list[str]:
    """Every word that is one token: the world's, the rare ones, and `words.txt`; sorted."""
    listed = (
        resources.files("raybooth.pocket").joinpath("words.txt").read_text(encoding="utf-8").split()
    )
    return sorted({*listed, *world.vocabulary()})


def write_tokenizer(folder: Path) -> int:
    """Writes vocab.json, merges.txt and configs for `CLIPTokenizer`; returns the token count."""
    merges = _merges(known_words())
    alphabet = _byte_alphabet()
    vocabulary = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    vocabulary += list(dict.fromkeys(left + right for left, right in merges))
    vocabulary += [_START, _END]
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    _write(
        folder / "vocab.json",
        json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False),
    )
    _write(
        folder / "merges.txt",
        "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges)]) + "\n",
    )
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    settings = {
        **special,
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
    }
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    return len(vocabulary)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that rebuild each word: replayed in order, a listed word ends as one token.

    The most frequent pair goes first, ties by spelling, so the same words give the same merges.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    held: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for i, symbols in enumerate(spelled):
        for pair in pairwise(symbols):
            held[pair][i] += 1
    totals = Counter({pair: words_of.total() for pair, words_of in held.items()})
    merges = []
    while totals:
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        merges.append(best)
        for i in sorted(held[best]):
            before, spelled[i] = spelled[i], _merged(spelled[i], best)
            _count(held, totals, before, i, -1)
            _count(held, totals, spelled[i], i, 1)
    return merges


def _count(
    held: dict[tuple[str, str], Counter[int]],
    totals: Counter[tuple[str, str]],
    symbols: list[str],
    i: int,
    sign: int,
) -> None:
    for pair in pairwise(symbols):
        held[pair][i] += sign
        totals[pair] += sign
        if held[pair][i] == 0:
            del held[pair][i]
        if totals[pair] == 0:
            del totals[pair]


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _byte_alphabet() -> list[str]:
    """One printable character for each of the 256 bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [*(chr(byte) for byte in printable), *(chr(256 + i) for i in range(len(rest)))]


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
