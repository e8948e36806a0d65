"""y_b = W x_b + s_b B_slot(b) A_slot(b) x_b: many adapters over ONE frozen denoiser, row by row.

Shapes: S slots, P numbers of a slot (padded), B batch rows, K groups of n rows each (B = K n),
T tokens, I inputs, O outputs, R rank, C channels, H W pixels, L = H W, h w kernel.

A convolution's down-projection runs as one product with all h w taps, `z = A x` of [R h w, L],
whose taps are then shifted and summed (`fold`). Exact, and light because R is far below C.
Milliseconds of A and B for 16 rows of rank 4, forward / forward and backward, one thread of a CPU:

    channels, side, stride   fold          unfold + bmm   grouped conv   the frozen layer alone
    64 -> 64,   16, 1        0.51 / 1.9    7.9 / 17       0.59 / 8.5     2.8
    128 -> 128,  8, 1        0.22 / 0.70   1.9 / 8.4      0.34 / 2.1     2.4
    192 -> 128, 16, 1        1.0 / 6.6     21 / 57        2.0 / 21       24
    128 -> 128, 16, 2        0.63 / 2.4    2.3 / 8.6      0.43 / 2.6     2.8
    320 -> 320, 32, 1        16 / 45       262 / 548      23 / 72        262
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raybooth.errors import BaseModelError
from raybooth.model.lora import AdapterTensors, LoraPair, Site, init_pair

BLOCK = 256
"""P is a multiple of this: one 8-bit optimiser block never spans two slots."""


class Bank:
    """S adapters stacked over a frozen denoiser; slot 0 is the null adapter, always zeros.

    `flat_SP` [S + 1, P] is the one master tensor and the one autograd leaf; sites are views of it.
    `scale_S` [S + 1] holds each slot's alpha / rank. `route` names the slot of every batch row; it
    holds for all following calls of the denoiser. Change `flat_SP` in place by its own operations,
    not through `.data` (after a forward with gradients any way is seen).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        sites: Sequence[Site],
        rank: int,
        num_slots: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.denoiser = denoiser
        self.sites = tuple(sites)
        self.rank = rank
        self.num_slots = num_slots
        self.device = torch.device(device)
        self._down_sizes = [prod(site.down_shape(rank)) for site in self.sites]
        self._up_sizes = [prod(site.up_shape(rank)) for site in self.sites]
        self.num_parameters = sum(self._down_sizes) + sum(self._up_sizes)
        self.slot_size = -(-self.num_parameters // BLOCK) * BLOCK
        self.flat_SP = torch.zeros(num_slots + 1, self.slot_size, device=self.device, dtype=dtype)
        self.scale_S = torch.ones(num_slots + 1, dtype=torch.float64)
        self._rank_S = [rank] * (num_slots + 1)
        self._place = {site.name: place for place, site in enumerate(self.sites)}
        self._routing: _Routing | None = None
        self._stack: _Stack | None = None
        self._gathered: tuple[object, _Stack] | None = None
        self._handles: list[RemovableHandle] = []
        self.attach()

    # Slots -------------------------------------------------------------------------------------

    def init(self, slot: int, rank: int, scale: float, generator: torch.Generator) -> None:
        """A fresh adapter of `rank` in `slot`: A normal from `generator`, site by site, B zero."""
        self.write(slot, {s.name: init_pair(s, rank, generator) for s in self.sites}, scale)

    @torch.no_grad()
    def write(self, slot: int, tensors: AdapterTensors, scale: float = 1.0) -> None:
        """Put an adapter into `slot`; sites that it lacks are zero, a lower rank is zero-padded.

        Raises BaseModelError for a site that the bank lacks, a foreign shape, or a higher rank.
        """
        flat_P = self.flatten(tensors)
        self._check_slot(slot)
        self.flat_SP[slot].copy_(flat_P)
        self.scale_S[slot] = scale
        self._rank_S[slot] = max((pair.rank for pair in tensors.values()), default=self.rank)

    @torch.no_grad()
    def read(self, slot: int) -> AdapterTensors:
        """Copies of a slot's pairs at the slot's own rank (`scale_S[slot]` is not folded in)."""
        tensors = self.unflatten(self.flat_SP[slot].detach(), self._rank_S[slot])
        return {name: LoraPair(p.down.clone(), p.up.clone()) for name, p in tensors.items()}

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Make `slot` a null adapter again."""
        self._check_slot(slot)
        self.flat_SP[slot].zero_()
        self.scale_S[slot] = 1.0
        self._rank_S[slot] = self.rank

    def slot_rank(self, slot: int) -> int:
        """The rank of the adapter in `slot`, at most the bank's."""
        return self._rank_S[slot]

    def flatten(self, tensors: AdapterTensors) -> Tensor:
        """[P] in the master's dtype and device: one slot's row of `flat_SP`."""
        flat_P = self.flat_SP.new_zeros(self.slot_size)
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
        return flat_P

    def unflatten(self, flat_P: Tensor, rank: int) -> AdapterTensors:
        """The pairs of one row of `flat_SP` cropped to `rank`."""
        tensors: AdapterTensors = {}
        for site, (down, up) in zip(self.sites, self._views(flat_P), strict=True):
            pair_down = _taps_last(site, down[:rank])
            tensors[site.name] = LoraPair(pair_down, up[:, :rank].reshape(site.up_shape(rank)))
        return tensors

    # Routing -----------------------------------------------------------------------------------

    def route(self, slot_B: Tensor, scale_B: Tensor | None = None, rows_each: int = 1) -> None:
        """Send row b of the following denoiser calls through `slot_B[b]`, times `scale_B[b]`.

        Each entry stands for `rows_each` neighbouring rows. With gradients, equal contiguous
        groups of rows run as one product a slot; without, adapters are gathered once, here.
        A backward pass must be over before the next `route`.
        """
        slots = tuple(int(slot) for slot in slot_B.tolist())
        for slot in slots:
            if not 0 <= slot <= self.num_slots:
                raise IndexError(f"slot {slot} is not in 0..{self.num_slots}")
        scales = (1.0,) * len(slots) if scale_B is None else tuple(scale_B.double().tolist())
        assert len(scales) == len(slots)
        self._routing = _Routing(slots, scales, rows_each)
        if not torch.is_grad_enabled():
            self._prepare()

    def attach(self) -> None:
        """Add the hooks (a new bank has them)."""
        if self._handles:
            return
        self._handles.append(self.denoiser.register_forward_pre_hook(self._before_call))
        for place, site in enumerate(self.sites):
            module = self.denoiser.get_submodule(site.name)
            hook = self._linear_hook(place) if site.kind == "linear" else self._conv_hook(place)
            self._handles.append(module.register_forward_hook(hook))

    def detach(self) -> None:
        """Remove the hooks: the denoiser is the bare base again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack = None

    # Inside the denoiser -----------------------------------------------------------------------

    def _before_call(self, module: nn.Module, args: object) -> None:
        self._prepare()

    def _prepare(self) -> None:
        routing = self._routing
        if routing is None:
            self._stack = None
        elif torch.is_grad_enabled() and self.flat_SP.requires_grad:
            self._gathered = None
            self._stack = self._stacked(routing.grouped())
        elif not any(routing.slots):
            self._stack = None
        else:
            key = (routing, self._dtype(), self.flat_SP._version, tuple(self.scale_S.tolist()))
            if self._gathered is None or self._gathered[0] != key:
                with torch.no_grad():
                    self._gathered = key, self._stacked(routing)
            self._stack = self._gathered[1]

    def _stacked(self, routing: _Routing) -> _Stack:
        slots, first = routing.slots, routing.slots[0]
        if slots == tuple(range(first, first + len(slots))):
            flat_KP = self.flat_SP[first : first + len(slots)]
        else:
            flat_KP = self.flat_SP.index_select(0, torch.tensor(slots, device=self.device))
        flat_KP = flat_KP.to(self._dtype())
        # one split has one backward (a concatenation); a slice for each site would have one of
        # the whole [K, P] for each
        total_down, total_up = sum(self._down_sizes), sum(self._up_sizes)
        padding = self.slot_size - total_down - total_up
        downs_KP, ups_KP, _ = torch.split(flat_KP, [total_down, total_up, padding], dim=1)
        scales = [float(self.scale_S[s]) * r for s, r in zip(slots, routing.scales, strict=True)]
        if any(scale != 1.0 for scale in scales):
            ups_KP = ups_KP * torch.tensor(scales, device=self.device, dtype=ups_KP.dtype)[:, None]
        downs = torch.split(downs_KP, self._down_sizes, dim=1)
        ups = torch.split(ups_KP, self._up_sizes, dim=1)
        pairs: list[tuple[Tensor, Tensor]] = []
        for site, down, up in zip(self.sites, downs, ups, strict=True):
            down_KXI = down.reshape(len(slots), -1, site.in_features)
            pairs.append((down_KXI, up.reshape(len(slots), site.out_features, self.rank)))
        return _Stack(len(slots), routing.rows_each, pairs)

    def _dtype(self) -> torch.dtype:
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next(self.denoiser.parameters()).dtype

    def _linear_hook(self, place: int) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
            stack = self._stack
            if stack is None:
                return None
            x, (down_KRI, up_KOR) = args[0], stack.pairs[place]
            stack.check(x)
            x_KXI = x.reshape(stack.num_groups, -1, x.shape[-1])
            y_KXO = y.reshape(stack.num_groups, -1, y.shape[-1])
            h_KXR = torch.bmm(x_KXI, down_KRI.transpose(1, 2))
            return torch.baddbmm(y_KXO, h_KXR, up_KOR.transpose(1, 2)).view(y.shape)

        return add

    def _conv_hook(self, place: int) -> Any:
        site = self.sites[place]

        def add(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
            stack = self._stack
            if stack is None:
                return None
            x, (down_KXC, up_KOR) = args[0], stack.pairs[place]
            stack.check(x)
            down_BXC, up_BOR = stack.per_row(down_KXC), stack.per_row(up_KOR)
            h_BRL = _down_conv(site, x, down_BXC)
            return torch.baddbmm(y.flatten(2), up_BOR, h_BRL).view(y.shape)

        return add

    # Layout of a row: every down, then every up, then padding ------------------------------------

    def _views(self, flat_P: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each site, views [R, taps, I] and [O, R] of one row."""
        downs = torch.split(flat_P[: sum(self._down_sizes)], self._down_sizes)
        ups = torch.split(flat_P[sum(self._down_sizes) : self.num_parameters], self._up_sizes)
        return [
            (down.view(self.rank, -1, site.in_features), up.view(site.out_features, self.rank))
            for site, down, up in zip(self.sites, downs, ups, strict=True)
        ]

    def _check_slot(self, slot: int) -> None:
        if not 1 <= slot <= self.num_slots:
            raise IndexError(f"slot {slot} cannot be written; it is not in 1..{self.num_slots}")

    def _check_pair(self, site: Site, pair: LoraPair) -> None:
        rank = pair.rank
        shapes = tuple(pair.down.shape), tuple(pair.up.shape)
        if shapes != (site.down_shape(rank), site.up_shape(rank)):
            do = "load it over the base that it was trained with"
            what = f"the adapter's tensors do not fit {site.name} of this base"
            raise BaseModelError(what, f"shapes {shapes[0]} and {shapes[1]}", do)
        if rank > self.rank:
            what = f"the adapter's rank is above the bank's ({self.rank})"
            raise BaseModelError(what, f"rank {rank}", "raise the bank's rank (`max_rank`)")


@dataclass(frozen=True)
class _Routing:
    """Slot and scale of each group of `rows_each` neighbouring rows."""

    slots: tuple[int, ...]
    scales: tuple[float, ...]
    rows_each: int

    def grouped(self) -> _Routing:
        """Neighbours of one slot merged, where every slot is one run and all runs are as long."""
        runs: list[list[float]] = []
        for slot, scale in zip(self.slots, self.scales, strict=True):
            if runs and runs[-1][:2] == [slot, scale]:
                runs[-1][2] += 1
            else:
                runs.append([slot, scale, 1])
        slots, scales = tuple(int(run[0]) for run in runs), tuple(run[1] for run in runs)
        if len(set(slots)) < len(slots) or len({run[2] for run in runs}) > 1:
            return self
        return _Routing(slots, scales, self.rows_each * int(runs[0][2]))


@dataclass(frozen=True)
class _Stack:
    """For each site, A [K, R taps, I] and scaled B [K, O, R], in the dtype of the call."""

    num_groups: int
    rows_each: int
    pairs: list[tuple[Tensor, Tensor]]

    def check(self, x: Tensor) -> None:
        rows = self.num_groups * self.rows_each
        if x.shape[0] != rows:
            raise ValueError(f"the bank was routed for {rows} rows; the denoiser got {x.shape[0]}")

    def per_row(self, weight_K: Tensor) -> Tensor:
        """[B, ...]: each group's weight for each of its rows."""
        return weight_K if self.rows_each == 1 else weight_K.repeat_interleave(self.rows_each, 0)


def _down_conv(site: Site, x_BCHW: Tensor, down_BXC: Tensor) -> Tensor:
    """h = A * x with the site's kernel, stride and padding, each row its own A; [B, R, L'].

    X = R h w taps, the kernel flipped: tap (i, j) of pixel (y, x) lands on (y - i + p, x - j + p).
    """
    z_BXL = torch.bmm(down_BXC, x_BCHW.flatten(2))
    (kernel_h, kernel_w), (pad_h, pad_w) = site.kernel, site.padding
    if site.kernel == (1, 1) and site.stride == (1, 1) and site.padding == (0, 0):
        return z_BXL
    size = (
        x_BCHW.shape[2] + 2 * pad_h - kernel_h + 1,
        x_BCHW.shape[3] + 2 * pad_w - kernel_w + 1,
    )
    h_BRHW = F.fold(z_BXL, size, site.kernel, padding=(kernel_h - 1 - pad_h, kernel_w - 1 - pad_w))
    return h_BRHW[:, :, :: site.stride[0], :: site.stride[1]].flatten(2)


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
