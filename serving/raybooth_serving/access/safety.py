"""diffusers' safety checker over finished pictures (Rando et al. 2022 on what it looks for).

A CLIP image encoder whose cosines with 17 concepts are held against a threshold each; 3 concepts of
special care lower them. `safety.checker` names a folder or a Hub id, as a pipeline keeps it
(`safety_checker/` and `feature_extractor/`) or with all of it side by side.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raybooth.config import SafetyConfig
from raybooth.errors import ConfigError
from raybooth_serving.errors import UnfitImageError

_PARTS = (("safety_checker/", "feature_extractor/"), ("", ""))
_MODEL = ("config.json", "model.safetensors")
_IMAGES = "preprocessor_config.json"
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)@(?P<commit>[0-9a-f]{40})")


class SafetyChecker:
    """Says which pictures must not be sent; one picture at a time, from any thread."""

    def __init__(self, config: SafetyConfig, device: torch.device | str) -> None:
        """Of `config.checker`; raises ConfigError for one that is not there or not whole."""
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        assert config.checker is not None
        self.on_flag = config.on_flag
        folder = Path(config.checker).expanduser()
        model_folder, images_folder = _find(folder if folder.is_dir() else _fetch(config.checker))
        model, told = StableDiffusionSafetyChecker.from_pretrained(
            model_folder, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted({*told["missing_keys"], *told["mismatched_keys"]}):
            found = ", ".join(map(str, missing[:3]))
            what = f"{model_folder} holds no whole safety checker"
            raise ConfigError(what, f"no weights for {found}", "get a whole copy")
        self._model = model.to(device).eval().requires_grad_(False)
        self._pixels: Any = CLIPImageProcessor.from_pretrained(images_folder)

    def flags(self, image: Image.Image) -> bool:
        """Whether `image` must not be sent."""
        pixels_1CHW = self._pixels(images=[image], return_tensors="pt").pixel_values
        blank_11C = np.zeros((1, 1, 3))  # the model would blacken what it flags; only it is asked
        with torch.no_grad():
            _, flags = self._model(pixels_1CHW.to(self._model.device), [blank_11C])
        return bool(flags[0])

    def finished(self, image: Image.Image) -> tuple[Image.Image, bool]:
        """The picture to send and whether it was flagged; raises UnfitImageError."""
        if not self.flags(image):
            return image, False
        if self.on_flag == "refuse":
            do = "try another prompt or seed"
            raise UnfitImageError("the safety checker refuses the image that was made", "", do)
        return black(image), True

    def partial(self, image: Image.Image) -> Image.Image:
        """A picture on its way: black where it is flagged, whether or not the last one will be."""
        return black(image) if self.flags(image) else image


def black(image: Image.Image) -> Image.Image:
    """Nothing, in the size of `image`."""
    return Image.new("RGB", image.size)


def _find(folder: Path) -> tuple[Path, Path]:
    """The folders of the model and of its image processor."""
    for model, images in _PARTS:
        names = [*(model + name for name in _MODEL), images + _IMAGES]
        if all((folder / name).is_file() for name in names):
            return folder / model, folder / images
    names = [*(_PARTS[0][0] + name for name in _MODEL), _PARTS[0][1] + _IMAGES]
    missing = [name for name in names if not (folder / name).is_file()]
    do = "give a folder with a safety checker in safetensors, or org/name@commit"
    raise ConfigError(f"no safety checker in {folder}", f"no {', '.join(missing)}", do)


def _fetch(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    match = _HUB_ID.fullmatch(source)
    if match is None:
        do = "give a folder, or org/name@ and the 40 hexadecimal digits of a commit"
        raise ConfigError("safety.checker cannot be used", repr(source), do)
    wanted = [name for m, i in _PARTS for name in (*(m + file for file in _MODEL), i + _IMAGES)]
    try:
        return Path(
            snapshot_download(match["name"], revision=match["commit"], allow_patterns=wanted)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        found = " ".join(str(error).split())[:300]
        do = "check the id, the commit, your token and the network, or give a local folder"
        raise ConfigError(f"the Hub did not give {source}", found, do) from error
