"""y_b = W x_b + s_b B_slot(b) A_slot(b) x_b in one module of a base: a denoiser or a text encoder.

Shapes: S slots, P numbers of a slot (padded), B batch rows, K groups of n rows each (B = K n),
N learned tokens, T tokens, D token width, I inputs, O outputs, R rank, C channels, H W pixels,
L = H W, h w kernel.

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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raybooth.model.lora import Site, TokenSite, site_module


class BankPart:
    """One module that a bank moves: its columns of the rows, its routing and its hooks.

    `flat_SP[:, start:stop]` holds every A of the part, then every B, then its learned tokens.
    """

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[Site],
        tokens: TokenSite | None,
        rank: int,
        start: int,
    ) -> None:
        self.module = module
        self.sites = tuple(sites)
        self.tokens = tokens
        self.rank = rank
        self.start = start
        self._down_sizes = [prod(site.down_shape(rank)) for site in self.sites]
        self._up_sizes = [prod(site.up_shape(rank)) for site in self.sites]
        num_tokens = 0 if tokens is None else tokens.num_tokens * tokens.width
        self._sizes = [sum(self._down_sizes), sum(self._up_sizes), num_tokens]
        self.stop = start + sum(self._sizes)
        self.routing: Routing | None = None
        self._stack: _Stack | None = None
        self._copies_KP: Tensor | None = None
        self._copied: list[tuple[int, object, float] | None] = []
        """What each row of the copies holds: slot, which writing of it, scale."""

        self._stacks: dict[tuple[int, int], _Stack] = {}
        self._handles: list[RemovableHandle] = []
        self._ids_BT: Tensor | None = None

    def bind(self, flat_SP: Tensor, scale_S: Tensor, stamps: SlotStamps) -> None:
        """Take the bank's master tensor, once, and add the hooks."""
        self._flat_SP, self._scale_S, self._stamps = flat_SP, scale_S, stamps
        self.attach()

    def attach(self) -> None:
        """Add the hooks if they are not there."""
        if self._handles:
            return
        add = self._handles.append
        add(self.module.register_forward_pre_hook(lambda module, args: self.prepare()))
        for place, site in enumerate(self.sites):
            hook = self._linear_hook(place) if site.kind == "linear" else self._conv_hook(place)
            add(site_module(self.module, site).register_forward_hook(hook))
        if self.tokens is not None:
            table = cast(Any, self.module).get_input_embeddings()
            add(table.register_forward_pre_hook(self._hide_learned))
            add(table.register_forward_hook(self._put_learned))

    def detach(self) -> None:
        """Remove the hooks: the module is the bare base again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack = None
        self._copies_KP, self._copied, self._stacks = None, [], {}

    def views(self, flat_P: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each site, views [R, taps, I] and [O, R] of one row."""
        downs_P, ups_P, _ = torch.split(flat_P[self.start : self.stop], self._sizes)
        downs = torch.split(downs_P, self._down_sizes)
        ups = torch.split(ups_P, self._up_sizes)
        return [
            (down.view(self.rank, -1, site.in_features), up.view(site.out_features, self.rank))
            for site, down, up in zip(self.sites, downs, ups, strict=True)
        ]

    def token_view(self, flat_P: Tensor) -> Tensor:
        """The view [N, D] of one row that holds the learned tokens."""
        assert self.tokens is not None
        tokens_P = flat_P[self.stop - self._sizes[2] : self.stop]
        return tokens_P.view(self.tokens.num_tokens, self.tokens.width)

    def prepare(self) -> None:
        """Stack the adapters of the routing, unless they are stacked already."""
        routing = self.routing
        if routing is None:
            self._stack = None
        elif torch.is_grad_enabled() and self._flat_SP.requires_grad:
            self._copied = [None] * len(self._copied)  # fused and 8-bit updates leave no trace
            self._stack = self._stacked(routing.grouped())
        elif not any(routing.slots):
            self._stack = None
        elif self.tokens is not None:
            with torch.no_grad():  # learned tokens keep the master's dtype
                self._stack = self._stacked(routing)
        else:
            self._stack = self._gather(routing)

    @torch.no_grad()
    def _gather(self, routing: Routing) -> _Stack:
        """The stack over copies of the routed rows; only those that changed are copied again."""
        num_groups, dtype = len(routing.slots), self._dtype()
        copies_KP = self._copies_KP
        if copies_KP is None or len(copies_KP) < num_groups or copies_KP.dtype != dtype:
            size = num_groups, self.stop - self.start
            copies_KP = self._copies_KP = torch.empty(
                size, dtype=dtype, device=self._flat_SP.device
            )
            self._copied, self._stacks = [None] * num_groups, {}
        ups = slice(self._sizes[0], self._sizes[0] + self._sizes[1])
        for place, (slot, by) in enumerate(zip(routing.slots, routing.scales, strict=True)):
            scale = float(self._scale_S[slot]) * by
            held = slot, self._stamps.of(slot), scale
            if self._copied[place] != held:
                row_P = copies_KP[place].copy_(self._flat_SP[slot, self.start : self.stop])
                if scale != 1.0:
                    row_P[ups] *= row_P.new_tensor(scale)
                self._copied[place] = held
        key = num_groups, routing.rows_each
        if key not in self._stacks:
            self._stacks[key] = self._cut(copies_KP[:num_groups], routing.rows_each)
        return self._stacks[key]

    def _stacked(self, routing: Routing) -> _Stack:
        """The stack over the master's own rows, for gradients."""
        slots, first = routing.slots, routing.slots[0]
        flat_SP = self._flat_SP[:, self.start : self.stop]
        if slots == tuple(range(first, first + len(slots))):
            flat_KP = flat_SP[first : first + len(slots)]
        else:
            flat_KP = flat_SP.index_select(0, torch.tensor(slots, device=flat_SP.device))
        scales = [float(self._scale_S[s]) * r for s, r in zip(slots, routing.scales, strict=True)]
        return self._cut(flat_KP, routing.rows_each, scales)

    def _cut(self, flat_KP: Tensor, rows_each: int, scales: Sequence[float] = ()) -> _Stack:
        # one split has one backward (a concatenation); a slice for each site would have one of
        # the whole [K, P] for each
        downs_KP, ups_KP, tokens_KP = torch.split(flat_KP, self._sizes, dim=1)
        downs_KP, ups_KP = downs_KP.to(self._dtype()), ups_KP.to(self._dtype())
        if any(scale != 1.0 for scale in scales):
            ups_KP = ups_KP * ups_KP.new_tensor(scales)[:, None]
        downs = torch.split(downs_KP, self._down_sizes, dim=1)
        ups = torch.split(ups_KP, self._up_sizes, dim=1)
        num_groups = len(flat_KP)
        pairs: list[tuple[Tensor, Tensor]] = []
        for site, down, up in zip(self.sites, downs, ups, strict=True):
            down_KXI = down.reshape(num_groups, -1, site.in_features)
            pairs.append((down_KXI, up.reshape(num_groups, site.out_features, self.rank)))
        tokens = self.tokens
        tokens_KND = None if tokens is None else tokens_KP.reshape(num_groups, -1, tokens.width)
        return _Stack(num_groups, rows_each, pairs, tokens_KND)

    def _dtype(self) -> torch.dtype:
        kind = self._flat_SP.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next(self.module.parameters()).dtype

    # Hooks -------------------------------------------------------------------------------------

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

    def _hide_learned(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        """Ids that the table lacks become its first, to be looked up and replaced."""
        self._ids_BT = None
        if self._stack is None:
            return None
        assert self.tokens is not None
        self._stack.check(args[0])
        self._ids_BT = args[0] - self.tokens.first_id
        return (args[0].masked_fill(self._ids_BT >= 0, 0),)

    def _put_learned(
        self, module: nn.Module, args: tuple[Tensor, ...], y_BTD: Tensor
    ) -> Tensor | None:
        stack, ids_BT = self._stack, self._ids_BT
        if stack is None or ids_BT is None:
            return None
        assert stack.tokens_KND is not None
        index_BTD = ids_BT.clamp(min=0)[..., None].expand_as(y_BTD)
        learned_BTD = stack.per_row(stack.tokens_KND).gather(1, index_BTD).to(y_BTD.dtype)
        return torch.where((ids_BT >= 0)[..., None], learned_BTD, y_BTD)


class SlotStamps:
    """Which writing of a slot its numbers are; a change by any other way is one of all slots."""

    def __init__(self, flat_SP: Tensor) -> None:
        self._flat_SP = flat_SP
        self._version = flat_SP._version
        self._changes = 0
        self._writings = [0] * len(flat_SP)

    def of(self, slot: int) -> tuple[int, int]:
        """Differs once the slot's numbers may differ."""
        if self._flat_SP._version != self._version:
            self._version = self._flat_SP._version
            self._changes += 1
        return self._changes, self._writings[slot]

    @contextmanager
    def writing(self, slot: int) -> Iterator[None]:
        """Inside, that slot is written and no other."""
        self.of(slot)
        yield
        self._version = self._flat_SP._version
        self._writings[slot] += 1


@dataclass(frozen=True)
class Routing:
    """Slot and scale of each group of `rows_each` neighbouring rows."""

    slots: tuple[int, ...]
    scales: tuple[float, ...]
    rows_each: int

    def grouped(self) -> Routing:
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
        return Routing(slots, scales, self.rows_each * int(runs[0][2]))


@dataclass(frozen=True)
class _Stack:
    """For each site, A [K, R taps, I] and scaled B [K, O, R], in the dtype of the call."""

    num_groups: int
    rows_each: int
    pairs: list[tuple[Tensor, Tensor]]
    tokens_KND: Tensor | None

    def check(self, x: Tensor) -> None:
        rows = self.num_groups * self.rows_each
        if x.shape[0] != rows:
            raise ValueError(f"the bank was routed for {rows} rows, not {x.shape[0]}")

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
