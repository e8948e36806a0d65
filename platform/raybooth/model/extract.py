"""B A = the rank R matrix nearest to W_tuned - W_base, site by site (Eckart and Young 1936).

Everything is computed in fp64 and measured on the fp32 pairs that are saved.

Shapes: R rank, O outputs, M inputs (of a convolution: inputs x kernel), K the lesser of both and L
the greater, T timesteps, N prompts, C H W latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from raybooth.config.adapter import Targets
from raybooth.errors import BaseModelError, InputError
from raybooth.model.bank import Bank
from raybooth.model.base import Base, encode_prompts, predict
from raybooth.model.full_weights import trained_parts
from raybooth.model.lora import (
    CLASSIC,
    DENOISER,
    AdapterTensors,
    LoraPair,
    Site,
    find_sites,
    find_text_sites,
)
from raybooth.model.text_adapter import TextAdapter

NUM_TIMESTEPS = 4
"""Places, evenly spread, at which outputs are compared."""

TINY = 1e-30
"""Keeps an empty direction from being divided by zero."""

Weights = Mapping[str, Mapping[str, Tensor]]
"""By part of the base, by the module's own names."""


@dataclass(frozen=True, eq=False)
class Extraction:
    """An adapter, scale 1, and how much of the change it holds; energies are squared norms."""

    tensors: AdapterTensors
    rank: int
    site_errors: Mapping[str, float]
    """|| W_tuned - W_base - B A || / || W_tuned - W_base || of each site that moved."""

    lost: float
    """Energy in the sites that the adapter lacks."""

    inside: float
    """Energy of the change in the sites."""

    outside: float
    """Energy of the change in every other parameter of the tuned parts."""

    @property
    def sites_error(self) -> float:
        """Relative error over all sites."""
        return sqrt(self.lost / self.inside)

    @property
    def total_error(self) -> float:
        """Relative error over every parameter."""
        return sqrt((self.lost + self.outside) / (self.inside + self.outside))

    @property
    def outside_share(self) -> float:
        """Part of the whole energy that no site has."""
        return self.outside / (self.inside + self.outside)


@torch.no_grad()
def extract(
    base: Base, tuned: Weights, *, targets: Targets, rank: int, energy: float | None = None
) -> Extraction:
    """The adapter of `rank` on the sites that `targets` names in the tuned parts.

    With `energy`, the least rank up to `rank` that keeps this share of the sites' energy. Raises
    InputError where nothing moved or `rank` keeps less, BaseModelError for numbers not finite.
    """
    sites = _sites(base, tuned, targets)
    inside, outside = _energies(base, tuned, sites)
    if inside + outside == 0.0:
        raise InputError("there is nothing to extract", "every weight is the base's own")
    if inside == 0.0:
        found, do = "all of the change lies elsewhere", "extract with --targets all"
        raise InputError(f"the targets {targets} did not move", found, do)
    pairs: AdapterTensors = {}
    kept_R = torch.zeros(rank, dtype=torch.float64)
    for key, delta_OM, site in _deltas(base, tuned, sites):
        pairs[key], energy_R = _nearest(delta_OM, site, rank)
        kept_R[: len(energy_R)] += energy_R
    if energy is not None:
        rank = _least_rank(kept_R.cumsum(0) / inside, energy)
        pairs = {key: LoraPair(p.down[:rank], p.up[:, :rank]) for key, p in pairs.items()}
    errors, lost = {}, 0.0
    for key, delta_OM, _ in _deltas(base, tuned, sites):
        product_OM = _matrix(pairs[key].up) @ _matrix(pairs[key].down)
        left = float((delta_OM.cpu() - product_OM).square().sum())
        errors[key] = sqrt(left / float(delta_OM.square().sum()))
        lost += left
    return Extraction(pairs, rank, errors, lost, inside, outside)


@torch.no_grad()
def fixed_outputs(
    base: Base, prompts: Sequence[str], bank: Bank | None = None, text: TextAdapter | None = None
) -> Tensor:
    """[T, N, C, H, W] of the denoiser (through slot 1 of `bank`) at noise of fixed seeds, fp32."""
    if bank is not None:
        bank.route(torch.tensor([1]))
    side = base.native_resolution
    sizes = base.family.size_conditioning((side, side), (0, 0), (side, side))
    edge = side // base.vae_scale_factor
    outputs = []
    for timestep in fixed_timesteps(base):
        for place, prompt in enumerate(prompts):
            own = encode_prompts(base, [prompt]) if text is None else text.encode(prompt)
            conditioning = {n: t.to(base.device) for n, t in {**own, **sizes}.items()}
            generator = torch.Generator().manual_seed(1000 * timestep + place)
            noise = torch.randn((1, base.latent_channels, edge, edge), generator=generator)
            timestep_B = torch.tensor([float(timestep)], device=base.device)
            out = predict(base, noise.to(base.device), timestep_B, conditioning)
            outputs.append(out[0].float().cpu())
    return torch.stack(outputs).reshape(NUM_TIMESTEPS, len(prompts), *outputs[0].shape)


def fixed_timesteps(base: Base) -> list[int]:
    """The middles of NUM_TIMESTEPS equal parts of the noise schedule."""
    total = base.num_train_timesteps
    return [(2 * place + 1) * total // (2 * NUM_TIMESTEPS) for place in range(NUM_TIMESTEPS)]


def _sites(base: Base, tuned: Weights, targets: Targets) -> tuple[Site, ...]:
    sites = find_sites(base.denoiser, targets) if DENOISER in tuned else ()
    encoders = {part: one for part, one in base.text_encoders.items() if part in tuned}
    return sites + (find_text_sites(encoders, targets) if encoders else ())


def _energies(base: Base, tuned: Weights, sites: Sequence[Site]) -> tuple[float, float]:
    """Squared change (in the sites, elsewhere)."""
    modules = trained_parts(base, text_encoder=True)
    weights = {(site.part, _weight_name(base, site)) for site in sites}
    inside = outside = 0.0
    for part, state in tuned.items():
        own = modules[part].state_dict()
        for name, value in state.items():
            if not value.is_floating_point():
                continue
            change = float((value.double() - own[name].cpu().double()).square().sum())
            if change != change or change == float("inf"):
                do = "train the subject again"
                raise BaseModelError("the weights are no numbers", f"{part}: {name}", do)
            if (part, name) in weights:
                inside += change
            else:
                outside += change
    return inside, outside


def _deltas(
    base: Base, tuned: Weights, sites: Sequence[Site]
) -> Iterator[tuple[str, Tensor, Site]]:
    """(key, change [O, M] on the base's device, site) of every site that moved."""
    modules = trained_parts(base, text_encoder=True)
    for site in sites:
        name = _weight_name(base, site)
        own = modules[site.part].get_parameter(name).detach().double()
        delta = tuned[site.part][name].to(base.device).double() - own
        if bool(delta.any()):
            yield site.key, delta.flatten(1), site


def _nearest(delta_OM: Tensor, site: Site, rank: int) -> tuple[LoraPair, Tensor]:
    """The pair of the greatest singular values, sqrt of each on both sides; their energies [R].

    The singular vectors of the shorter side are eigenvectors of its Gram matrix: many times faster
    than an SVD, and in fp64 as good for all that is above 1e-8 of the greatest singular value.
    """
    wide = delta_OM.shape[0] <= delta_OM.shape[1]
    short_KL = delta_OM if wide else delta_OM.T
    vectors_KK = torch.linalg.eigh(short_KL @ short_KL.T).eigenvectors
    side_KR = vectors_KK[:, -rank:].flip(1)
    other_RL = side_KR.T @ short_KL
    s_R = other_RL.norm(dim=1)
    root_R = s_R.sqrt().clamp_min(TINY)
    halves = side_KR * root_R, other_RL / root_R[:, None]
    up, down = halves if wide else (halves[1].T, halves[0].T)
    kept = len(s_R)
    pair = LoraPair(
        down.float().cpu().reshape(site.down_shape(kept)).contiguous(),
        up.float().cpu().reshape(site.up_shape(kept)).contiguous(),
    )
    return pair, s_R.square().cpu()


def _least_rank(share_R: Tensor, energy: float) -> int:
    enough = (share_R >= energy).nonzero()
    if len(enough) == 0:
        found = f"{float(share_R[-1]):.4f}"
        do = "raise --rank or ask for less"
        raise InputError(f"rank {len(share_R)} keeps less energy than {energy}", found, do)
    return int(enough[0]) + 1


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.double().flatten(1)


def _weight_name(base: Base, site: Site) -> str:
    """The site's weight by the module's own names."""
    name = site.name
    if site.part != DENOISER and not hasattr(base.text_encoders[site.part], "text_model"):
        name = name.removeprefix(CLASSIC)
    return f"{name}.weight"
