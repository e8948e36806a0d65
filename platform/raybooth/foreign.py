"""Adapters that were trained elsewhere: any known key form, checked layer by layer against a base.

Read are diffusers' classic and PEFT forms (text encoders with and without `text_model.`), PEFT's
own folders, and kohya's. Alphas, also those that a header or an `adapter_config.json` gives, are
folded into B. What is not a plain LoRA of this base is refused with its name.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raybooth import __version__
from raybooth.errors import BaseModelError, InputError
from raybooth.model.files import WEIGHTS as PARTS
from raybooth.model.files import read_json, weight_files
from raybooth.model.kohya import KohyaNames
from raybooth.model.learned import LearnedTokens, load_learned, save_learned
from raybooth.model.lora import (
    CLASSIC,
    DENOISER,
    PRESETS,
    AdapterTensors,
    LoraPair,
    from_diffusers_keys,
    save_adapter,
)
from raybooth.store import (
    LEARNED,
    WEIGHTS,
    AdapterRecord,
    BaseRecord,
    ImportRecord,
    KeyForm,
    Store,
    check_subject_id,
    describe_file,
)

LayerShapes = Mapping[str, tuple[int, ...]]
"""Shape of a layer's weight, [O, I] or [O, I, h, w], by its key in an adapter."""

_VARIANTS: tuple[tuple[str, str], ...] = (
    (r"\.hada_w", "LoHa (products of Hadamard)"),
    (r"\.lokr_w", "LoKr (products of Kronecker)"),
    (r"\.lora_mid\.", "a LoCon with a middle tensor (Tucker)"),
    (r"\.dora_scale|lora_magnitude_vector", "DoRA (a magnitude beside the directions)"),
    (r"\.on_input|\.ia3", "IA3"),
    (r"\.oft_|\.oft_diag|\.oft_blocks|\.boft_", "OFT"),
    (r"\.diff(_b)?$|\.set_weight$|w_norm$|b_norm$", "whole weights, not only low-rank pairs"),
    (r"lora_[AB]\.bias|lora_(up|down)\.bias", "a LoRA with biases"),
)
_KOHYA = re.compile(r"(lora_(?:unet|te\d?)_[^.]+)\.(.+)")
_EARLY = re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight")
_DO = "convert it to a plain LoRA first"


@dataclass(frozen=True)
class ForeignAdapter:
    """A file's adapter, scale 1, and the form that its keys had."""

    tensors: AdapterTensors
    key_form: KeyForm


def read_foreign(path: Path, base_folder: Path) -> ForeignAdapter:
    """The adapter in `path` for the base in `base_folder`.

    Raises InputError for a pickle or no safetensors file, BaseModelError for a variant that is no
    plain LoRA, for keys that the base lacks, half pairs, foreign shapes or numbers not finite.
    """
    state, header = _read(path)
    if not state:
        raise InputError(f"{path} holds no tensors", "an empty file")
    _refuse_variants(state)
    layers = layer_shapes(base_folder)
    form: KeyForm = "diffusers"
    if any(_KOHYA.fullmatch(key) for key in state):
        form = "kohya"
        state = _from_kohya(state, KohyaNames.of_base(base_folder).by_name(layers))
    elif any(".lora_A." in key for key in state):
        form = "peft"
    tensors = from_diffusers_keys({_late(key): tensor for key, tensor in state.items()})
    if form == "peft":
        tensors = _scaled(tensors, _peft_scales(path, header, state, tensors))
    _check(tensors, layers)
    return ForeignAdapter(tensors, form)


def import_adapter(
    store: Store,
    path: Path,
    base: BaseRecord,
    base_folder: Path,
    words: Mapping[str, str],
    tokens: Path | None = None,
) -> AdapterRecord:
    """The adapter in `path` as a version of the subject that `words` names, with its origin.

    `words` holds the record's subject_id, class_noun, identifier, instance_prompt, class_prompt.
    `tokens` is a file of learned tokens, which prompts call by the identifier. The same file for
    the same subject and base is one version. Raises as `read_foreign`, or
    InputError for a subject id that cannot be used, StoreError.
    """
    check_subject_id(words["subject_id"])
    adapter = read_foreign(path, base_folder)
    learned = None
    if tokens is not None:
        learned = _read_tokens(tokens, base_folder, words["identifier"])
    digest = describe_file(path).sha256
    digests = digest if tokens is None else digest + describe_file(tokens).sha256
    job_id = f"{words['subject_id']}-import-{sha256(digests.encode()).hexdigest()[:12]}"
    earlier = store.published_job(words["subject_id"], job_id)
    if isinstance(earlier, AdapterRecord) and earlier.base.fingerprint == base.fingerprint:
        return earlier
    record = AdapterRecord(
        **words,
        job_id=job_id,
        base=base,
        rank=max(pair.rank for pair in adapter.tensors.values()),
        targets=_targets(adapter.tensors, layer_shapes(base_folder)),
        text_targets=_text_targets(adapter.tensors),
        identifier_tokens=0 if learned is None else learned.num_tokens,
        num_parameters=sum(part.numel() for pair in adapter.tensors.values() for part in pair),
        imported=ImportRecord(file=path.name, sha256=digest, key_form=adapter.key_form),
        train={},
        photos=(),
        prior=None,
        loss_curve=(),
        num_train_steps=None,
        seconds={},
        versions={"raybooth": __version__},
    )
    with tempfile.TemporaryDirectory(prefix="raybooth-") as name:
        weights = Path(name) / WEIGHTS
        save_adapter(weights, adapter.tensors, 1.0)
        files = {WEIGHTS: weights}
        if learned is not None:
            files[LEARNED] = Path(name) / LEARNED
            save_learned(files[LEARNED], learned)
        return store.publish(record, files)


def layer_shapes(base_folder: Path) -> dict[str, tuple[int, ...]]:
    """The layers of denoiser and text encoders that an adapter may move; reads headers only."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part, stem in PARTS.items():
        if part == "vae" or not (base_folder / part).is_dir():
            continue
        for file in weight_files(base_folder / part, stem):
            with safe_open(file, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118
                    shape = tuple(reader.get_slice(name).get_shape())
                    is_layer = name.endswith(".weight") and ".embeddings." not in f".{name}"
                    if is_layer and len(shape) in (2, 4):
                        shapes[_key(part, name.removesuffix(".weight"))] = shape
    return shapes


def _read_tokens(path: Path, base_folder: Path, identifier: str) -> LearnedTokens:
    """The learned tokens of `path`, called `identifier`; of the width of the base's own."""
    learned = replace(load_learned(path, identifier), name=identifier)
    if not identifier:
        do = "name them with --identifier"
        raise InputError("learned tokens need a word that prompts call them by", "none", do)
    widths: dict[str, int] = {}
    for part, stem in PARTS.items():
        if not part.startswith("text_encoder") or not (base_folder / part).is_dir():
            continue
        for file in weight_files(base_folder / part, stem):
            with safe_open(file, "pt") as reader:
                for name in reader.keys():  # noqa: SIM118
                    if name.endswith("embeddings.token_embedding.weight"):
                        widths[part] = reader.get_slice(name).get_shape()[1]
    found = {part: vectors.shape[1] for part, vectors in learned.vectors.items()}
    if found != widths:
        do = "name the base that they were trained on"
        raise BaseModelError(f"{path} does not fit the base's tokens", f"{found}, not {widths}", do)
    return learned


def _key(part: str, name: str) -> str:
    return name if part == DENOISER else f"{part}.{CLASSIC}{name.removeprefix(CLASSIC)}"


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith((b"PK", b"\x80")) and not start.endswith(b"{"):
            do = "have its author save it as safetensors"
            raise InputError(f"{path} is a pickle, which runs code when it is read", "", do)
        with safe_open(path, framework="pt") as reader:
            state = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
            return state, reader.metadata() or {}
    except (OSError, SafetensorError) as error:
        found = " ".join(str(error).split())[:200]
        do = "give the .safetensors file of an adapter"
        raise InputError(f"{path} is not a readable safetensors file", found, do) from error


def _refuse_variants(keys: Iterable[str]) -> None:
    for key in keys:
        for pattern, name in _VARIANTS:
            if re.search(pattern, key):
                raise BaseModelError(f"the file is no plain LoRA but holds {name}", key, _DO)


def _from_kohya(state: Mapping[str, Tensor], named: Mapping[str, str]) -> dict[str, Tensor]:
    unknown = []
    renamed = {}
    for key, tensor in state.items():
        match = _KOHYA.fullmatch(key)
        if match is None or match[1] not in named:
            unknown.append(key)
            continue
        site = named[match[1]]
        prefix = "" if _is_text(site) else f"{DENOISER}."
        renamed[f"{prefix}{site}.{match[2]}"] = tensor
    if unknown:
        raise _foreign(unknown)
    return renamed


def _late(key: str) -> str:
    """The names of diffusers before 0.20, `attn1.processor.to_q_lora`, as those of today."""
    match = _EARLY.fullmatch(key)
    if match is None:
        return key
    layer = "to_out.0" if match[2] == "out" else f"to_{match[2]}"
    return f"{match[1]}.{layer}.lora.{match[3]}.weight"


def _peft_scales(
    path: Path, header: Mapping[str, str], state: Iterable[str], tensors: AdapterTensors
) -> dict[str, float]:
    """alpha / R of each pair, by the words of diffusers' header or of PEFT's adapter_config.json.

    diffusers' files without a header have scale 1, as diffusers reads them.
    """
    settings: dict[str, Any] = {}
    if "lora_adapter_metadata" in header:
        try:
            settings = json.loads(header["lora_adapter_metadata"])
        except ValueError as error:
            raise InputError(f"{path} has a header that is not JSON", str(error)) from error
    elif any(key.startswith("base_model.model.") for key in state):
        config = path.with_name("adapter_config.json")
        if not config.is_file():
            do = "keep PEFT's folder together"
            what = "PEFT's file does not say its alpha"
            raise InputError(what, f"no adapter_config.json beside {path.name}", do)
        settings = {f"{DENOISER}.{name}": value for name, value in read_json(config).items()}
    return {key: _peft_scale(settings, key, pair) for key, pair in tensors.items()}


def _peft_scale(settings: Mapping[str, Any], key: str, pair: LoraPair) -> float:
    part, name = (DENOISER, key) if not _is_text(key) else key.split(".", 1)
    if settings.get(f"{part}.use_dora"):
        raise BaseModelError(f"the file is no plain LoRA but holds {_VARIANTS[3][1]}", part, _DO)
    alpha = settings.get(f"{part}.lora_alpha")
    for pattern, value in (settings.get(f"{part}.alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            alpha = value
    if alpha is None:
        return 1.0
    return float(alpha) / (
        math.sqrt(pair.rank) if settings.get(f"{part}.use_rslora") else pair.rank
    )


def _scaled(tensors: AdapterTensors, scales: Mapping[str, float]) -> AdapterTensors:
    return {key: LoraPair(pair.down, pair.up * scales[key]) for key, pair in tensors.items()}


def _check(tensors: AdapterTensors, layers: LayerShapes) -> None:
    if unknown := [key for key in tensors if key not in layers]:
        raise _foreign(unknown)
    if all(_is_text(key) for key in tensors):
        raise BaseModelError("the file moves no layer of the denoiser", f"{len(tensors)} of text")
    for key, pair in tensors.items():
        outputs, inputs, *kernel = layers[key]
        fitting = (pair.rank, inputs, *kernel), (outputs, pair.rank, *(1 for _ in kernel))
        if (tuple(pair.down.shape), tuple(pair.up.shape)) != fitting:
            found = f"{list(pair.down.shape)} and {list(pair.up.shape)}, not {_lists(fitting)}"
            do = "name the base that it was trained on"
            raise BaseModelError(f"the adapter does not fit {key} of this base", found, do)
        if not all(bool(torch.isfinite(part).all()) for part in pair):
            raise BaseModelError(f"the adapter holds numbers that are not finite in {key}")


def _targets(tensors: AdapterTensors, layers: LayerShapes) -> str | tuple[str, ...]:
    """The preset that names exactly these layers of the denoiser, or their own names."""
    moved = {key for key in tensors if not _is_text(key)}
    for name, suffixes in PRESETS.items():
        ends = tuple(f".{suffix}" for suffix in suffixes)
        if moved == {key for key in layers if f".{key}".endswith(ends) and not _is_text(key)}:
            return name
    return tuple(key for key in layers if key in moved)


def _text_targets(tensors: AdapterTensors) -> tuple[str, ...] | None:
    """The layers that it moves in the text encoders, by their names there."""
    names = dict.fromkeys(key.split(".", 1)[1] for key in tensors if _is_text(key))
    return tuple(names) or None


def _is_text(key: str) -> bool:
    return key.startswith("text_encoder")


def _lists(shapes: Iterable[tuple[int, ...]]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)


def _foreign(unknown: list[str]) -> BaseModelError:
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    return BaseModelError(
        "the file moves layers that this base lacks",
        ", ".join(sorted(unknown)[:3]) + more,
        "name the base that it was trained on",
    )
