"""Kohya's key form, which A1111 and ComfyUI read: `_` for `.` in names, an alpha for each layer.

`lora_unet_<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha`; text encoders are `lora_te_`
where the base has one, `lora_te1_` and `lora_te2_` where it has two. For SD 1.x and 2.x the U-Net's
layers have diffusers' names; for SDXL those of its first code (`input_blocks_4_1_...`), which all
programs read. Scale of a pair: alpha / rank. (diffusers 0.42 reads a text encoder's attention only
where `out_proj` is among its layers, as in both presets.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raybooth.model.files import read_json
from raybooth.model.lora import AdapterTensors

_TEXT = re.compile(r"text_encoder(_2)?\.(.+)")
_INNER = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_DOWNSAMPLER = re.compile(r"down_blocks\.(\d+)\.downsamplers\.0\.conv")
_UPSAMPLER = re.compile(r"up_blocks\.(\d+)\.upsamplers\.0\.conv")
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class KohyaNames:
    """How kohya's files call the layers of one base."""

    is_xl: bool
    """Two text encoders, and a U-Net that is called as in SDXL's first code."""

    layers_per_block: int
    up_has_attention: tuple[bool, ...]
    """Of each block on the way up."""

    @classmethod
    def of_base(cls, folder: Path) -> KohyaNames:
        """The names for the base in `folder`, a pipeline of diffusers."""
        config = read_json(folder / "unet" / "config.json")
        return cls(
            is_xl="text_encoder_2" in read_json(folder / "model_index.json"),
            layers_per_block=int(config["layers_per_block"]),
            up_has_attention=tuple("CrossAttn" in kind for kind in config["up_block_types"]),
        )

    def written(self, key: str) -> str:
        """The name that kohya gives to the layer of an adapter's key."""
        if match := _TEXT.fullmatch(key):
            number = "" if not self.is_xl else "2" if match[1] else "1"
            return f"lora_te{number}_{match[2].replace('.', '_')}"
        return f"lora_unet_{(self._first(key) if self.is_xl else key).replace('.', '_')}"

    def by_name(self, keys: Iterable[str]) -> dict[str, str]:
        """Every name by which a file may call the layers of `keys`, and the key that it means."""
        named = {}
        for key in keys:
            named[self.written(key)] = key
            if not _TEXT.fullmatch(key):
                named[f"lora_unet_{key.replace('.', '_')}"] = key
        return named

    def _first(self, name: str) -> str:
        """A layer of diffusers' U-Net as SDXL's first code calls it."""
        each = self.layers_per_block + 1  # a block's layers, and its resampler or one more layer
        if match := _INNER.fullmatch(name):
            block, layer = int(match[2]), int(match[4])
            place = f"input_blocks.{1 + block * each + layer}"
            if match[1] == "up":
                place = f"output_blocks.{block * each + layer}"
            return f"{place}.{int(match[3] == 'attentions')}.{_RESNET.get(match[5], match[5])}"
        if match := _MIDDLE.fullmatch(name):
            place = "1" if match[1] == "attentions" else str(2 * int(match[2]))
            return f"middle_block.{place}.{_RESNET.get(match[3], match[3])}"
        if match := _DOWNSAMPLER.fullmatch(name):
            return f"input_blocks.{(int(match[1]) + 1) * each}.0.op"
        if match := _UPSAMPLER.fullmatch(name):
            block = int(match[1])
            place = f"output_blocks.{(block + 1) * each - 1}"
            return f"{place}.{1 + self.up_has_attention[block]}.conv"
        return _OUTER.get(name, name)


def to_kohya_keys(tensors: AdapterTensors, names: KohyaNames) -> dict[str, Tensor]:
    """A whole file: A, B and alpha = rank (scale 1) of every pair, fp32."""
    state: dict[str, Tensor] = {}
    for key, pair in tensors.items():
        name = names.written(key)
        state[f"{name}.lora_down.weight"] = pair.down.detach().float().cpu().contiguous()
        state[f"{name}.lora_up.weight"] = pair.up.detach().float().cpu().contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(pair.rank))
    return state
