"""Words that a subject learned: encoded by its own adapter, kept by adapter and scale."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
import torch

from raybooth.config import EngineConfig
from raybooth.errors import StoreError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.learned import LearnedTokens, init_tokens, save_learned
from raybooth.model.lora import (
    AdapterTensors,
    LoraPair,
    find_sites,
    find_text_sites,
    init_pair,
    save_adapter,
)
from raybooth.model.sampler import SampleRequest, denoise_step, row_image, start_row
from raybooth.store import LEARNED, WEIGHTS, AdapterRecord, Store
from raybooth_serving.engine import Engine
from raybooth_serving.loader import Loader
from raybooth_serving.metrics import EngineMetrics
from raybooth_serving.orders import GeneratedImage, Order, Part
from raybooth_serving.prompts import PromptCache
from tests.raybooth_serving.published import publish, random_adapter

PROMPT = "a photo of <mug> vase"
REQUEST = SampleRequest(PROMPT, "red", 3, num_inference_steps=3)


def _text(base: Base) -> AdapterTensors:
    generator = torch.Generator().manual_seed(7)
    return {
        site.key: LoraPair(
            init_pair(site, 2, generator).down,
            torch.randn(site.up_shape(2), generator=generator) * 0.3,
        )
        for site in find_text_sites(base.text_encoders, "all")
    }


@pytest.fixture
def mug(base: Base, store: Store) -> AdapterRecord:
    """A published subject with both: LoRA of the text encoder and two learned tokens."""
    plain = publish(store, base, "mug", 9)
    weights, learned = store.root / ".weights", store.root / ".learned"
    save_adapter(weights, {**random_adapter(base, 9), **_text(base)}, 1.0)
    vectors = init_tokens(base, "cat", 2, torch.Generator().manual_seed(1))
    save_learned(learned, LearnedTokens("<mug>", {p: 3 * v for p, v in vectors.items()}))
    record = plain.model_copy(
        update={"identifier": "<mug>", "identifier_tokens": 2, "text_targets": "all"}
    )
    return store.publish(record, {WEIGHTS: weights, LEARNED: learned})


def _loader(base: Base, store: Store) -> Loader:
    return Loader(store, base, max_rank=4, max_adapters=8, max_bytes=2**30, metrics=EngineMetrics())


def test_a_mixed_batch_with_learned_words_is_each_image_alone(
    base: Base, store: Store, mug: AdapterRecord
) -> None:
    jobs: list[tuple[AdapterRecord | None, SampleRequest]] = [
        (mug, REQUEST),
        (store.fetch("dog-a"), replace(REQUEST, prompt="a photo of sks dog", seed=1)),
        (None, replace(REQUEST, seed=2)),
        (mug, replace(REQUEST, adapter_scale=0.5)),
    ]

    async def together() -> list[GeneratedImage]:
        engine = Engine(base, store, EngineConfig(num_slots=4, max_rank=4, row_buckets=(4,)))
        try:
            orders = [Order((r,), () if record is None else (Part(record),)) for record, r in jobs]
            calls = (engine.generate(order) for order in orders)
            return [image for images in await asyncio.gather(*calls) for image in images]
        finally:
            await engine.close()

    found = [image.picture for image in asyncio.run(together())]
    expected = [_alone(base, store, record, request) for record, request in jobs]
    assert found == expected
    assert len(set(found)) == len(found)


def _alone(base: Base, store: Store, record: AdapterRecord | None, request: SampleRequest) -> bytes:
    sites = find_sites(base.denoiser, "all")
    bank = Bank(base.denoiser, sites=sites, rank=4, num_slots=1, device="cpu")
    if record is not None:
        adapter = _loader(base, store).load([Part(record)])
        bank.write(1, adapter.tensors)
        request = replace(request, slot=1, text=adapter.text)
    row = start_row(base, request)
    while not row.done:
        denoise_step(base, bank, [row], 4)
    bank.detach()
    file = io.BytesIO()
    row_image(base, row).save(file, "PNG")
    return file.getvalue()


def test_embeddings_are_kept_by_adapter_and_scale(
    base: Base, store: Store, mug: AdapterRecord
) -> None:
    metrics = EngineMetrics()
    cache = PromptCache(base, max_prompts=8, max_bytes=2**30, metrics=metrics)
    loader = _loader(base, store)
    learned, plain = (loader.load([Part(each)]) for each in (mug, store.fetch("dog-a")))
    first = cache.encode(PROMPT, learned)
    assert cache.encode(PROMPT, learned) is first
    assert cache.encode(PROMPT, plain) is cache.encode(PROMPT)
    assert cache.encode(PROMPT, learned, 0.5) is not first
    assert (metrics.prompt_encodes, metrics.prompt_hits) == (3, 2)


def test_damaged_tokens_are_refused(base: Base, store: Store, mug: AdapterRecord) -> None:
    path = store.folder(mug.reference) / LEARNED
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        _loader(base, store).load([Part(mug)])
