"""What a slot that trained text publishes is what diffusers loads, and what the samples show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from tests.raybooth.training.jobs import make_job
from tests.tiny import write_tiny_base

from raybooth.config import TrainConfig
from raybooth.fleet.publishing import draw_samples, publish_adapter
from raybooth.model.base import encode_prompts, load_base
from raybooth.store import LEARNED, WEIGHTS, Store
from raybooth.subject import Subject
from raybooth.training.pack import Pack

PROMPT = "a photo of <mug> vase"


def test_a_published_slot_with_text_and_tokens_is_diffusers_image(tmp_path: Path) -> None:
    base = load_base(str(write_tiny_base(tmp_path / "tiny")))
    job = make_job(
        "mug",
        num_train_steps=8,
        adapter={"targets": "attention", "text_targets": "attention", "identifier_tokens": 2}
        | {"alpha": 8.0},
        optimizer={"learning_rate": 2e-2},
        samples={"prompts": (PROMPT,), "num_inference_steps": 3},
    )
    train: TrainConfig = job.train
    tensors = replace(
        job.tensors,
        prompts=(PROMPT,),
        instance_conditioning=encode_prompts(base, [PROMPT]),
        photo_digests=("a",),
    )
    job = replace(job, tensors=tensors, class_noun="vase", class_prompt="a photo of a vase")
    photo = tmp_path / "0.png"
    Image.new("RGB", (32, 32)).save(photo)
    subject = Subject("mug", "vase", "<mug>", (photo,), train)
    pack = Pack(base, [job])
    while pack.active:
        pack.step()
    store = Store(tmp_path / "models")
    record = publish_adapter(base, subject, job, pack, store, revision=None, seconds={})
    text = pack.text_adapter(job.job_id)
    (ours,) = draw_samples(base, subject, pack.bank, 1, text)
    (mute,) = draw_samples(base, subject, pack.bank, 1)
    pack.close()

    assert (record.identifier, record.identifier_tokens) == ("<mug>", 2)
    assert record.text_targets == "attention"
    assert {WEIGHTS, LEARNED} <= record.files.keys()
    folder = store.folder(record.reference)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        base.folder, safety_checker=None, local_files_only=True
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        base.scheduler_config, algorithm_type="dpmsolver++", solver_order=2
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder)
    pipeline.load_textual_inversion(folder)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=train.samples.guidance_scale,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(subject.seed),
        output_type="np",
    ).images[0]
    assert _apart(ours, theirs) <= 1
    assert _apart(mute, theirs) > 4


def _apart(ours: Image.Image, theirs: Any) -> float:
    return float(np.abs(np.asarray(ours, dtype=float) - np.round(theirs * 255)).max())
