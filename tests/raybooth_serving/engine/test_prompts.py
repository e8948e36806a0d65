"""Words that a subject learned: encoded by its own adapter, kept by adapter and scale."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from raybooth.config import EngineConfig
from raybooth.errors import RequestError, StoreError
from raybooth.model.bank import Bank
from raybooth.model.base import Base
from raybooth.model.families import Conditioning
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
from raybooth_serving.engine.loader import HostAdapter, Loader
from raybooth_serving.engine.loop import Engine
from raybooth_serving.engine.orders import GeneratedImage, Order, Part
from raybooth_serving.engine.prompts import PromptCache
from raybooth_serving.metrics import EngineMetrics
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


def _cache(base: Base, max_bytes: int = 2**30) -> PromptCache:
    return PromptCache(base, max_prompts=64, max_bytes=max_bytes, metrics=EngineMetrics())


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


def test_threads_that_encode_for_different_subjects_do_not_mix(
    base: Base, store: Store, mug: AdapterRecord
) -> None:
    """The base's text encoders are shared: one thread's LoRA must not be in another's prompt."""
    learned, asked = _loader(base, store).load([Part(mug)]), [f"{PROMPT} {n}" for n in range(6)]

    def encoded(cache: PromptCache, job: tuple[str, HostAdapter | None, float]) -> Conditioning:
        return cache.encode(*job)

    jobs = [(p, who, scale) for p in asked for who, scale in ((None, 1.0), (learned, 1.0))] * 3
    alone = [encoded(_cache(base), job) for job in jobs[:12]] * 3
    cache = _cache(base)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: encoded(cache, job), jobs))
    for ours, expected in zip(found, alone, strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert cache.metrics.prompt_encodes == 12


def test_a_forgotten_subject_leaves_no_embedding(
    base: Base, store: Store, mug: AdapterRecord
) -> None:
    cache, dog = _cache(base), Part(store.fetch("dog-a"), 0.5)
    loader = _loader(base, store)
    cache.encode(PROMPT)
    plain = cache.metrics.prompt_bytes
    both = loader.load([Part(mug, 0.5), dog])
    cache.encode(PROMPT, loader.load([Part(mug)]))
    cache.encode(PROMPT, both)
    assert cache.metrics.prompt_bytes == 3 * plain > 0
    cache.forget("dog-a")
    assert cache.metrics.prompt_bytes == 2 * plain
    cache.forget("mug")
    assert cache.metrics.prompt_bytes == plain


def test_embeddings_are_bounded_by_bytes(base: Base) -> None:
    cache = _cache(base)
    cache.encode("a dog")
    tight = _cache(base, max_bytes=2 * cache.metrics.prompt_bytes)
    for prompt in ("a dog", "a cat", "a dog", "a robot", "a dog", "a cat"):
        tight.encode(prompt)
    assert (tight.metrics.prompt_encodes, tight.metrics.prompt_hits) == (4, 2)


def test_learned_words_of_two_subjects_share_a_prompt(
    base: Base, store: Store, mug: AdapterRecord
) -> None:
    twin = store.publish(mug, {name: store.folder("mug") / name for name in mug.files})
    with pytest.raises(RequestError, match="have learned the same word: found <mug>"):
        _loader(base, store).load([Part(mug), Part(twin)])
    dog = store.fetch("dog-a")
    both = _loader(base, store).load([Part(mug, 0.5), Part(dog)])
    alone = _loader(base, store).load([Part(mug)])
    halved = _cache(base).encode(PROMPT, alone, 0.5)
    for name, expected in _cache(base).encode(PROMPT, both).items():
        assert torch.allclose(expected, halved[name], rtol=0, atol=1e-5)


def test_damaged_tokens_are_refused(base: Base, store: Store, mug: AdapterRecord) -> None:
    path = store.folder(mug.reference) / LEARNED
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        _loader(base, store).load([Part(mug)])
