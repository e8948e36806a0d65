"""The bank is PEFT's LoRA for each row, and no row can see another's adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from tests.tiny import write_tiny_base
from torch import Tensor

from raybooth.errors import BaseModelError
from raybooth.model.bank import BLOCK, Bank
from raybooth.model.lora import AdapterTensors, LoraPair, Site, find_sites

RANK = 4


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny")) / "unet"


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return unet.eval().requires_grad_(False)


def _adapter(sites: tuple[Site, ...], rank: int, seed: int) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: LoraPair(
            torch.randn(site.down_shape(rank), generator=generator) / rank,
            torch.randn(site.up_shape(rank), generator=generator) * 0.1,
        )
        for site in sites
    }


def _bank(unet: Any, targets: Any = "all", num_slots: int = 4, rank: int = RANK) -> Bank:
    sites = find_sites(unet, targets)
    bank = Bank(
        unet, sites=sites, rank=rank, num_slots=num_slots, device="cpu", dtype=_master(unet)
    )
    for slot in range(1, num_slots + 1):
        bank.write(slot, _adapter(sites, rank, slot))
    return bank


def _master(unet: Any) -> torch.dtype:
    return torch.float64 if unet.dtype == torch.float64 else torch.float32


def _inputs(rows: int, dtype: torch.dtype, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(rows, 4, size, size, generator=generator, dtype=torch.float64).to(dtype)
    states = torch.randn(rows, 7, 32, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(rows) * 37 + 5, states


def _call(unet: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, t, states = inputs
    out: Tensor = unet(x, t, encoder_hidden_states=states, return_dict=False)[0]
    return out


def _rows(inputs: tuple[Tensor, Tensor, Tensor], rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, t, states = inputs
    return x[rows], t[rows], states[rows]


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_bank_of_one_is_peft(
    unet_folder: Path, targets: Any, dtype: torch.dtype, bound: float
) -> None:
    """Equivalence 1: forward and gradients, linear and convolution sites, alpha not rank."""
    ours, theirs = _unet(unet_folder, dtype), _unet(unet_folder, dtype)
    sites = find_sites(ours, targets)
    scale = 1.5
    theirs.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=RANK * scale,
            init_lora_weights="gaussian",
            target_modules=[site.name for site in sites],
        )
    )
    adapter = _adapter(sites, RANK, 0)
    peft = {}
    for site in sites:
        layer = theirs.get_submodule(site.name)
        peft[site.name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for weight, ours_weight in zip(peft[site.name], adapter[site.name], strict=True):
            weight.data = ours_weight.to(dtype)
    bank = Bank(ours, sites=sites, rank=RANK, num_slots=1, device="cpu", dtype=_master(ours))
    bank.write(1, adapter, scale)
    bank.flat_SP.requires_grad_(True)
    bank.route(torch.ones(3, dtype=torch.long))
    inputs = _inputs(3, dtype)

    out, reference = _call(ours, inputs), _call(theirs, inputs)
    assert _apart(out, reference) < bound
    weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    (out * weight).sum().backward()
    (reference * weight).sum().backward()
    assert bank.flat_SP.grad is not None
    gradients = bank.unflatten(bank.flat_SP.grad[1], RANK)
    for name, (down, up) in peft.items():
        assert _apart(gradients[name].down, down.grad) < bound, name
        assert _apart(gradients[name].up, up.grad) < bound, name
    assert not bank.flat_SP.grad[0].any()


@pytest.mark.parametrize(
    "slots", [(1, 1, 2, 2, 4, 4), (3, 3, 1, 1, 2, 2), (1, 2, 1, 3, 0, 2), (2, 2, 2, 1, 1, 4)]
)
def test_gradients_of_a_mixed_batch_are_those_of_each_slot_alone(
    unet_folder: Path, slots: tuple[int, ...]
) -> None:
    unet = _unet(unet_folder, torch.float64)
    bank = _bank(unet)
    bank.scale_S[2] = 0.5
    bank.flat_SP.requires_grad_(True)
    inputs = _inputs(6, torch.float64)
    bank.route(torch.tensor(slots))
    mixed = _call(unet, inputs)
    mixed.square().sum().backward()
    assert bank.flat_SP.grad is not None
    gradient = bank.flat_SP.grad.clone()
    for slot in sorted(set(slots) - {0}):
        rows = [row for row, other in enumerate(slots) if other == slot]
        bank.flat_SP.grad = None
        bank.route(torch.tensor([slot] * len(rows)))
        alone = _call(unet, _rows(inputs, rows))
        alone.square().sum().backward()
        assert bank.flat_SP.grad is not None
        assert _apart(mixed[rows], alone) < 1e-10
        assert _apart(gradient[slot], bank.flat_SP.grad[slot]) < 1e-10


def test_serving_path_is_the_training_path(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float64)
    bank = _bank(unet)
    bank.flat_SP.requires_grad_(True)
    inputs, slots = _inputs(4, torch.float64), torch.tensor([1, 1, 2, 2])
    bank.route(slots)
    trained = _call(unet, inputs)
    with torch.no_grad():
        bank.route(torch.tensor([1, 2]), rows_each=2)
        assert _apart(_call(unet, inputs), trained) < 1e-12
        scale_B = torch.tensor([0.5, 1.0, 0.0, 2.0])
        bank.route(slots, scale_B)
        scaled = _call(unet, inputs)
    for row, scale in enumerate(scale_B.tolist()):
        bank.scale_S[:] = scale
        with torch.no_grad():
            bank.route(slots[row : row + 1])
            alone = _call(unet, _rows(inputs, slice(row, row + 1)))
        assert _apart(scaled[row], alone[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_slots_and_empty_rows_change_no_bit(
    unet_folder: Path, dtype: torch.dtype
) -> None:
    """Equivalence 4 for one call: at a fixed batch size, only a row's own inputs matter.

    8 rows, because places are equal only where 1, 2 or 4 threads take as many rows each: with
    3 threads a GELU's or a small product's border falls inside a row and rounds differently.
    """
    unet = _unet(unet_folder, dtype)
    bank = _bank(unet, num_slots=5)
    bank.write(5, bank.read(1))
    inputs = _inputs(8, dtype)
    other = tuple(torch.flip(t, (0,)) for t in inputs)
    with torch.no_grad():
        bank.route(torch.tensor([1, 2, 3, 1]), rows_each=2)
        out = _call(unet, inputs)
        # other neighbours, other slot of the same adapter, other place in the batch
        for slots, place in (([5, 4, 0, 2], 0), ([2, 1, 1, 3], 2), ([0, 0, 0, 5], 6)):
            mixed = tuple(b.clone() for b in other)
            for tensor, own in zip(mixed, inputs, strict=True):
                tensor[place : place + 2] = own[:2]
            bank.route(torch.tensor(slots), rows_each=2)
            assert torch.equal(_call(unet, mixed)[place : place + 2], out[:2])  # type: ignore[arg-type]
        # empty rows
        empty = tuple(t.clone() for t in inputs)
        for tensor in empty:
            tensor[2:] = 0
        bank.route(torch.tensor([1, 0, 0, 0]), rows_each=2)
        assert torch.equal(_call(unet, empty)[:2], out[:2])  # type: ignore[arg-type]


def test_null_slot_is_the_bare_base_bitwise(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float32)
    bare = _call(unet, inputs := _inputs(3, torch.float32))
    bank = _bank(unet)
    with torch.no_grad():
        bank.route(torch.tensor([0, 1, 0]))
        mixed = _call(unet, inputs)
        assert torch.equal(mixed[[0, 2]], bare[[0, 2]])
        assert not torch.equal(mixed[1], bare[1])
        bank.route(torch.tensor([0, 0, 0]))
        assert torch.equal(_call(unet, inputs), bare)
        bank.route(torch.tensor([1, 1, 1]))
        bank.detach()
        assert torch.equal(_call(unet, inputs), bare)
        bank.attach()
        assert not torch.equal(_call(unet, inputs), bare)
        bank.clear(1)
        assert torch.equal(_call(unet, inputs), bare)


def test_nan_stays_in_its_slot(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float32)
    bank = _bank(unet)
    inputs, slots = _inputs(6, torch.float32), torch.tensor([1, 1, 2, 2, 3, 3])
    bank.route(slots)
    healthy = _call(unet, inputs)
    with torch.no_grad():
        bank.flat_SP[2].fill_(float("nan"))
    bank.flat_SP.requires_grad_(True)
    bank.route(slots)
    out = _call(unet, inputs)
    out.sum().backward()
    assert out[2:4].isnan().all()
    assert _apart(out[[0, 1, 4, 5]], healthy[[0, 1, 4, 5]]) < 1e-5
    assert bank.flat_SP.grad is not None
    finite = bank.flat_SP.grad[:, : bank.num_parameters].isfinite().all(1)
    assert finite.tolist() == [True, True, False, True, True]
    with torch.no_grad():
        bank.route(slots)
        assert _call(unet, inputs)[[0, 1, 4, 5]].isfinite().all()


@pytest.mark.parametrize("kind", ["checkpointing", "autocast"])
def test_checkpointing_and_autocast(unet_folder: Path, kind: str) -> None:
    unet = _unet(unet_folder, torch.float32)
    bank = _bank(unet)
    bank.flat_SP.requires_grad_(True)
    inputs, slots = _inputs(4, torch.float32), torch.tensor([1, 1, 2, 2])
    bank.route(slots)
    _call(unet, inputs).square().sum().backward()
    assert bank.flat_SP.grad is not None
    reference = bank.flat_SP.grad.clone()
    bank.flat_SP.grad = None
    if kind == "checkpointing":
        unet.enable_gradient_checkpointing()
        unet.train()
        _call(unet, inputs).square().sum().backward()
        bound = 1e-6
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = _call(unet, inputs)
            assert bank.parts["unet"]._stack is not None
            assert bank.parts["unet"]._stack.pairs[0][0].dtype == torch.bfloat16
        out.float().square().sum().backward()
        bound = 0.1
    assert bank.flat_SP.grad is not None
    assert bank.flat_SP.grad.dtype == torch.float32
    apart = (bank.flat_SP.grad - reference).norm() / reference.norm()
    assert apart < bound


def test_master_updates_are_seen_without_another_route(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float32)
    bank = _bank(unet)
    inputs = _inputs(2, torch.float32)
    with torch.no_grad():
        bank.route(torch.tensor([1, 2]))
        before = _call(unet, inputs)
        bank.flat_SP[1].mul_(2)
        after = _call(unet, inputs)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_only_rows_that_changed_are_gathered_again(unet_folder: Path) -> None:
    """Poison in a copy stays where nothing changed, and goes where something did."""
    unet = _unet(unet_folder, torch.float32)
    bank = _bank(unet)
    part, inputs = bank.parts["unet"], _inputs(3, torch.float32)

    def poisoned(act: Callable[[], None]) -> list[bool]:
        bank.route(torch.tensor([1, 2, 3]))
        assert part._copies_KP is not None
        part._copies_KP[:3].fill_(torch.nan)
        act()
        found = _call(unet, inputs).isnan().flatten(1).any(1).tolist()
        part._copied = [None] * len(part._copied)
        return found

    with torch.no_grad():
        assert poisoned(lambda: None) == [True, True, True]
        assert poisoned(lambda: bank.route(torch.tensor([1, 4, 3]))) == [True, False, True]
        assert poisoned(lambda: bank.clear(3)) == [True, True, False]
        assert poisoned(lambda: bank.write(2, _adapter(bank.sites, RANK, 2))) == [True, False, True]
        assert poisoned(lambda: bank.flat_SP[1].mul_(2)) == [False, False, False]
        scales = torch.tensor([1.0, 1.0, 0.5])
        assert poisoned(lambda: bank.route(torch.tensor([1, 2, 3]), scales)) == [True, True, False]
        bank.scale_S[2] = 0.5
        assert poisoned(lambda: None) == [True, True, True]
        bank.route(torch.tensor([3, 1]))  # a narrower call is the beginning of a wider one
        narrow = _call(unet, _rows(inputs, slice(2)))
        bank.route(torch.tensor([3, 1, 2, 4, 4]))
        bank.route(torch.tensor([3, 1]))
        assert torch.equal(_call(unet, _rows(inputs, slice(2))), narrow)


def test_slots_round_trip_at_their_own_rank(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float32)
    sites = find_sites(unet, "all")
    bank = Bank(unet, sites=sites, rank=8, num_slots=3, device="cpu")
    assert bank.slot_size % BLOCK == 0
    assert bank.flat_SP.shape == (4, bank.slot_size)
    small = _adapter(sites, 3, 1)
    bank.write(2, small, 0.25)
    read = bank.read(2)
    assert read.keys() == small.keys()
    for name, pair in small.items():
        assert torch.equal(read[name].down, pair.down)
        assert torch.equal(read[name].up, pair.up)
    assert bank.slot_rank(2) == 3
    assert bank.scale_S.tolist() == [1.0, 1.0, 0.25, 1.0]
    assert not bank.flat_SP[[0, 1, 3]].any()
    assert torch.equal(bank.flatten(bank.unflatten(bank.flat_SP[2], 3)), bank.flat_SP[2])
    bank.init(3, 8, 1.0, torch.Generator().manual_seed(1))
    again = Bank(unet, sites=sites, rank=8, num_slots=1, device="cpu")
    again.init(1, 8, 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(again.flat_SP[1], bank.flat_SP[3])


def test_a_lower_rank_is_the_same_adapter(unet_folder: Path) -> None:
    outs = []
    for rank in (3, 8):
        unet = _unet(unet_folder, torch.float64)
        sites = find_sites(unet, "all")
        bank = Bank(unet, sites=sites, rank=rank, num_slots=1, device="cpu", dtype=torch.float64)
        bank.write(1, _adapter(sites, 3, 1))
        with torch.no_grad():
            bank.route(torch.tensor([1, 1]))
            outs.append(_call(unet, _inputs(2, torch.float64)))
    assert _apart(outs[0], outs[1]) < 1e-12


def test_adapters_that_do_not_fit_are_refused_and_nothing_is_written(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float32)
    bank = _bank(unet, targets="attention")
    before = bank.flat_SP.clone()
    name = bank.sites[0].name
    good = _adapter(bank.sites, RANK, 7)
    with pytest.raises(BaseModelError, match="sites that this bank lacks"):
        bank.write(1, {**good, "conv_in": LoraPair(torch.ones(4, 4), torch.ones(16, 4))})
    with pytest.raises(BaseModelError, match="do not fit"):
        bank.write(1, {**good, name: LoraPair(torch.ones(4, 5), torch.ones(16, 4))})
    with pytest.raises(BaseModelError, match="rank is above"):
        bank.write(1, _adapter(bank.sites, RANK + 1, 7))
    with pytest.raises(IndexError):
        bank.write(0, good)
    with pytest.raises(IndexError):
        bank.route(torch.tensor([1, 5]))
    assert torch.equal(bank.flat_SP, before)


def test_a_call_of_another_batch_size_is_refused(unet_folder: Path) -> None:
    unet = _unet(unet_folder, torch.float32)
    bank = _bank(unet)
    with torch.no_grad():
        bank.route(torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="routed for 2 rows"):
            _call(unet, _inputs(3, torch.float32))


def _apart(ours: Tensor, reference: Tensor) -> float:
    """max|d| / max|ref|."""
    return float((ours - reference).detach().abs().max() / reference.detach().abs().max())
