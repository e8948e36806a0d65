"""An extracted adapter is a version like any other, draws what the full model draws, and says
what was lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.raybooth.model.test_extract import Tuned, moved, weights_of
from tests.tiny import write_tiny_base

from raybooth.errors import BaseModelError, InputError
from raybooth.extract import extract_adapter, extract_request, publish_extract
from raybooth.model.base import Base, load_base
from raybooth.model.full_weights import save_full
from raybooth.model.published import take_on, text_of
from raybooth.model.sampler import SampleRequest, generate
from raybooth.store import BaseRecord, FullRecord, PhotoRecord, Record, Store

PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("extract") / "tiny")


def publish_full(
    store: Store, base: Base, tuned: Tuned, photos: tuple[PhotoRecord, ...] = ()
) -> FullRecord:
    """`rex` as a full fine-tune with these weights."""
    place = store.root.parent / "weights"
    place.mkdir(parents=True, exist_ok=True)
    record = FullRecord(
        subject_id="rex",
        job_id="rex-full",
        class_noun="dog",
        identifier="sks",
        instance_prompt=PROMPT,
        class_prompt="a photo of a dog",
        base=BaseRecord(name=base.name, fingerprint=base.fingerprint),
        parts=tuple(tuned),
        num_parameters=1,
        train={"resolution": 32, "samples": {"num_inference_steps": 3}},
        photos=photos,
        prior=None,
        loss_curve=((1, 0.5),),
        num_train_steps=1,
        seconds={},
        versions={},
    )
    return store.publish(record, save_full(place, tuned))


def drawn(folder: Path, store: Store, record: Record) -> Image.Image:
    base = load_base(str(folder))
    files = store.folder(record.reference)
    text, bank = text_of(base, record, files), take_on(base, record, files)
    slot = 0 if bank is None else 1
    request = SampleRequest(PROMPT, seed=5, num_inference_steps=4, slot=slot, text=text)
    return generate(base, bank, [request])[0]


def apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def test_a_change_of_low_rank_draws_the_full_models_picture(folder: Path, tmp_path: Path) -> None:
    base, store = load_base(str(folder)), Store(tmp_path / "models")
    full = publish_full(store, base, moved(base, rank=2)[0])
    request = extract_request(full, rank=4)
    record = publish_extract(store, *extract_adapter(base, request, store.folder(full.reference)))
    assert (record.reference, record.rank, record.kind) == ("rex@2", 4, "adapter")
    assert (record.targets, record.text_targets) == ("all", "all")
    assert record.train == full.train
    assert store.published_job("rex", request.job_id) == record == store.fetch("rex")
    loss = record.extracted
    assert loss is not None
    assert loss.source == "rex@1"
    assert loss.files["unet.safetensors"] == full.files["unet.safetensors"].sha256
    assert max(loss.sites_error, loss.total_error, *loss.sites.values()) < 1e-5
    assert loss.outside_energy == 0.0
    assert [output.timestep for output in loss.outputs] == [125, 375, 625, 875]
    assert all(output.of_move < 1e-4 for output in loss.outputs)
    picture = drawn(folder, store, full)
    assert apart(drawn(folder, store, record), picture) <= 1
    plain = generate(
        load_base(str(folder)), None, [SampleRequest(PROMPT, seed=5, num_inference_steps=4)]
    )
    assert apart(plain[0], picture) > 20


def test_a_lower_rank_loses_more_and_says_so(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    full = publish_full(store, load_base(str(folder)), moved(load_base(str(folder)), None)[0])
    losses = []
    for rank in (2, 12):
        request = extract_request(full, rank, targets="all", subject_id=f"rex-{rank}")
        base = load_base(str(folder))
        record, tensors = extract_adapter(base, request, store.folder("rex"))
        assert record.subject_id == f"rex-{rank}"
        assert record.num_parameters == sum(p.numel() for pair in tensors.values() for p in pair)
        assert record.extracted is not None
        losses.append(record.extracted)
    much, little = losses
    assert 1 > much.sites_error > little.sites_error > 0
    assert much.total_error > little.total_error > little.outside_energy**0.5 > 0
    for more, less in zip(much.outputs, little.outputs, strict=True):
        assert more.of_move > less.of_move > 0.01
        assert more.of_output > less.of_output > 0


def test_the_same_weights_at_the_same_rank_are_one_job(folder: Path, tmp_path: Path) -> None:
    base, store = load_base(str(folder)), Store(tmp_path / "models")
    full = publish_full(store, base, weights_of(base))
    ids = {
        extract_request(full, 4).job_id,
        extract_request(full, 5).job_id,
        extract_request(full, 4, 0.9).job_id,
        extract_request(full, 4, targets="attention").job_id,
        extract_request(full, 4, subject_id="max").job_id,
    }
    assert len(ids) == 5
    assert extract_request(full, 4).job_id in ids


def test_what_is_no_full_fine_tune_of_this_base_is_refused(folder: Path, tmp_path: Path) -> None:
    base, store = load_base(str(folder)), Store(tmp_path / "models")
    full = publish_full(store, base, moved(base, rank=1)[0])
    foreign = full.model_copy(update={"base": BaseRecord(name="b", fingerprint="0" * 64)})
    with pytest.raises(BaseModelError, match="trained on another base"):
        extract_adapter(base, extract_request(foreign), store.folder("rex"))
    record, _ = extract_adapter(base, extract_request(full), store.folder("rex"))
    with pytest.raises(InputError, match="is an adapter already"):
        extract_request(record)
    for rank in (0, 257):
        with pytest.raises(InputError, match="the rank is out of range"):
            extract_request(full, rank)
    with pytest.raises(InputError, match="the energy is out of range"):
        extract_request(full, energy=1.0)
