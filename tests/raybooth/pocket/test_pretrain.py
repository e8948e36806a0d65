"""Pretraining in miniature: it runs, resumes bit for bit after a kill in any stage, and exports."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raybooth.errors import InputError
from raybooth.pocket.corpus import CorpusConfig
from raybooth.pocket.denoiser import DenoiserConfig
from raybooth.pocket.export import load_base
from raybooth.pocket.loop import Loop, LoopConfig
from raybooth.pocket.pretrain import PretrainConfig, pretrain
from raybooth.pocket.vae import VaeConfig

WEIGHTS = ("vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model")


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    def loop(steps: int) -> LoopConfig:
        return LoopConfig(steps, steps // 2, warmup_steps=2, save_every_s=0.0)

    vae = VaeConfig((8, 16, 16), groups=4, batch=4, loop=loop(4))
    return PretrainConfig(
        corpus=CorpusConfig(pictures=40, clutter=8, workers=1),
        vae=replace(vae, clutter_share=0.25),
        denoiser=DenoiserConfig(
            (16, 32),
            heads=2,
            groups=8,
            text_width=32,
            text_layers=1,
            batch=4,
            loop=loop(5),
        ),
    )


@pytest.fixture(scope="module")
def whole(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pretrain(config, folder / "base", folder / "work", resume=False)
    return folder


def weights(base: Path) -> list[bytes]:
    return [(base / f"{name}.safetensors").read_bytes() for name in WEIGHTS]


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """killed_at(n): the n-th train step from now on dies before it changes anything."""
    update = Loop.update

    def arm(n: int) -> None:
        steps = iter(range(n))

        def dying(self: Loop, *args: Any) -> None:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            update(self, *args)

        monkeypatch.setattr(Loop, "update", dying)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("step", [2, 4, 7])
def test_resumed_equals_uninterrupted(
    step: int, config: PretrainConfig, whole: Path, tmp_path: Path, killed_at: Any
) -> None:
    killed_at(step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "base", tmp_path / "work", resume=False)
    assert not (tmp_path / "base").exists()
    killed_at(1000)
    pretrain(config, tmp_path / "base", tmp_path / "work", resume=True)
    assert weights(tmp_path / "base") == weights(whole / "base")


def test_two_processes_give_what_one_gives(
    config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    pretrain(replace(config, processes=2), tmp_path / "base", tmp_path / "work", resume=False)
    assert weights(tmp_path / "base") == weights(whole / "base")


def test_shares_must_divide_among_processes(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 shares, 3 processes"):
        pretrain(replace(config, processes=3), tmp_path / "base", tmp_path / "work", resume=False)
    assert not (tmp_path / "work").exists()


def test_the_exported_base_samples_and_says_how_it_came_to_be(
    config: PretrainConfig, whole: Path
) -> None:
    pipeline = load_base(whole / "base")
    picture = pipeline("a red robot", num_inference_steps=1, height=64, width=64).images[0]
    assert picture.size == (64, 64)
    record = json.loads((whole / "base" / "record.json").read_text())
    assert record["stages"]["denoiser"]["samples_seen"] == 5 * 4
    assert set(record["stages"]) == {"vae", "denoiser"}
    assert record["config"]["corpus"]["pictures"] == 40
    assert record["versions"]["torch"]


def test_it_goes_on_from_given_weights(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    further = replace(config, init=whole / "base")
    record = pretrain(further, tmp_path / "base", tmp_path / "work", resume=False)
    assert "vae" not in record["stages"]
    given, trained = weights(whole / "base"), weights(tmp_path / "base")
    same = [one == other for one, other in zip(given, trained, strict=True)]
    assert same == [True, False, False], "the VAE stays: latents made before remain true"


def test_a_folder_with_state_is_not_overwritten(config: PretrainConfig, whole: Path) -> None:
    with pytest.raises(InputError, match="resume"):
        pretrain(config, whole / "base", whole / "work", resume=False)


def test_state_of_another_seed_is_refused(config: PretrainConfig, whole: Path) -> None:
    with pytest.raises(InputError, match="seed"):
        pretrain(replace(config, seed=1), whole / "base", whole / "work", resume=True)


def test_the_rate_warms_up_holds_and_decays() -> None:
    loop = LoopConfig(steps=100, decay_steps=20, learning_rate=1.0, warmup_steps=10)
    assert loop.rate(0) == pytest.approx(0.1)
    assert loop.rate(9) == loop.rate(50) == loop.rate(80) == 1.0
    assert loop.rate(90) == pytest.approx(0.5)
    assert loop.rate(100) == 0.02
