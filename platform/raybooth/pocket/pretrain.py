"""Pretraining the pocket base from a seed: world, tokenizer, VAE, latents, denoiser.

Each stage leaves its state in the work folder, whole or not at all; a resumed run goes on there.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from raybooth.errors import InputError
from raybooth.pocket import world
from raybooth.pocket.corpus import CorpusConfig, build_corpus, pixels
from raybooth.pocket.denoiser import (
    DenoiserConfig,
    encode_corpus,
    new_denoiser,
    new_text_encoder,
    train_denoiser,
)
from raybooth.pocket.export import export_base, load_base
from raybooth.pocket.loop import Loop, LoopConfig
from raybooth.pocket.progress import stage
from raybooth.pocket.team import Team, run_together
from raybooth.pocket.tokenizer import LENGTH, write_tokenizer
from raybooth.pocket.vae import VaeConfig, new_vae, psnr, train_vae

_HELD_OUT_SEED = 77_000_000


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the weights; `init` is a base folder to start from, if any."""

    seed: int = 0
    device: str = "cpu"
    shares: int = 2
    processes: int = 1
    init: Path | None = None
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)


def gpu_config(seed: int = 0, steps: int = 20_000) -> PretrainConfig:
    """The same base with batches for one GPU and many more samples."""
    vae, denoiser = VaeConfig(), DenoiserConfig()
    return PretrainConfig(
        seed=seed,
        device="cuda",
        shares=1,
        corpus=CorpusConfig(pictures=200_000, workers=os.cpu_count() or 2),
        vae=replace(
            vae,
            batch=256,
            loop=replace(vae.loop, steps=8_000, decay_steps=3_000),
        ),
        denoiser=replace(
            denoiser,
            batch=512,
            loop=replace(denoiser.loop, steps=steps, decay_steps=steps // 4, ema=0.9995),
        ),
    )


def pretrain(config: PretrainConfig, out: Path, work: Path, resume: bool) -> dict[str, Any]:
    """Trains a base into `out`, returns its record; resumed equals uninterrupted, bit for bit.

    `config.shares` parts of each batch are computed by `config.processes` processes.
    """
    if config.shares % config.processes:
        found = f"{config.shares} shares, {config.processes} processes"
        raise InputError("shares must divide among processes", found, "change one of them")
    _claim(config, work, resume)
    with stage("world", config.corpus.pictures) as tell:
        build_corpus(config.corpus, work / "corpus", lambda done, _: tell(done, "pictures"))
    write_tokenizer(work / "tokenizer")
    run_together(partial(_train, config, out, work), config.shares, config.processes)
    record: dict[str, Any] = json.loads((out / "record.json").read_text(encoding="utf-8"))
    return record


def _train(config: PretrainConfig, out: Path, work: Path, team: Team) -> None:
    """Every stage after the corpus, in one process of the team; the first of them exports."""
    corpus, tokenizer = work / "corpus", work / "tokenizer"
    captions = json.loads((corpus / "captions.json").read_text(encoding="utf-8"))
    tokens = len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))
    parts = _parts(config, tokens)
    vae, seed = parts["vae"], config.seed
    loops: dict[str, Loop] = {}
    if config.init is None:
        with _training("vae", config.vae.loop, team) as watch:
            loops["vae"] = train_vae(vae, config.vae, corpus, work / "vae.pt", seed, watch, team)
    latents_NChw = _latents(vae, corpus, work, config.init is None, team)
    tokens_NT, empty_T = tokenize(tokenizer, captions)
    with _training("denoiser", config.denoiser.loop, team) as watch:
        loops["denoiser"] = train_denoiser(
            parts["denoiser"],
            parts["text_encoder"],
            config.denoiser,
            latents_NChw,
            tokens_NT,
            empty_T,
            work / "denoiser.pt",
            seed,
            watch,
            team,
        )
    if team.leads:
        record = record_of(config, vae, loops)
        export_base(vae, parts["denoiser"], parts["text_encoder"], tokenizer, record, out)


def tokenize(folder: Path, captions: list[str]) -> tuple[Tensor, Tensor]:
    """(token ids of the captions [N, T], of the empty caption [T])."""
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(
        [*captions, ""],
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids[:-1].to(torch.int32), ids[-1].to(torch.int32)


def held_out(n: int) -> Any:
    """n pictures of seeds that no corpus holds, bytes [N, H, W, C]."""
    return np.stack([pixels(world.example(_HELD_OUT_SEED + i)[0]) for i in range(n)])


def record_of(config: PretrainConfig, vae: Any, loops: dict[str, Loop]) -> dict[str, Any]:
    """What was done, with what, for how long: the record beside the weights."""
    packages = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pillow")
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else _processor()
    settings = asdict(config)
    settings["init"] = None if config.init is None else "given weights"
    return {
        "data_seed": config.corpus.data_seed,
        "seed": config.seed,
        "stages": {
            name: {
                "steps": loop.step,
                "steps_planned": loop.config.steps,
                "samples_seen": loop.rows,
                "loss": round(loop.loss, 5),
                "seconds": round(loop.seconds),
            }
            for name, loop in loops.items()
        },
        "vae_psnr_db": round(psnr(vae, held_out(64)), 2),
        "seconds": round(sum(loop.seconds for loop in loops.values())),
        "hardware": {"device": device, "cores": os.cpu_count(), "processes": config.processes},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "config": settings,
        "go_on": "raybooth pocket pretrain --init shipped --device cuda",
    }


def _claim(config: PretrainConfig, work: Path, resume: bool) -> None:
    """Refuses to mix runs: state must be asked for, and come from the same seed and shapes."""
    shapes = {"vae": _shape(config.vae), "denoiser": _shape(config.denoiser)}
    mine = json.loads(
        json.dumps(
            {"seed": config.seed, "corpus": asdict(config.corpus) | {"workers": 0}, **shapes}
        )
    )
    claim = work / "claim.json"
    if claim.exists():
        theirs = json.loads(claim.read_text(encoding="utf-8"))
        if not resume:
            raise InputError(
                "this folder holds a pretraining already",
                str(work),
                "resume it, or choose another work folder",
            )
        if theirs != mine:
            changed = ", ".join(key for key in mine if theirs.get(key) != mine[key])
            raise InputError(
                "cannot resume with another configuration",
                f"changes in {changed}",
                "choose another work folder",
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    beside = claim.with_suffix(".partial")
    beside.write_text(json.dumps(mine), encoding="utf-8")
    os.replace(beside, claim)


def _shape(config: VaeConfig | DenoiserConfig) -> dict[str, Any]:
    """What may not change between a run and its resumption; steps, batch and rates may."""
    return {key: value for key, value in asdict(config).items() if key not in ("loop", "batch")}


def _parts(config: PretrainConfig, tokens: int) -> dict[str, Any]:
    if config.init is not None:
        pipeline = load_base(config.init, config.device)
        return {
            "vae": pipeline.vae,
            "denoiser": pipeline.unet,
            "text_encoder": pipeline.text_encoder,
        }
    vae = new_vae(config.vae, config.seed)
    size = world.SIZE // 2 ** (len(config.vae.channels) - 1)
    return {
        "vae": vae.to(config.device),
        "denoiser": new_denoiser(config.denoiser, config.vae.latent_channels, size, config.seed).to(
            config.device
        ),
        "text_encoder": new_text_encoder(config.denoiser, tokens, config.seed).to(config.device),
    }


def _latents(vae: Any, corpus: Path, work: Path, fit: bool, team: Team) -> Tensor:
    """The corpus as scaled latents; with fit, the scaling factor is computed from them."""
    path = work / "latents_NChw.npy"
    if team.leads and not path.exists():
        n = len(np.load(corpus / "pictures_NHWC.npy", mmap_mode="r"))
        with stage("latents", n) as tell:
            encode_corpus(vae, corpus, path, lambda done, _: tell(done, "pictures"))
    team.wait()
    latents_NChw: Tensor = torch.from_numpy(np.load(path))
    if fit:
        vae.register_to_config(scaling_factor=1.0 / float(latents_NChw.float().std()))
    scaled_NChw: Tensor = (latents_NChw.float() * vae.config.scaling_factor).half()
    return scaled_NChw


def _processor() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def _training(name: str, config: LoopConfig, team: Team) -> Iterator[Callable[[Loop], None]]:
    """A stage whose progress is a loop's: train step, loss, samples each second."""
    if not team.leads:
        yield lambda loop: None
        return
    with stage(name, config.steps) as tell:
        yield lambda loop: tell(
            loop.step, f"loss {loop.loss:.4f}, {loop.rows / max(loop.seconds, 1e-9):.0f} samples/s"
        )
