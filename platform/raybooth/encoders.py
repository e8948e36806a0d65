"""The two judges of pictures, through transformers' own classes: an image encoder and a CLIP.

Image encoders are ViTs whose [CLS] token is the embedding: DINO (Caron et al. 2021), DINOv2 (Oquab
et al. 2023) or the pocket world's own. All embeddings have unit length, fp32, one picture at a time
in the model's order, so that neighbours cannot matter.

N pictures or prompts, D features, L layers, T patch tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from raybooth.errors import EncoderError

POCKET = "pocket"
WEIGHTS = "model.safetensors"
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = ("*.json", "*.txt", WEIGHTS)


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A ViT; cosines of its [CLS] tokens are subject fidelity."""

    source: str
    fingerprint: str
    """sha256 of the weights file."""
    model: nn.Module
    processor: Any

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit [CLS] tokens [N, D], after the last norm."""
        with torch.no_grad():
            tokens = [self._outputs(image).last_hidden_state[:, 0] for image in images]
        return functional.normalize(torch.cat(tokens).float(), dim=-1).cpu()

    def patches(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit patch tokens [N, L, T, D] of every layer."""
        with torch.no_grad():
            layers = [
                torch.cat(self._outputs(image, output_hidden_states=True).hidden_states[1:])
                for image in images
            ]
        return functional.normalize(torch.stack(layers)[:, :, 1:].float(), dim=-1).cpu()

    def _outputs(self, image: Image.Image, **options: Any) -> Any:
        return self.model(pixel_values=_pixels(self.processor, image, self.model), **options)


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """A CLIP (Radford et al. 2021): pictures and prompts in one space."""

    source: str
    fingerprint: str
    model: nn.Module
    processor: Any
    tokenizer: Any

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit image embeddings [N, D]."""
        model = cast(Any, self.model)
        with torch.no_grad():
            rows = [
                model.get_image_features(
                    pixel_values=_pixels(self.processor, image, model)
                ).pooler_output
                for image in images
            ]
        return functional.normalize(torch.cat(rows).float(), dim=-1).cpu()

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings [N, D]; raises EncoderError for a prompt that would be cut."""
        model = cast(Any, self.model)
        limit = int(model.config.text_config.max_position_embeddings)
        rows = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
            if ids.shape[1] > limit:
                found = f"{prompt!r}: {ids.shape[1]} tokens, {limit} fit"
                raise EncoderError(f"a prompt is too long for {self.source}", found, "shorten it")
            with torch.no_grad():
                features = model.get_text_features(input_ids=ids.to(model.device))
            rows.append(features.pooler_output)
        return functional.normalize(torch.cat(rows).float(), dim=-1).cpu()


@dataclass(frozen=True, eq=False)
class Encoders:
    """Both judges."""

    image: ImageEncoder
    clip: ClipEncoder


def load_encoders(
    image: str = POCKET, clip: str = POCKET, device: torch.device | str = "cpu"
) -> Encoders:
    """Both judges: `pocket`, a folder, or a Hub id pinned as `org/name@<40-digit commit>`.

    Reads safetensors only. Raises EncoderError.
    """
    return Encoders(load_image_encoder(image, device), load_clip(clip, device))


def load_image_encoder(source: str = POCKET, device: torch.device | str = "cpu") -> ImageEncoder:
    """A ViT that transformers' AutoModel knows."""
    from transformers import AutoModel

    folder = encoder_folder(source, "embedder")
    kind = _kind(folder)
    if "vit" not in kind and "dino" not in kind:
        do = "give a ViT, DINO or DINOv2, as facebook/dino-vits16"
        raise EncoderError(f"{source} is not an image encoder with a [CLS] token", kind, do)
    model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    return ImageEncoder(source, _fingerprint(folder), _frozen(model, device), _processor(folder))


def load_clip(source: str = POCKET, device: torch.device | str = "cpu") -> ClipEncoder:
    """A CLIPModel with its tokenizer."""
    from transformers import AutoTokenizer, CLIPModel

    folder = encoder_folder(source, "clip")
    kind = _kind(folder)
    if kind != "clip":
        do = "give a CLIP, as openai/clip-vit-base-patch32"
        raise EncoderError(f"{source} is not a CLIP", kind, do)
    model = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fingerprint = _fingerprint(folder)
    return ClipEncoder(source, fingerprint, _frozen(model, device), _processor(folder), tokenizer)


def encoder_folder(source: str, pocket_part: str) -> Path:
    """The whole folder that `source` means, fetched if it must be; raises EncoderError.

    `pocket_part` is `embedder` or `clip`.
    """
    if source == POCKET:
        from raybooth import pocket

        folder = pocket.path() / "evaluators" / pocket_part
    else:
        folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _fetch(source)
    for name in ("config.json", "preprocessor_config.json", WEIGHTS):
        if not (folder / name).is_file():
            do = f"give a folder that save_pretrained wrote, with {WEIGHTS} and its processor"
            raise EncoderError(f"{source} is not a whole encoder", f"no {name} in {folder}", do)
    return folder


def encoder_fingerprint(source: str, pocket_part: str) -> str:
    """sha256 of the weights that `source` means, without loading them; raises EncoderError."""
    return _fingerprint(encoder_folder(source, pocket_part))


def _fetch(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    match = _HUB_ID.fullmatch(source)
    if match is None:
        do = "give `pocket`, a folder, or a Hub id as org/name@commit"
        raise EncoderError(f"no encoder is called {source!r}", f"no folder {source}", do)
    revision = match["revision"]
    if revision is None or not _COMMIT.fullmatch(revision):
        raise EncoderError(
            f"the Hub id {match['name']} must be pinned to a commit",
            f"revision {revision!r}",
            f"write {match['name']}@ and the 40 hexadecimal digits of a commit",
        )
    try:
        return Path(
            snapshot_download(match["name"], revision=revision, allow_patterns=list(_HUB_FILES))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        found = " ".join(str(error).split())[:300]
        do = "check the id, the commit, your token and the network, or give a local folder"
        raise EncoderError(f"the Hub did not give {source}", found, do) from error


def _kind(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)


def _pixels(processor: Any, image: Image.Image, model: Any) -> Tensor:
    pixels_1CHW: Tensor = processor(image, return_tensors="pt").pixel_values
    return pixels_1CHW.to(model.device)


def _fingerprint(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _frozen(model: Any, device: torch.device | str) -> nn.Module:
    module: nn.Module = model.to(device).eval().requires_grad_(False)
    return module
