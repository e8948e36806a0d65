"""Several subjects in one picture = the sum of their deltas = diffusers' `set_adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from tests.tiny import write_tiny_base, write_tiny_sdxl

from raybooth.errors import RequestError
from raybooth.model.bank import Bank
from raybooth.model.base import Base, load_base
from raybooth.model.compose import Share, compose, compose_words, composed_rank
from raybooth.model.learned import LearnedTokens, init_tokens, token_names
from raybooth.model.lora import (
    AdapterTensors,
    LoraPair,
    denoiser_part,
    find_sites,
    find_text_sites,
    init_pair,
    save_adapter,
)
from raybooth.model.sampler import Row, SampleRequest, denoise_step, row_image, start_row
from raybooth.model.text_adapter import TextAdapter

PROMPT = "a photo of <rex> dog and <mug> vase"


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    write = write_tiny_base if request.param == "sd" else write_tiny_sdxl
    return load_base(str(write(folder)))


def _adapter(base: Base, targets: tuple[str, ...], seed: int, rank: int) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    text = find_text_sites(base.text_encoders, "attention")
    return {
        site.key: LoraPair(
            init_pair(site, rank, generator).down,
            torch.randn(site.up_shape(rank), generator=generator) * 0.3,
        )
        for site in (*find_sites(base.denoiser, targets), *text)
    }


def _shares(base: Base) -> list[Share]:
    """Two subjects of other ranks, whose sites overlap in part, each with words of its own."""
    shares = []
    for seed, (word, number, targets) in enumerate(
        [("<rex>", 2, ("to_q", "to_v", "conv1")), ("<mug>", 1, ("to_v", "to_out.0"))]
    ):
        vectors = init_tokens(base, "cat", number, torch.Generator().manual_seed(seed))
        learned = LearnedTokens(word, {part: 3 * tokens for part, tokens in vectors.items()})
        tensors = _adapter(base, targets, seed, rank=2 + seed)
        shares.append(Share(word, tensors, (learned,), (0.8, -0.5)[seed]))
    return shares


def _delta(pair: LoraPair) -> torch.Tensor:
    return pair.up.double().flatten(1) @ pair.down.double().flatten(1)


def test_a_composed_adapter_is_the_sum_of_the_deltas(base: Base) -> None:
    shares = [
        replace(s, tensors={k: LoraPair(*(t.double() for t in p)) for k, p in s.tensors.items()})
        for s in _shares(base)
    ]
    composed = compose(shares)
    assert composed.keys() == shares[0].tensors.keys() | shares[1].tensors.keys()
    ranks = {pair.rank for pair in composed.values()}
    assert ranks == {2, 3, 5}
    assert composed_rank(composed) == 5
    for site, pair in composed.items():
        expected = sum(s.scale * _delta(s.tensors[site]) for s in shares if site in s.tensors)
        assert torch.allclose(_delta(pair), torch.as_tensor(expected), rtol=0, atol=1e-10)


def test_one_word_cannot_mean_two_subjects(base: Base) -> None:
    rex, mug = _shares(base)
    assert compose_words([rex, mug]) == (*rex.learned, *mug.learned)
    (words,) = rex.learned
    twin = replace(mug, name="mug", learned=(LearnedTokens("<rex>_1", words.vectors),))
    with pytest.raises(RequestError, match=r"<rex> and mug have learned the same word.*<rex>_1"):
        compose_words([rex, twin])


def test_a_word_inside_another_is_spelled_once(base: Base) -> None:
    rex, _ = (share.learned[0] for share in _shares(base))
    text = TextAdapter(base, {}, replace(rex, name="ab"), replace(rex, name="xabx"))
    assert text.spell_out("ab and xabx") == "ab ab_1 and xabx xabx_1"


def test_a_picture_is_that_of_diffusers_and_no_neighbour_moves_it(
    base: Base, tmp_path: Path
) -> None:
    shares = _shares(base)
    theirs = _diffusers(base, shares, tmp_path)
    text = TextAdapter(base, compose(shares), *compose_words(shares))
    request = SampleRequest(PROMPT, "red", 3, 3, 5.0, "ddim", slot=1, text=text)
    others = [
        replace(request, slot=2, seed=4, text=TextAdapter(base, shares[0].tensors)),
        replace(request, slot=0, seed=5, text=None),
    ]
    sites = find_sites(base.denoiser, ("to_q", "to_v", "to_out.0", "conv1"))
    bank = Bank(base.denoiser, sites=sites, rank=8, num_slots=2, device="cpu")
    bank.write(1, denoiser_part(compose(shares)))
    bank.write(2, denoiser_part(shares[0].tensors))
    alone, mixed = (
        _denoised(base, bank, [start_row(base, one) for one in ones])
        for ones in ([request], [request, *others])
    )
    bank.detach()
    assert torch.equal(alone.latents_CHW, mixed.latents_CHW)
    ours = np.asarray(row_image(base, alone), dtype=float)
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1


def _denoised(base: Base, bank: Bank, rows: Sequence[Row]) -> Row:
    while not rows[0].done:
        denoise_step(base, bank, rows, 8)
    return rows[0]


def _diffusers(base: Base, shares: Sequence[Share], folder: Path) -> Any:
    is_xl = len(base.text_encoders) > 1
    kind = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    options: dict[str, Any] = {"add_watermarker": False} if is_xl else {"safety_checker": None}
    pipeline: Any = kind.from_pretrained(base.folder, local_files_only=True, **options)
    pipeline.scheduler = DDIMScheduler.from_config(
        base.scheduler_config, clip_sample=False, thresholding=False
    )
    pipeline.set_progress_bar_config(disable=True)
    for place, share in enumerate(shares):
        save_adapter(folder / f"{place}.safetensors", share.tensors, 1.0)
        pipeline.load_lora_weights(
            folder, weight_name=f"{place}.safetensors", adapter_name=f"{place}"
        )
        for words in share.learned:
            for tokens_ND, number in zip(words.vectors.values(), ("", "_2"), strict=False):
                pipeline.load_textual_inversion(
                    tokens_ND,
                    token=token_names(words.name, words.num_tokens),
                    text_encoder=getattr(pipeline, f"text_encoder{number}"),
                    tokenizer=getattr(pipeline, f"tokenizer{number}"),
                )
    pipeline.set_adapters(["0", "1"], [share.scale for share in shares])
    return pipeline(
        PROMPT,
        negative_prompt="red",
        generator=torch.Generator().manual_seed(3),
        num_inference_steps=3,
        guidance_scale=5.0,
        height=32,
        width=32,
        output_type="np",
    ).images[0]
