"""Writing a base as a Stable Diffusion pipeline folder of float16 safetensors."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from raybooth.pocket.denoiser import new_scheduler

_PARTS = (
    "model_index.json",
    "vae",
    "unet",
    "text_encoder",
    "tokenizer",
    "scheduler",
    "record.json",
)
_TEXT_PREFIX = "text_model."


def export_base(
    vae: Any, denoiser: Any, text_encoder: Any, tokenizer: Path, record: dict[str, Any], out: Path
) -> None:
    """Writes model_index.json, the five parts and record.json into `out`, replacing a base there.

    The text encoder's keys take the classic `text_model.` form: every transformers reads it.
    """
    beside = out.with_name(out.name + ".partial")
    if beside.exists():
        shutil.rmtree(beside)
    vae, denoiser, text_encoder = (_half(vae), _half(denoiser), _half(text_encoder))
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        unet=denoiser,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(beside, safe_serialization=True)
    classic = {
        key if key.startswith(_TEXT_PREFIX) else _TEXT_PREFIX + key: t.contiguous()
        for key, t in text_encoder.state_dict().items()
    }
    save_file(classic, beside / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(beside / "tokenizer")
    shutil.copytree(tokenizer, beside / "tokenizer")
    _neutral_configs(beside)
    (beside / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for file in beside.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    out.mkdir(parents=True, exist_ok=True)
    for name in _PARTS:
        old = out / name
        if old.is_dir():
            shutil.rmtree(old)
        os.replace(beside / name, old)
    beside.rmdir()


def load_base(folder: Path, device: str = "cpu") -> Any:
    """The base as a plain float32 `StableDiffusionPipeline`, without a progress bar."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _half(module: Any) -> Any:
    """A float16 copy on the CPU: the module itself goes on training in float32."""
    if isinstance(module, CLIPTextModel):
        copy: Any = CLIPTextModel(module.config)
    else:
        kind = AutoencoderKL if isinstance(module, AutoencoderKL) else UNet2DConditionModel
        copy = kind.from_config(module.config)
    copy.load_state_dict(module.state_dict())
    return copy.to("cpu", torch.float16)


def _neutral_configs(folder: Path) -> None:
    """Takes the exporting machine's folder names and the file's precision out of the configs.

    transformers loads in the precision that a config names and diffusers in float32: a plain
    `from_pretrained` of float16 files would mix them.
    """
    for file in (*folder.glob("*.json"), *folder.glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
