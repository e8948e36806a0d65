"""The shipped evaluators judge individuals that they never saw; a seed decides them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from raybooth import pocket
from raybooth.pocket.evaluator_figures import auc, clip_figures, embedder_figures
from raybooth.pocket.evaluators import EvaluatorsConfig, train_evaluators

SHIPPED = pocket.path() / "evaluators"


def test_the_shipped_ones_are_small_and_float16_and_their_record_is_true() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    for part in ("embedder", "clip"):
        weights = load_file(SHIPPED / part / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = json.loads((SHIPPED / "record.json").read_text(encoding="utf-8"))
    assert record["embedder"]["auc"] >= 0.9
    embedder = Dinov2Model.from_pretrained(SHIPPED / "embedder", dtype=torch.float32).eval()
    assert embedder_figures(embedder, 4)["auc"] == pytest.approx(
        record["embedder"]["auc"], abs=0.02
    )
    clip = CLIPModel.from_pretrained(SHIPPED / "clip", dtype=torch.float32).eval()
    found = clip_figures(clip, CLIPTokenizer.from_pretrained(SHIPPED / "clip"), 120)
    for name, value in found.items():
        assert value == pytest.approx(record["clip"][name], abs=0.05)


def test_auc_counts_pairs_and_halves_ties() -> None:
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0])) == 1
    assert auc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auc(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0])) == 0.5


def test_training_is_a_function_of_its_config(tmp_path: Path) -> None:
    config = EvaluatorsConfig(
        pictures=32, batch=8, embedder_steps=3, clip_steps=3, width=64, layers=1
    )
    for name in ("one", "two"):
        train_evaluators(config, tmp_path / "work", tmp_path / name)
    for part in ("embedder", "clip"):
        one = load_file(tmp_path / "one" / part / "model.safetensors")
        two = load_file(tmp_path / "two" / part / "model.safetensors")
        assert all(torch.equal(one[key], two[key]) for key in one)
