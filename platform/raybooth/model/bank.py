"""Many adapters over ONE frozen base: S rows of numbers, one for each slot, views of them in use.

Shapes: S slots, P numbers of a slot (padded), B batch rows, N learned tokens, D token width,
R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raybooth.errors import BaseModelError
from raybooth.model.lora import DENOISER, AdapterTensors, LoraPair, Site, TokenSite, init_pair
from raybooth.model.part import BankPart, Routing, SlotStamps

BLOCK = 256
"""P is a multiple of this: one 8-bit optimiser block never spans two slots."""


class Bank:
    """S adapters stacked over a frozen base; slot 0 is the null adapter, always zeros.

    `flat_SP` [S + 1, P] is the one master tensor and the one autograd leaf; sites and learned
    tokens are views of it, the denoiser's first. `scale_S` [S + 1] holds each slot's alpha / rank.
    `route` names the slot of every batch row; it holds for all following calls of the denoiser.
    Text encoders have adapters only inside `text_routed`. Change `flat_SP` in place by its own
    operations, not through `.data` (after a forward with gradients any way is seen).
    """

    def __init__(
        self,
        denoiser: nn.Module | None,
        *,
        sites: Sequence[Site],
        rank: int,
        num_slots: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        text_encoders: Mapping[str, nn.Module] | None = None,
        token_sites: Sequence[TokenSite] = (),
    ) -> None:
        """Sites and tokens by part; text encoders by the names that their sites carry."""
        self.rank = rank
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.parts: dict[str, BankPart] = {}
        modules = {} if denoiser is None else {DENOISER: denoiser}
        stop = 0
        for name, module in {**modules, **(text_encoders or {})}.items():
            own = [site for site in sites if site.part == name]
            tokens = next((site for site in token_sites if site.part == name), None)
            if own or tokens:
                self.parts[name] = BankPart(module, own, tokens, rank, stop)
                stop = self.parts[name].stop
        self.sites = tuple(site for part in self.parts.values() for site in part.sites)
        assert len(self.sites) == len(sites), "a site names a part that the bank lacks"
        self.num_parameters = stop
        self.slot_size = -(-stop // BLOCK) * BLOCK
        self.flat_SP = torch.zeros(num_slots + 1, self.slot_size, device=self.device, dtype=dtype)
        self.scale_S = torch.ones(num_slots + 1, dtype=torch.float64)
        self._rank_S = [rank] * (num_slots + 1)
        self._place = {site.key: place for place, site in enumerate(self.sites)}
        self._stamps = SlotStamps(self.flat_SP)
        for part in self.parts.values():
            part.bind(self.flat_SP, self.scale_S, self._stamps)

    @property
    def text_start(self) -> int:
        """Where in a row the denoiser's numbers end and the text encoders' begin."""
        return self.parts[DENOISER].stop if DENOISER in self.parts else 0

    # Slots -------------------------------------------------------------------------------------

    def init(
        self,
        slot: int,
        rank: int,
        scale: float,
        generator: torch.Generator,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A fresh adapter of `rank` in `slot`: A normal from `generator`, site by site, B zero.

        `learned` are its first tokens [N, D], by text encoder.
        """
        tensors = {site.key: init_pair(site, rank, generator) for site in self.sites}
        self.write(slot, tensors, scale, learned)

    @torch.no_grad()
    def write(
        self,
        slot: int,
        tensors: AdapterTensors,
        scale: float = 1.0,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Put an adapter into `slot`; sites that it lacks are zero, a lower rank is zero-padded.

        `learned` has the tokens [N, D] of each text encoder. Raises BaseModelError for a site
        that the bank lacks, a foreign shape, or a higher rank.
        """
        rank = max((pair.rank for pair in tensors.values()), default=self.rank)
        self.write_flat(slot, self.flatten(tensors, learned), scale, rank)

    @torch.no_grad()
    def write_flat(
        self, slot: int, flat_P: Tensor, scale: float = 1.0, rank: int | None = None
    ) -> None:
        """Put what `flatten` made into `slot`: one copy, asynchronous from pinned memory."""
        self._check_slot(slot)
        with self._stamps.writing(slot):
            self.flat_SP[slot].copy_(flat_P, non_blocking=True)
        self.scale_S[slot] = scale
        self._rank_S[slot] = self.rank if rank is None else rank

    @torch.no_grad()
    def read(self, slot: int) -> AdapterTensors:
        """Copies of a slot's pairs at the slot's own rank (`scale_S[slot]` is not folded in)."""
        tensors = self.unflatten(self.flat_SP[slot].detach(), self._rank_S[slot])
        return {name: LoraPair(p.down.clone(), p.up.clone()) for name, p in tensors.items()}

    @torch.no_grad()
    def read_tokens(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's learned tokens [N, D], by text encoder."""
        tokens = self.unflatten_tokens(self.flat_SP[slot].detach())
        return {part: tokens_ND.clone() for part, tokens_ND in tokens.items()}

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Make `slot` a null adapter again."""
        self._check_slot(slot)
        with self._stamps.writing(slot):
            self.flat_SP[slot].zero_()
        self.scale_S[slot] = 1.0
        self._rank_S[slot] = self.rank

    def slot_rank(self, slot: int) -> int:
        """The rank of the adapter in `slot`, at most the bank's."""
        return self._rank_S[slot]

    def flatten(
        self,
        tensors: AdapterTensors,
        learned: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """[P] in the master's dtype, on its device or on `device`: one slot's row of `flat_SP`."""
        flat_P = self.flat_SP.new_zeros(self.slot_size, device=device)
        if foreign := sorted(tensors.keys() - self._place.keys()):
            found = f"{foreign[0]}{f' and {len(foreign) - 1} more' if len(foreign) > 1 else ''}"
            do = "load it over the base and the targets that it was trained with"
            raise BaseModelError("the adapter has sites that this bank lacks", found, do)
        views = self._views(flat_P)
        for name, pair in tensors.items():
            site = self.sites[self._place[name]]
            self._check_pair(site, pair)
            down, up = views[self._place[name]]
            down[: pair.rank].copy_(_taps_first(site, pair.down))
            up[:, : pair.rank].copy_(pair.up.reshape(site.out_features, pair.rank))
        for part, view_ND in self.unflatten_tokens(flat_P).items():
            if learned is not None:
                view_ND.copy_(learned[part])
        return flat_P

    def unflatten(self, flat_P: Tensor, rank: int) -> AdapterTensors:
        """The pairs of one row of `flat_SP` cropped to `rank`."""
        tensors: AdapterTensors = {}
        for site, (down, up) in zip(self.sites, self._views(flat_P), strict=True):
            pair_down = _taps_last(site, down[:rank])
            tensors[site.key] = LoraPair(pair_down, up[:, :rank].reshape(site.up_shape(rank)))
        return tensors

    def unflatten_tokens(self, flat_P: Tensor) -> dict[str, Tensor]:
        """The learned tokens [N, D] of one row of `flat_SP`, by text encoder."""
        parts = self.parts.items()
        return {name: part.token_view(flat_P) for name, part in parts if part.tokens is not None}

    # Routing -----------------------------------------------------------------------------------

    def route(self, slot_B: Tensor, scale_B: Tensor | None = None, rows_each: int = 1) -> None:
        """Send row b of the following denoiser calls through `slot_B[b]`, times `scale_B[b]`.

        Each entry stands for `rows_each` neighbouring rows. With gradients, equal contiguous
        groups of rows run as one product a slot; without, adapters are gathered here, each row
        that changed since the last call.
        A backward pass must be over before the next `route`.
        """
        part = self.parts[DENOISER]
        part.routing = self._routing(slot_B, scale_B, rows_each)
        if not torch.is_grad_enabled():
            part.prepare()

    @contextmanager
    def text_routed(self, slot_B: Tensor, scale_B: Tensor | None = None) -> Iterator[None]:
        """Inside, row b of a text encoder's call goes through `slot_B[b]`; outside, none does."""
        routing = self._routing(slot_B, scale_B, 1)
        parts = [part for name, part in self.parts.items() if name != DENOISER]
        try:
            for part in parts:
                part.routing = routing
            yield
        finally:
            for part in parts:
                part.routing = None
                part.prepare()

    def attach(self) -> None:
        """Add the hooks (a new bank has them)."""
        for part in self.parts.values():
            part.attach()

    def detach(self) -> None:
        """Remove the hooks: denoiser and text encoders are the bare base again."""
        for part in self.parts.values():
            part.detach()

    def _routing(self, slot_B: Tensor, scale_B: Tensor | None, rows_each: int) -> Routing:
        slots = tuple(int(slot) for slot in slot_B.tolist())
        for slot in slots:
            if not 0 <= slot <= self.num_slots:
                raise IndexError(f"slot {slot} is not in 0..{self.num_slots}")
        scales = (1.0,) * len(slots) if scale_B is None else tuple(scale_B.double().tolist())
        assert len(scales) == len(slots)
        return Routing(slots, scales, rows_each)

    def _views(self, flat_P: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each site, views [R, taps, I] and [O, R] of one row."""
        return [views for part in self.parts.values() for views in part.views(flat_P)]

    def _check_slot(self, slot: int) -> None:
        if not 1 <= slot <= self.num_slots:
            raise IndexError(f"slot {slot} cannot be written; it is not in 1..{self.num_slots}")

    def _check_pair(self, site: Site, pair: LoraPair) -> None:
        rank = pair.rank
        shapes = tuple(pair.down.shape), tuple(pair.up.shape)
        if shapes != (site.down_shape(rank), site.up_shape(rank)):
            do = "load it over the base that it was trained with"
            what = f"the adapter's tensors do not fit {site.key} of this base"
            raise BaseModelError(what, f"shapes {shapes[0]} and {shapes[1]}", do)
        if rank > self.rank:
            what = f"the adapter's rank is above the bank's ({self.rank})"
            raise BaseModelError(what, f"rank {rank}", "raise the bank's rank (`max_rank`)")


def _taps_first(site: Site, down: Tensor) -> Tensor:
    """[R, taps, I] of a pair's A, the kernel flipped."""
    if site.kind == "linear":
        return down.unsqueeze(1)
    return down.flip(-1, -2).permute(0, 2, 3, 1).reshape(down.shape[0], -1, site.in_features)


def _taps_last(site: Site, down_RXI: Tensor) -> Tensor:
    """A as PEFT shapes it, of a row's [R, taps, I]."""
    if site.kind == "linear":
        return down_RXI.squeeze(1)
    rank = down_RXI.shape[0]
    taps = down_RXI.reshape(rank, *site.kernel, site.in_features)
    return taps.permute(0, 3, 1, 2).flip(-1, -2)
