"""Receipts: whole on the way through JSON, silent about prompts where told, comparable."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from raybooth_serving.pictures.receipt import Receipt, hash_prompts
from tests.raybooth_serving.receipts import a_receipt


def test_a_receipt_comes_back_from_its_text() -> None:
    receipt = a_receipt()
    text = receipt.json_text()
    assert text.isascii()
    assert "\n" not in text
    assert Receipt.model_validate_json(text) == receipt


def test_without_prompts_only_their_hash_is_kept() -> None:
    receipt = a_receipt().without_prompts()
    assert "prompt" not in receipt.model_dump(exclude_none=True)
    assert "sks" not in receipt.json_text()
    assert Receipt.model_validate_json(receipt.json_text()) == receipt
    assert receipt.prompts_sha256 == a_receipt().prompts_sha256


def test_the_hash_tells_the_two_prompts_apart() -> None:
    pairs = [("a b", ""), ("a", "b"), ("", "a b"), ("a, b", ""), ("a", " b")]
    assert len({hash_prompts(*pair) for pair in pairs}) == len(pairs)


def test_engines_differ_by_named_parts() -> None:
    engine = a_receipt().engine
    assert engine.differences(engine) == {}
    other = engine.model_copy(update={"torch": "3", "threads": 8})
    assert engine.differences(other) == {"torch": ("2", "3"), "threads": ("1", "8")}


@pytest.mark.parametrize("changes", [{"version": 2}, {"who": "me"}, {"buckets": ((1,),)}])
def test_another_kind_of_receipt_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        a_receipt(**changes)
