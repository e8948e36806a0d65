"""Adapters of other trainers: read in every key form, checked, published, drawn; or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tests.raybooth_serving.published import random_adapter
from tests.tiny import write_tiny_base, write_tiny_sdxl

from raybooth.errors import BaseModelError, InputError
from raybooth.foreign import import_adapter, read_foreign
from raybooth.model.base import Base, load_base
from raybooth.model.kohya import KohyaNames, to_kohya_keys
from raybooth.model.learned import load_learned
from raybooth.model.lora import AdapterTensors, LoraPair, load_adapter, to_diffusers_keys
from raybooth.store import LEARNED, WEIGHTS, BaseRecord, Store

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(str(folder))


@pytest.fixture(scope="module")
def adapter(base: Base) -> AdapterTensors:
    """Every site of the denoiser, one of the text encoder."""
    generator = torch.Generator().manual_seed(1)
    pair = LoraPair(*(torch.randn(shape, generator=generator) for shape in ((2, 32), (32, 2))))
    return {**random_adapter(base, 0), TEXT: pair}


def assert_same(found: AdapterTensors, expected: AdapterTensors, rtol: float = 0) -> None:
    assert found.keys() == expected.keys()
    for key, pair in expected.items():
        for mine, theirs in zip(found[key], pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol)


def in_peft_form(tensors: AdapterTensors) -> dict[str, torch.Tensor]:
    classic = to_diffusers_keys(tensors, 1.0)
    return {
        key.replace(".lora_linear_layer.", ".lora.")
        .replace(".lora.down.", ".lora_A.")
        .replace(".lora.up.", ".lora_B."): tensor
        for key, tensor in classic.items()
    }


def flat(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As transformers 5.6 and later call CLIP's layers."""
    return {k.replace("text_encoder.text_model.", "text_encoder."): t for k, t in state.items()}


def early(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As diffusers called attention's layers before 0.20."""
    renamed = {}
    for key, tensor in state.items():
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            old = f".processor.{layer.removesuffix('.0')}_lora."
            key = key.replace(f".{layer}.lora.", old)
        renamed[key] = tensor
    return renamed


@pytest.mark.parametrize("form", ["classic", "flat", "early", "peft", "peft flat", "kohya"])
def test_every_key_form_is_read(
    form: str, adapter: AdapterTensors, folder: Path, tmp_path: Path
) -> None:
    classic, peft = to_diffusers_keys(adapter, 1.0), in_peft_form(adapter)
    kohya = to_kohya_keys(adapter, KohyaNames.of_base(folder))
    state = {
        "classic": classic,
        "flat": flat(classic),
        "early": early(classic),
        "peft": peft,
        "peft flat": flat(peft),
        "kohya": kohya,
    }[form]
    assert form == "classic" or state.keys() != classic.keys()
    save_file(state, tmp_path / "a.safetensors")
    found = read_foreign(tmp_path / "a.safetensors", folder)
    assert_same(found.tensors, adapter)
    assert found.key_form == {"k": "kohya", "p": "peft"}.get(form[0], "diffusers")


def test_kohyas_alpha_and_half_precision_are_read(
    adapter: AdapterTensors, folder: Path, tmp_path: Path
) -> None:
    state = to_kohya_keys(adapter, KohyaNames.of_base(folder))
    for key, tensor in state.items():
        state[key] = torch.tensor(1.0) if key.endswith(".alpha") else tensor.half()
    save_file(state, tmp_path / "a.safetensors")
    halved = {key: LoraPair(pair.down, pair.up / 2) for key, pair in adapter.items()}
    assert_same(read_foreign(tmp_path / "a.safetensors", folder).tensors, halved, rtol=1e-3)


def test_what_diffusers_saves_keeps_the_alpha_of_its_header(folder: Path, tmp_path: Path) -> None:
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    state = get_peft_model_state_dict(pipe.unet)
    metadata = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=state, **metadata)
    found = read_foreign(tmp_path / WEIGHTS, folder)
    assert found.tensors
    for key, pair in found.tensors.items():
        torch.testing.assert_close(pair.up, 3 * state[f"{key}.lora_B.weight"])


def test_pefts_own_folder_is_scaled_by_its_config(
    adapter: AdapterTensors, folder: Path, tmp_path: Path
) -> None:
    tensors = {key: pair for key, pair in adapter.items() if key != TEXT}
    state = {
        key.replace("unet.", "base_model.model."): tensor
        for key, tensor in in_peft_form(tensors).items()
    }
    file = tmp_path / "adapter_model.safetensors"
    save_file(state, file)
    with pytest.raises(InputError, match=r"found no adapter_config\.json beside"):
        read_foreign(file, folder)
    config = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"conv_shortcut": 8}, "use_rslora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read_foreign(file, folder).tensors
    scales = {key: 4.0 if key.endswith("conv_shortcut") else 2.0 for key in tensors}
    assert set(scales.values()) == {2.0, 4.0}
    scaled = {key: LoraPair(pair.down, scales[key] * pair.up) for key, pair in tensors.items()}
    assert_same(found, scaled)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    found = read_foreign(file, folder).tensors
    key = next(key for key in tensors if key.endswith("to_q"))
    torch.testing.assert_close(found[key].up, tensors[key].up * 4 / 2**0.5)


def test_sdxl_is_read_under_both_of_its_names(tmp_path: Path) -> None:
    xl = write_tiny_sdxl(tmp_path / "xl")
    tensors = random_adapter(load_base(str(xl)), 3)
    names = KohyaNames.of_base(xl)
    first = to_kohya_keys(tensors, names)
    second = to_kohya_keys(tensors, KohyaNames(False, 1, ()))
    assert any("input_blocks" in key for key in first)
    assert not any("input_blocks" in key for key in second)
    for state in (first, second):
        save_file(state, tmp_path / "a.safetensors")
        assert_same(read_foreign(tmp_path / "a.safetensors", xl).tensors, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"X.hada_w1_a": (2, 2)}, "LoHa.*: found lora_unet_mid.*hada_w1_a"),
        ({"X.lokr_w1": (2, 2)}, "LoKr"),
        ({"X.lora_mid.weight": (2, 2, 3, 3)}, "LoCon with a middle tensor"),
        ({"X.dora_scale": (1, 16)}, "DoRA"),
        ({"X.diff": (16, 16)}, "whole weights"),
        ({"lora_unet_other_layer.lora_down.weight": (2, 4)}, "lacks: found lora_unet_other_layer"),
        ({"unet.conv_in.weight": (2, 4)}, "lacks: found unet.conv_in.weight"),
        ({"X.lora_up.weight": None}, "lacks half of a LoRA pair"),
        ({"X.lora_up.weight": (17, 2)}, "does not fit mid_block"),
        ({"X.lora_down.weight": (2, 17)}, "does not fit mid_block"),
        ({"X.lora_down.weight": (3, 32)}, "two ranks"),
    ],
)
def test_what_is_no_lora_of_this_base_is_refused(
    change: dict[str, Any], words: str, adapter: AdapterTensors, folder: Path, tmp_path: Path
) -> None:
    state = to_kohya_keys(adapter, KohyaNames.of_base(folder))
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for key, shape in change.items():
        key = key.replace("X", layer)
        state.pop(key, None)
        if shape is not None:
            state[key] = torch.ones(shape)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=words):
        read_foreign(tmp_path / "a.safetensors", folder)


def test_pickles_damage_and_numbers_that_are_none_are_refused(
    adapter: AdapterTensors, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    torch.save({"lora_unet_a.alpha": torch.ones(1)}, file)
    with pytest.raises(InputError, match="is a pickle, which runs code"):
        read_foreign(file, folder)
    state = to_diffusers_keys(adapter, 1.0)
    state[next(iter(state))].view(-1)[0] = torch.nan
    save_file(state, file)
    with pytest.raises(BaseModelError, match="not finite"):
        read_foreign(file, folder)
    save_file(to_diffusers_keys({TEXT: adapter[TEXT]}, 1.0), file)
    with pytest.raises(BaseModelError, match="no layer of the denoiser"):
        read_foreign(file, folder)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_foreign(file, folder)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        read_foreign(tmp_path / "none.safetensors", folder)
    save_file({}, file)
    with pytest.raises(InputError, match="holds no tensors"):
        read_foreign(file, folder)


def test_an_import_says_what_it_is_and_invents_nothing(
    adapter: AdapterTensors, base: Base, folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    tensors = {key: pair for key, pair in adapter.items() if key != TEXT}
    file = tmp_path / "civit.safetensors"
    save_file(to_kohya_keys(tensors, KohyaNames.of_base(folder)), file)
    named = BaseRecord(name="tiny", fingerprint=base.fingerprint)
    words = {
        "subject_id": "rex",
        "class_noun": "dog",
        "identifier": "",
        "instance_prompt": "",
        "class_prompt": "",
    }
    record = import_adapter(store, file, named, folder, words)
    assert record.imported is not None
    assert record.imported.file == "civit.safetensors"
    assert record.imported.key_form == "kohya"
    assert (record.rank, record.targets, record.num_train_steps) == (2, "all", None)
    assert (record.train, record.loss_curve, record.seconds) == ({}, (), {})
    assert import_adapter(store, file, named, folder, words).version == 1
    assert store.verify("rex") == []
    assert_same(load_adapter(store.folder("rex") / WEIGHTS), tensors)
    state = load_file(file)
    save_file({k: t for k, t in state.items() if "_to_q." in k}, file)
    fewer = import_adapter(store, file, named, folder, words)
    assert fewer.version == 2
    assert all(name.endswith("to_q") for name in fewer.targets)


def test_learned_tokens_are_imported_under_the_identifier(
    adapter: AdapterTensors, base: Base, folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    file, tokens = tmp_path / "a.safetensors", tmp_path / "t.safetensors"
    save_file(to_diffusers_keys(adapter, 1.0), file)
    vectors = torch.randn(2, 32)
    save_file({"emb_params": vectors}, tokens)
    named = BaseRecord(name="tiny", fingerprint=base.fingerprint)
    empty = dict.fromkeys(("class_noun", "identifier", "instance_prompt", "class_prompt"), "")
    words = {**empty, "subject_id": "rex", "identifier": "<rex>"}
    record = import_adapter(store, file, named, folder, words, tokens)
    learned = load_learned(store.folder("rex") / LEARNED)
    assert (learned.name, learned.num_tokens) == ("<rex>", 2)
    assert torch.equal(learned.vectors["text_encoder"], vectors)
    assert (record.identifier_tokens, record.text_targets) == (2, (TEXT.split(".", 1)[1],))
    assert import_adapter(store, file, named, folder, words, tokens) == record
    assert import_adapter(store, file, named, folder, words).version == 2
    with pytest.raises(InputError, match="--identifier"):
        import_adapter(store, file, named, folder, {**words, "identifier": ""}, tokens)
    save_file({"emb_params": torch.randn(2, 31)}, tokens)
    with pytest.raises(BaseModelError, match="does not fit the base's tokens"):
        import_adapter(store, file, named, folder, words, tokens)
    torch.save({"string_to_param": {"*": vectors}}, tokens)
    with pytest.raises(BaseModelError, match="not a readable safetensors"):
        import_adapter(store, file, named, folder, words, tokens)
