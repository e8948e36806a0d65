"""A published model in the form that another program reads: written beside, synced, renamed.

`diffusers` is the published file itself, `kohya` the same pairs under the names that A1111 and
ComfyUI read, `pipeline` a whole folder of diffusers with W + B A in the place of W.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raybooth.errors import InputError, StoreError
from raybooth.model.families import family_of
from raybooth.model.files import WEIGHTS as PARTS
from raybooth.model.files import read_json, weight_files
from raybooth.model.full_weights import part_file, write_pipeline
from raybooth.model.kohya import KohyaNames, to_kohya_keys
from raybooth.model.learned import LearnedTokens, load_learned, with_tokens
from raybooth.model.lora import CLASSIC, DENOISER, AdapterTensors, LoraPair, load_adapter
from raybooth.model.sampler import ZERO_TERMINAL_SNR
from raybooth.store import LEARNED, RECORD, SAMPLES, WEIGHTS, AdapterRecord, Record

Format = Literal["diffusers", "kohya", "pipeline"]
FORMATS: tuple[Format, ...] = get_args(Format)
_FILE_SUFFIX = ".safetensors"


def export_model(
    record: Record, folder: Path, base_folder: Path, form: Format, output: Path, *, force: bool
) -> list[Path]:
    """The published files in `folder` as `form`, at `output`; returns what was written.

    `output` is a folder, or the name of one `.safetensors` file for an adapter's two forms.
    Raises InputError when it is there and not to be replaced, or when the model has no such form;
    StoreError when it cannot be written. What stood there is replaced by a rename, or stays.
    """
    is_file = output.suffix == _FILE_SUFFIX
    if form == "pipeline" and is_file:
        raise InputError("a pipeline is a folder", f"{output}", "give a name without .safetensors")
    if form != "pipeline" and not isinstance(record, AdapterRecord):
        found = f"{record.reference} is a full fine-tune"
        raise InputError(f"only adapters have a {form} form", found, "use --format pipeline")
    check_output(output, force=force)
    with _staged(output) as staging:
        if form == "pipeline":
            _write_pipeline(record, folder, base_folder, staging)
            if record.zero_terminal_snr:
                _write_words(staging / "scheduler" / "scheduler_config.json", ZERO_TERMINAL_SNR)
        elif is_file:
            if LEARNED in record.files:
                do = "give a folder, which holds both"
                raise InputError(f"{record.reference} learned tokens too", "one file", do)
            _write_file(folder / WEIGHTS, base_folder, form, staging)
        else:
            staging.mkdir()
            name = WEIGHTS if form == "diffusers" else f"{record.subject_id}{_FILE_SUFFIX}"
            _write_file(folder / WEIGHTS, base_folder, form, staging / name)
            if LEARNED in record.files:
                _write_tokens(folder / LEARNED, record.subject_id, form, staging)
        if staging.is_dir():
            for name in (RECORD, SAMPLES):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staging / name)
    written = [output] if is_file else sorted(p for p in output.rglob("*") if p.is_file())
    return written


def check_output(output: Path, *, force: bool) -> None:
    """InputError when something stands at `output` that must not be replaced."""
    if not output.absolute().parent.is_dir():
        raise InputError("-o cannot be written", f"no folder {output.absolute().parent}", "make it")
    if not output.exists():
        return
    if not force:
        raise InputError(f"{output} exists", "a file or folder", "give another, or add --force")
    if output.is_dir() and (output.suffix == _FILE_SUFFIX or not (output / RECORD).is_file()):
        do = "remove it by hand, or give another name"
        raise InputError(f"{output} is a folder that no export wrote", f"no {RECORD} in it", do)
    if not output.is_dir() and output.suffix != _FILE_SUFFIX:
        raise InputError(f"{output} is a file, an export is a folder", "", "give another name")


def merged(weight: Tensor, pair: LoraPair) -> Tensor:
    """W + B A in fp32, in the dtype of W: [O, I] or [O, I, h, w], A [R, I(, h, w)], B [O, R]."""
    delta_OX = pair.up.flatten(1).float() @ pair.down.flatten(1).float()
    return (weight.float() + delta_OX.view(weight.shape)).to(weight.dtype)


def _write_file(weights: Path, base_folder: Path, form: Format, target: Path) -> None:
    if form == "diffusers":
        shutil.copyfile(weights, target)
        return
    tensors = load_adapter(weights)
    state = to_kohya_keys(tensors, KohyaNames.of_base(base_folder))
    rank = str(max((pair.rank for pair in tensors.values()), default=0))
    words = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    save_file(state, target, metadata={"format": "pt", **words})


def _write_tokens(tokens: Path, subject_id: str, form: Format, folder: Path) -> None:
    """The learned tokens beside an adapter; for A1111 and ComfyUI the file's name is their name."""
    if form == "diffusers":
        shutil.copyfile(tokens, folder / LEARNED)
        return
    vectors = load_learned(tokens).vectors
    state = {"emb_params": vectors["text_encoder"]}
    if len(vectors) > 1:
        state = load_file(tokens)
    save_file(state, folder / f"{subject_id}_emb{_FILE_SUFFIX}", metadata={"format": "pt"})


def _write_pipeline(record: Record, folder: Path, base_folder: Path, target: Path) -> None:
    if not isinstance(record, AdapterRecord):
        write_pipeline(base_folder, folder, target)
        return
    tensors = load_adapter(folder / WEIGHTS)
    learned = load_learned(folder / LEARNED) if LEARNED in record.files else None
    tokenizers = {} if learned is None else _tokenizers(base_folder, learned)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as name:
        for part in sorted({*_parts(tensors), *tokenizers}):
            state = merged_part(base_folder / part, tensors)
            if learned is not None and part in tokenizers:
                _add_rows(state, learned.vectors[part], len(tokenizers[part]))
            save_file(state, Path(name) / part_file(part), metadata={"format": "pt"})
        write_pipeline(base_folder, Path(name), target)
    for part, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(target / part.replace("text_encoder", "tokenizer"))
        _write_words(target / part / "config.json", {"vocab_size": len(tokenizer)})


def _write_words(config: Path, words: Mapping[str, Any]) -> None:
    config.write_text(json.dumps({**read_json(config), **words}, indent=2) + "\n", "utf-8")


def merged_part(part: Path, tensors: AdapterTensors) -> dict[str, Tensor]:
    """Every weight of one folder of a base, those that the adapter moves as W + B A."""
    state: dict[str, Tensor] = {}
    for file in weight_files(part, PARTS[part.name]):
        state.update(load_file(file))
    for key, pair in tensors.items():
        if key.partition(".")[0] == part.name or (part.name == DENOISER and not _is_text(key)):
            name = _stored_name(key, part.name, state)
            state[name] = merged(state[name], pair)
    return state


def _tokenizers(base_folder: Path, learned: LearnedTokens) -> dict[str, Any]:
    """The base's tokenizers, which know the learned tokens, by text encoder."""
    known = family_of(base_folder).load_tokenizers(base_folder)
    added = with_tokens(known, learned.name, learned.num_tokens)
    return {part.replace("tokenizer", "text_encoder"): each for part, each in added.items()}


def _add_rows(state: dict[str, Tensor], vectors_ND: Tensor, num_rows: int) -> None:
    """The learned rows after those of all tokens that the base knows."""
    name = next(key for key in state if key.endswith("embeddings.token_embedding.weight"))
    known_VD = state[name][: num_rows - len(vectors_ND)]
    state[name] = torch.cat([known_VD, vectors_ND.to(known_VD.dtype)])


def _stored_name(key: str, part: str, state: Mapping[str, Tensor]) -> str:
    """The weight of an adapter's key in the base's own file, which may lack `text_model.`."""
    name = f"{key.removeprefix(part + '.') if _is_text(key) else key}.weight"
    return name if name in state else name.removeprefix(CLASSIC)


def _is_text(key: str) -> bool:
    return key.startswith("text_encoder")


def _parts(tensors: AdapterTensors) -> list[str]:
    return sorted({key.partition(".")[0] if _is_text(key) else DENOISER for key in tensors})


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A name beside `output` that takes its place once all under it is on the disk."""
    output = output.absolute()
    staging = output.with_name(f".{uuid4().hex}{output.suffix}")
    grave = output.with_name(f".{uuid4().hex}.old")
    try:
        yield staging
        for path in [staging, *staging.rglob("*")]:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        if output.is_dir():
            output.rename(grave)
        os.replace(staging, output)
    except OSError as error:
        if grave.is_dir():
            grave.rename(output)
        found = error.strerror or str(error)
        raise StoreError(f"{output} cannot be written", found, "make room or permission") from error
    finally:
        for path in (staging, grave):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
