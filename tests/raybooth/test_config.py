"""Configs are frozen, complete, and refuse what has no effect."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from raybooth.config import FleetConfig, TrainConfig, merge, parse_config
from raybooth.config.adapter import matches_target
from raybooth.errors import InputProblems

FULL = {"method": "full", "optimizer": {"learning_rate": 5e-6}}


def test_configs_are_frozen_and_refuse_unknown_keys() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError):
        config.resolution = 64  # type: ignore[misc]
    with pytest.raises(InputProblems, match="learning_rate is not a known key"):
        parse_config(TrainConfig, {"learning_rate": 1e-4}, "x.yaml")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"crops_per_image": 2}, "no effect"),
        ({"optimizer": {"warmup_steps": 800}}, "warm up for fewer"),
        ({"prior": {"num_images": 0}}, "loss_weight"),
        ({"prior": {"loss_weight": 0}}, "num_images"),
        ({"prior": {"kind": "base_prediction", "num_images": 9}}, "set it to 0"),
        ({"prior": {"kind": "base_prediction", "loss_weight": 0}}, "loss_weight above 0"),
        ({"prior": {"kind": "base_prediction", "solver": "euler"}}, "solver has no effect"),
        ({"objective": {"velocity_weight": "plus_one"}}, "without snr_gamma"),
        ({"photos": {"background_weight": 0.1}}, "without masks"),
        (FULL | {"prior": {"kind": "base_prediction"}}, "needs method: lora"),
        ({"adapter": {"identifier_init": "cat"}}, "identifier_init has no effect"),
        ({"adapter": {"text_learning_rate": 1e-5}}, "text_learning_rate has no effect"),
        ({"instance_prompt": "a {colour} dog"}, "identifier"),
        ({"resolution": 100}, "multiple of 8"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"num_train_steps": "many"}, "num_train_steps"),
        ({"full": {"text_encoder": True}}, "full has no effect with method: lora"),
        (FULL | {"adapter": {"rank": 8}}, "adapter has no effect with method: full"),
        (FULL | {"pack": {"max_subjects": 2}}, "one subject a run"),
        (FULL | {"precision": "fp16"}, "fp32 or bf16"),
        (FULL | {"optimizer": {}}, "needs optimizer.learning_rate"),
        (FULL | {"full": {"num_workers": 2, "gradient_accumulation": 2}}, "2 rows, too few"),
        (FULL | {"full": {"offload": "optimizer"}}, "needs zero_stage 1"),
        (FULL | {"full": {"offload": "all", "zero_stage": 2}}, "needs zero_stage 3"),
    ],
)
def test_each_impossible_value_is_named(values: dict[str, object], expected: str) -> None:
    with pytest.raises(InputProblems, match=expected):
        parse_config(TrainConfig, values, "x.yaml")


def test_a_star_stands_for_any_part_of_a_layers_name() -> None:
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    for pattern in ("to_k", "attn2.to_k", "attn2.*", "up_blocks.*.to_k", "up_blocks.[12].*"):
        assert matches_target(name, pattern), pattern
    for pattern in ("o_k", "attn1.*", "down_blocks.*", "attn2"):
        assert not matches_target(name, pattern), pattern


def test_merging_replaces_leaves_only() -> None:
    below = {"a": {"b": 1, "c": 2}, "d": [1, 2]}
    assert merge(below, {"a": {"c": 3}, "d": [9]}) == {"a": {"b": 1, "c": 3}, "d": [9]}
    assert below == {"a": {"b": 1, "c": 2}, "d": [1, 2]}


def test_a_fleet_needs_subjects() -> None:
    with pytest.raises(InputProblems, match="subjects is missing"):
        parse_config(FleetConfig, {}, "fleet.yaml")


def test_base_prediction_comes_back_from_its_own_dump() -> None:
    config = TrainConfig.model_validate({"prior": {"kind": "base_prediction"}})
    assert config.prior.num_images == 0
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_full_config_comes_back_from_its_own_dump() -> None:
    config = TrainConfig.model_validate(FULL | {"batch_size": 2, "full": {"num_workers": 2}})
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
