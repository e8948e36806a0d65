"""What is of low rank comes out whole; what is not is measured to the last parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import write_tiny_base, write_tiny_sdxl
from torch import Tensor, nn

from raybooth.errors import BaseModelError, InputError
from raybooth.model.base import Base, load_base
from raybooth.model.extract import extract, fixed_outputs
from raybooth.model.full_weights import trained_parts
from raybooth.model.lora import Site, find_sites, find_text_sites, site_module

Tuned = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")))


def weights_of(base: Base) -> Tuned:
    """A copy of every weight that a full run moves."""
    parts = trained_parts(base, text_encoder=True)
    return {
        part: {name: value.clone() for name, value in module.state_dict().items()}
        for part, module in parts.items()
    }


def sites_of(base: Base) -> tuple[Site, ...]:
    return find_sites(base.denoiser, "all") + find_text_sites(base.text_encoders, "all")


def weight(base: Base, tuned: Tuned, site: Site) -> Tensor:
    """The site's tensor in `tuned`, found by the module that it is of."""
    module: nn.Module = trained_parts(base, text_encoder=True)[site.part]
    layer = site_module(module, site)
    name = next(name for name, each in module.named_modules() if each is layer)
    return tuned[site.part][f"{name}.weight"]


def moved(base: Base, rank: int | None, seed: int = 3) -> tuple[Tuned, dict[str, Tensor]]:
    """(weights, change [O, M] by site): every site moved by `rank`, or (None) every parameter."""
    generator = torch.Generator().manual_seed(seed)
    tuned, deltas = weights_of(base), {}
    if rank is None:
        for state in tuned.values():
            for value in state.values():
                if value.is_floating_point():
                    value += 0.02 * torch.randn(value.shape, generator=generator)
    own = weights_of(base)
    for site in sites_of(base):
        value = weight(base, tuned, site)
        if rank is not None:
            outputs, inputs = value.flatten(1).shape
            up = torch.randn(outputs, rank, generator=generator)
            down = torch.randn(rank, inputs, generator=generator)
            value += 0.02 * (up @ down).reshape(value.shape)
        deltas[site.key] = (value.double() - weight(base, own, site).double()).flatten(1)
    return tuned, deltas


@pytest.mark.parametrize("write", [write_tiny_base, write_tiny_sdxl])
def test_a_change_of_low_rank_comes_out_whole(write: object, tmp_path: Path) -> None:
    assert callable(write)
    own = load_base(str(write(tmp_path / "base")))
    tuned, deltas = moved(own, rank=2)
    found = extract(own, tuned, targets="all", rank=3)
    assert found.tensors.keys() == deltas.keys()
    assert {key.split(".")[0] for key in deltas if key.startswith("text")} == set(own.text_encoders)
    for key, (down, up) in found.tensors.items():
        product = up.double().flatten(1) @ down.double().flatten(1)
        assert (product - deltas[key]).norm() < 1e-5 * deltas[key].norm(), key
    assert max(found.site_errors.values()) < 1e-5
    assert found.sites_error < 1e-5
    assert found.outside == 0.0


def test_a_convolution_keeps_its_kernel_and_a_small_site_its_rank(base: Base) -> None:
    found = extract(base, moved(base, rank=None)[0], targets="all", rank=20)
    pair = found.tensors["down_blocks.0.resnets.0.conv1"]
    assert (tuple(pair.down.shape), tuple(pair.up.shape)) == ((16, 16, 3, 3), (16, 16, 1, 1))
    assert max(pair.rank for pair in found.tensors.values()) == 20
    assert found.site_errors["down_blocks.0.resnets.0.conv1"] < 1e-6  # of full rank: nothing lost


def test_a_change_of_full_rank_reports_what_is_lost(base: Base) -> None:
    tuned, deltas = moved(base, rank=None)
    found = extract(base, tuned, targets="all", rank=4)
    lost = 0.0
    for key, delta in deltas.items():
        s = torch.linalg.svdvals(delta)
        assert found.site_errors[key] == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-6)
        lost += float(s[4:].square().sum())
    own = weights_of(base)
    everything = sum(
        float((value.double() - own[part][name].double()).square().sum())
        for part, state in tuned.items()
        for name, value in state.items()
    )
    inside = sum(float(delta.square().sum()) for delta in deltas.values())
    assert found.inside == pytest.approx(inside)
    assert found.outside == pytest.approx(everything - inside)
    assert found.lost == pytest.approx(lost, rel=1e-6)
    assert found.total_error**2 == pytest.approx((lost + everything - inside) / everything)
    assert 0.3 < found.sites_error < found.total_error < 1


def test_energy_chooses_the_least_rank(base: Base) -> None:
    tuned, deltas = moved(base, rank=5)
    whole = sum(float(delta.square().sum()) for delta in deltas.values())
    kept = [extract(base, tuned, targets="all", rank=r) for r in (2, 3)]
    assert [r.rank for r in kept] == [2, 3]
    shares = [1 - r.lost / whole for r in kept]
    between = sum(shares) / 2
    found = extract(base, tuned, targets="all", rank=8, energy=between)
    assert found.rank == 3
    assert found.sites_error == pytest.approx(kept[1].sites_error)
    with pytest.raises(InputError, match="rank 2 keeps less energy than"):
        extract(base, tuned, targets="all", rank=2, energy=between)


def test_only_the_tuned_parts_are_looked_at(base: Base) -> None:
    tuned, _ = moved(base, rank=2)
    found = extract(base, {"unet": tuned["unet"]}, targets="attention", rank=2)
    assert found.tensors.keys() == {site.key for site in find_sites(base.denoiser, "attention")}
    assert found.sites_error < 1e-5
    assert 0.5 < found.outside_share < 1  # feed-forward and convolutions moved too
    assert found.total_error == pytest.approx(found.outside_share**0.5)


def test_what_cannot_be_extracted_is_refused(base: Base) -> None:
    with pytest.raises(InputError, match="every weight is the base's own"):
        extract(base, weights_of(base), targets="all", rank=2)
    tuned = weights_of(base)
    tuned["unet"]["conv_in.bias"] += 1.0
    with pytest.raises(InputError, match="the targets attention did not move"):
        extract(base, tuned, targets="attention", rank=2)
    tuned["unet"]["conv_in.bias"][0] = float("nan")
    with pytest.raises(BaseModelError, match=r"no numbers: found unet: conv_in\.bias"):
        extract(base, tuned, targets="all", rank=2)


def test_outputs_are_of_fixed_noise_and_of_the_prompt(base: Base) -> None:
    once, twice = (fixed_outputs(base, ["a dog", "a cat"]) for _ in range(2))
    assert once.shape == (4, 2, 4, 8, 8)
    assert torch.equal(once, twice)
    assert torch.equal(once[:, :1], fixed_outputs(base, ["a dog"]))
    assert not torch.equal(once[:, 1:], fixed_outputs(base, ["a dog"]))
