"""Two tiny judges of pocket pictures in transformers' own formats: a CLIP and an instance embedder.

Both learn what true renders show, blurred and noised a little; they never see a sample. Words have
fixed directions ("codes"): the [CLS] token of the embedder points along the codes of everything
that makes an instance (never of the place), so that its cosine counts what two pictures share. Both
towers of the CLIP (Radford et al. 2021) point along the codes of what a caption can name, and are
trained by contrast as well.

B batch, H = W = 64, C = 3, D features, K words of one kind, T tokens.
"""

import json
import platform
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from raybooth.pocket import world
from raybooth.pocket.classifier import softened
from raybooth.pocket.corpus import CorpusConfig, build_corpus
from raybooth.pocket.evaluator_figures import clip_figures, embedder_figures
from raybooth.pocket.loop import numbers
from raybooth.pocket.palette import COLORS
from raybooth.pocket.progress import stage
from raybooth.pocket.tokenizer import LENGTH, write_tokenizer
from raybooth.pocket.vae import as_tensor

_COLORS = tuple(COLORS)
INSTANCE_WORDS: dict[str, tuple[str, ...]] = {
    "class_noun": world.CLASSES,
    "a": _COLORS,
    "b": _COLORS,
    "e": _COLORS,
    "h": _COLORS,
    "pattern": world.PATTERNS,
    "emblem": world.EMBLEMS,
    "hat": world.HATS,
}
CAPTION_WORDS: dict[str, tuple[str, ...]] = {
    "class_noun": world.CLASSES,
    "a": _COLORS,
    "context": tuple(world.CONTEXTS),
}
_HIDDEN_WITHOUT = {"e": "emblem", "h": "hat"}
"""Colours that nobody sees when the thing they colour is not there."""

_SHARPNESS = {"embedder": 1.5, "clip": 16.0}
_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": world.SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": world.SIZE, "width": world.SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}


@dataclass(frozen=True)
class EvaluatorsConfig:
    """Everything that decides the two judges."""

    seed: int = 0
    pictures: int = 40_000
    batch: int = 64
    learning_rate: float = 1e-3
    embedder_steps: int = 1_000
    clip_steps: int = 900
    width: int = 128
    layers: int = 3
    patch: int = 16


def train_evaluators(config: EvaluatorsConfig, work: Path, out: Path) -> dict[str, Any]:
    """Trains `out/embedder` and `out/clip` (fp16 safetensors) on the corpus of the work folder.

    Returns what is written to `out/record.json`: figures on held-out individuals among it.
    """
    corpus = CorpusConfig(pictures=config.pictures)
    with stage("world", corpus.pictures) as tell:
        build_corpus(corpus, work / "corpus", lambda done, _: tell(done, "pictures"))
    pictures_NHWC = np.load(work / "corpus" / "pictures_NHWC.npy", mmap_mode="r")
    captions = json.loads((work / "corpus" / "captions.json").read_text(encoding="utf-8"))
    seeds = range(corpus.data_seed, corpus.data_seed + corpus.pictures)
    started = time.process_time()
    with stage("embedder", config.embedder_steps) as tell:
        embedder = _train_embedder(config, pictures_NHWC, _instance_labels(seeds), tell)
    save_evaluator(embedder, out / "embedder")
    write_tokenizer(out / "clip")
    tokenizer: Any = CLIPTokenizer.from_pretrained(out / "clip")
    with stage("clip", config.clip_steps) as tell:
        clip = _train_clip(
            config, pictures_NHWC, captions[: config.pictures], seeds, tokenizer, tell
        )
    save_evaluator(clip, out / "clip")
    record = {
        "config": asdict(config),
        "data_seed": corpus.data_seed,
        "cpu_seconds": round(time.process_time() - started),
        "embedder": embedder_figures(embedder.eval()),
        "clip": clip_figures(clip.eval(), tokenizer),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "pillow")},
        },
    }
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def new_embedder(config: EvaluatorsConfig) -> Any:
    """An untrained Dinov2Model; its [CLS] token is the embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Dinov2Model(
            Dinov2Config(
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=4,
                mlp_ratio=3,
                image_size=world.SIZE,
                patch_size=config.patch,
                layerscale_value=1.0,
            )
        )


def new_clip(config: EvaluatorsConfig, tokenizer: Any) -> Any:
    """An untrained CLIPModel that reads the pocket base's tokens."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": config.width,
        "intermediate_size": 3 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": 4,
        "image_size": world.SIZE,
        "patch_size": config.patch,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def save_evaluator(model: Any, folder: Path) -> None:
    """Writes config.json, preprocessor_config.json and float16 model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = _without_paths(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(_IMAGES, indent=2) + "\n", encoding="utf-8"
    )
    half = {key: tensor.half().contiguous() for key, tensor in model.state_dict().items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config without the folder names of the machine that wrote it, in its parts too."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "_name_or_path"
    }


def _train_embedder(
    config: EvaluatorsConfig,
    pictures_NHWC: Any,
    labels: dict[str, Tensor],
    tell: Callable[[int, str], None],
) -> Any:
    embedder = new_embedder(config)
    codes = _codes(INSTANCE_WORDS, config.width)

    def loss(step: int) -> Tensor:
        rows_B, pictures_BCHW = _batch(config, pictures_NHWC, "instances", step)
        cls_BD = embedder(pixel_values=pictures_BCHW).last_hidden_state[:, 0]
        named = sum(
            _naming(cls_BD, codes[kind], labels[kind][rows_B], _SHARPNESS["embedder"])
            for kind in INSTANCE_WORDS
        )
        space_WD = torch.cat(list(codes.values()))
        inside_B = (cls_BD @ space_WD.T).square().sum(1) / cls_BD.square().sum(1)
        outside: Tensor = 1 - inside_B.mean()  # what no word explains must not move the cosine
        return named + 2 * outside

    _descend(embedder, loss, config, config.embedder_steps, tell)
    return embedder


def _train_clip(
    config: EvaluatorsConfig,
    pictures_NHWC: Any,
    captions: list[str],
    seeds: range,
    tokenizer: Any,
    tell: Callable[[int, str], None],
) -> Any:
    clip = new_clip(config, tokenizer)
    codes = _codes(CAPTION_WORDS, 64)
    shown = _shown_labels(seeds)
    said = _said_labels(captions)
    ids_NT = tokenizer(captions, padding=True, return_tensors="pt").input_ids

    def loss(step: int) -> Tensor:
        rows_B, pictures_BCHW = _batch(config, pictures_NHWC, "captions", step)
        out = clip(pixel_values=pictures_BCHW, input_ids=ids_NT[rows_B])
        named = torch.zeros(())
        for kind, code_KD in codes.items():
            for embeds_BD, labels in ((out.image_embeds, shown), (out.text_embeds, said)):
                sharp = _SHARPNESS["clip"]
                named = named + _naming(embeds_BD, code_KD, labels[kind][rows_B], sharp)
        same_BB = (ids_NT[rows_B][:, None] == ids_NT[rows_B][None]).all(-1).float()
        target_BB = same_BB / same_BB.sum(1, keepdim=True)
        contrast = functional.cross_entropy(out.logits_per_image, target_BB)
        contrast = contrast + functional.cross_entropy(out.logits_per_text, target_BB)
        return named + 0.25 * contrast

    _descend(clip, loss, config, config.clip_steps, tell)
    return clip


def _descend(
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: EvaluatorsConfig,
    steps: int,
    tell: Callable[[int, str], None],
) -> None:
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=0.02, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps, pct_start=0.06, cycle_momentum=False
    )
    slow = 0.0
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        slow += (loss.item() - slow) / min(step + 1, 50)
        tell(step + 1, f"loss {slow:.3f}")


def _batch(
    config: EvaluatorsConfig, pictures_NHWC: Any, purpose: str, step: int
) -> tuple[Tensor, Tensor]:
    """(rows of the corpus [B], their pictures, softened)."""
    rng = numbers(config.seed, purpose, step)
    rows_B = torch.randint(0, config.pictures, (config.batch,), generator=rng).sort().values
    return rows_B, softened(as_tensor(pictures_NHWC[rows_B.numpy()]), rng)


def _codes(words: Mapping[str, tuple[str, ...]], width: int) -> dict[str, Tensor]:
    """Orthonormal directions [K, D] for the words of each kind; the same in every run."""
    counts = [len(group) for group in words.values()]
    noise_DW = torch.randn(width, sum(counts), generator=torch.Generator().manual_seed(7))
    basis_DW = torch.linalg.qr(noise_DW).Q
    return dict(zip(words, basis_DW.T.split(counts), strict=True))


def _naming(features_BD: Tensor, codes_KD: Tensor, label_B: Tensor, sharpness: float) -> Tensor:
    """Cross entropy of naming the word; where nothing is to be named (-1), of naming none."""
    K = len(codes_KD)
    target_BK = functional.one_hot(label_B.clamp(min=0), K).float()
    target_BK = torch.where(label_B[:, None] < 0, torch.full_like(target_BK, 1 / K), target_BK)
    return functional.cross_entropy(sharpness * features_BD @ codes_KD.T, target_BK)


def _instance_labels(seeds: range) -> dict[str, Tensor]:
    instances = [world.draw_instance(seed) for seed in seeds]
    labels = {
        kind: torch.tensor([words.index(getattr(one, kind)) for one in instances])
        for kind, words in INSTANCE_WORDS.items()
    }
    for colour, thing in _HIDDEN_WITHOUT.items():
        labels[colour][labels[thing] == 0] = -1
    return labels


def _shown_labels(seeds: range) -> dict[str, Tensor]:
    instances = _instance_labels(seeds)
    places = tuple(world.CONTEXTS)
    drawn = [random.Random(f"context:{seed}").choice(places) for seed in seeds]
    context = torch.tensor([places.index(name) for name in drawn])
    return {"class_noun": instances["class_noun"], "a": instances["a"], "context": context}


def _said_labels(captions: list[str]) -> dict[str, Tensor]:
    """What each caption names, -1 where it is silent."""
    phrases = {name: (phrase, *world.SYNONYMS[name]) for name, phrase in world.CONTEXTS.items()}
    rows = []
    for text in captions:
        place = next((i for i, known in enumerate(phrases.values()) if text.endswith(known)), -1)
        said = text.split()
        if place >= 0:  # "on a blue rug" names no colour of the thing
            phrase = next(p for p in list(phrases.values())[place] if text.endswith(p))
            said = text.removesuffix(phrase).split()
        rows.append((_first(said, world.CLASSES), _first(said, _COLORS), place))
    return dict(zip(CAPTION_WORDS, torch.tensor(rows).unbind(1), strict=True))


def _first(said: list[str], words: tuple[str, ...]) -> int:
    return next((words.index(word) for word in said if word in words), -1)
