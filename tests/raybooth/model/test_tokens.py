"""Words become tokens the same way whoever else counts or cuts tokens at that moment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from raybooth import pocket
from raybooth.model.families.clip import clip_tokens, load_clip_tokenizer
from raybooth.model.tokens import cut_tokens

LONG = "a photo of " + "robot " * 100


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_clip_tokenizer(Path(pocket.path()) / "tokenizer")


@pytest.mark.parametrize("prompts", [["", "a photo of sks robot"], ["robot", LONG], [LONG]])
def test_padding_and_cutting_are_the_tokenizers_own(tokenizer: Any, prompts: list[str]) -> None:
    ids_NT, mask_NT = clip_tokens(tokenizer, prompts)
    other = load_clip_tokenizer(Path(pocket.path()) / "tokenizer")
    expected = other(
        prompts,
        padding="max_length",
        max_length=other.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    assert torch.equal(ids_NT, expected.input_ids)
    assert torch.equal(mask_NT, expected.attention_mask)


def test_a_thread_that_counts_tokens_does_not_disturb_one_that_encodes(tokenizer: Any) -> None:
    stop = threading.Event()
    cuts: list[list[str]] = []

    def count() -> None:
        while not stop.is_set():
            cuts.append(cut_tokens(tokenizer, "a photo of sks robot"))

    counting = threading.Thread(target=count)
    counting.start()
    try:
        shapes = {tuple(clip_tokens(tokenizer, ["a robot"])[0].shape) for _ in range(2000)}
    finally:
        stop.set()
        counting.join()
    assert shapes == {(1, tokenizer.model_max_length)}
    assert cuts
    assert not any(cuts)
