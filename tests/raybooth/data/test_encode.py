"""Photos and prompt become tensors once, and are known by their content."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.tiny import write_tiny_base

from raybooth.config import TrainConfig
from raybooth.data.encode import SubjectTensors, encode_subject
from raybooth.data.framing import pixels_of, plan_frame
from raybooth.data.images import load_photo, to_pixels
from raybooth.data.prior import PriorCache, prior_key
from raybooth.data.prior_build import build_prior
from raybooth.errors import PriorError, SubjectError, TrainingError
from raybooth.model.base import Base, encode_images, encode_prompts, load_base
from raybooth.sidecar import caption_file, mask_file
from raybooth.subject import Subject

from .test_images import picture


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, ...]:
    paths = tuple(tmp_path / f"{i}.png" for i in range(3))
    for seed, path in enumerate(paths):
        picture(seed, (48, 40)).save(path)
    return paths


def subject(photos: tuple[Path, ...], /, **train: Any) -> Subject:
    prior = {"num_images": 0, "loss_weight": 0}
    config = TrainConfig.model_validate({"resolution": 32, "prior": prior, **train})
    return Subject("rex", "dog", "sks", photos, config)


def same(one: SubjectTensors, other: SubjectTensors) -> bool:
    pairs = [(one.mean_NCHW, other.mean_NCHW), (one.std_NCHW, other.std_NCHW)]
    names = one.instance_conditioning
    pairs += [(names[name], other.instance_conditioning[name]) for name in names]
    return all(torch.equal(left, right) for left, right in pairs)


def files(root: Path) -> set[str]:
    return {path.name for path in root.glob("*.safetensors")}


def test_tensors_are_the_bases_own(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    tensors = encode_subject(tiny_base, subject(photos), tmp_path / "encoded")
    pixels_NCHW = torch.stack([to_pixels(load_photo(path), 32, "center") for path in photos])
    mean_NCHW, std_NCHW = encode_images(tiny_base, pixels_NCHW)
    assert torch.equal(tensors.mean_NCHW, mean_NCHW)
    assert torch.equal(tensors.std_NCHW, std_NCHW)
    prompt = encode_prompts(tiny_base, ["a photo of sks dog"])
    assert set(prompt) == set(tensors.instance_conditioning)
    for name, expected in prompt.items():
        assert torch.equal(tensors.instance_conditioning[name], expected)
    assert tensors.prior is None
    assert len(set(tensors.photo_digests)) == 3


def test_the_second_time_it_is_read(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    first = encode_subject(tiny_base, subject(photos), tmp_path / "encoded")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").iterdir()}
    assert same(first, encode_subject(tiny_base, subject(photos), tmp_path / "encoded"))
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "encoded").iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"resolution": 40},
        {"crop": "random"},
        {"crop": "random", "seed": 1},
        {"crop": "random", "crops_per_image": 2},
        {"instance_prompt": "a red {identifier} {class_noun}"},
    ],
)
def test_what_decides_the_tensors_decides_the_file(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path, change: dict[str, Any]
) -> None:
    root = tmp_path / "encoded"
    encode_subject(tiny_base, subject(photos), root)
    if change != {"crop": "random"}:
        encode_subject(tiny_base, subject(photos, crop="random"), root)
    before = files(root)
    encode_subject(tiny_base, subject(photos, **change), root)
    assert len(files(root) - before) == 1


def test_what_does_not_decide_them_does_not(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    root = tmp_path / "encoded"
    encode_subject(tiny_base, subject(photos), root)
    encode_subject(tiny_base, subject(photos, seed=5, num_train_steps=9), root)
    moved = tuple(path.rename(path.with_name(f"moved{path.name}")) for path in photos)
    encode_subject(tiny_base, subject(moved), root)
    assert len(files(root)) == 1


def test_other_contents_under_the_same_names_are_encoded_anew(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    """Bug 4 of the peers: a cache keyed by place in the loader, not by sample."""
    root = tmp_path / "encoded"
    first = encode_subject(tiny_base, subject(photos), root)
    data = [path.read_bytes() for path in photos]
    for path, other in zip(photos, [data[2], data[0], data[1]], strict=True):
        path.write_bytes(other)
    turned = encode_subject(tiny_base, subject(photos), root)
    assert torch.equal(turned.mean_NCHW, first.mean_NCHW[[2, 0, 1]])
    assert turned.photo_digests == tuple(first.photo_digests[i] for i in (2, 0, 1))
    picture(9, (48, 40)).save(photos[0])
    assert not torch.equal(
        encode_subject(tiny_base, subject(photos), root).mean_NCHW[0], turned.mean_NCHW[0]
    )


def test_another_base_has_a_file_of_its_own(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    other = load_base(str(write_tiny_base(tmp_path / "other", seed=1)))
    root = tmp_path / "encoded"
    first = encode_subject(tiny_base, subject(photos), root)
    assert not same(first, encode_subject(other, subject(photos), root))
    assert len(files(root)) == 2


def test_several_crops_of_each_photo_are_seeded_and_lie_together(
    tiny_base: Base, tmp_path: Path
) -> None:
    wide = tuple(tmp_path / f"{i}.png" for i in range(2))
    for seed, path in enumerate(wide):
        picture(seed, (100, 40)).save(path)
    train = {"crop": "random", "crops_per_image": 3}
    tensors = encode_subject(tiny_base, subject(wide, **train), tmp_path / "a")
    assert len(tensors.mean_NCHW) == 6
    assert len({crop.numpy().tobytes() for crop in tensors.mean_NCHW}) == 6
    assert same(tensors, encode_subject(tiny_base, subject(wide, **train), tmp_path / "b"))
    alone = encode_subject(tiny_base, subject(wide[1:], **train), tmp_path / "c")
    assert torch.equal(alone.mean_NCHW, tensors.mean_NCHW[3:])
    other = encode_subject(tiny_base, subject(wide, seed=1, **train), tmp_path / "d")
    assert not torch.equal(other.mean_NCHW, tensors.mean_NCHW)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_file_is_reported_and_made_again(
    tiny_base: Base,
    photos: tuple[Path, ...],
    tmp_path: Path,
    suffix: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tmp_path / "encoded"
    first = encode_subject(tiny_base, subject(photos), root)
    (path,) = root.glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        assert same(first, encode_subject(tiny_base, subject(photos), root))
    assert "damaged" in caplog.text
    caplog.clear()
    encode_subject(tiny_base, subject(photos), root)
    assert caplog.text == ""


def test_a_prior_comes_with_the_subject_that_has_one(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    prior = {"num_images": 3, "num_inference_steps": 2}
    rex, priors = subject(photos, prior=prior), PriorCache(tmp_path / "priors")
    with pytest.raises(PriorError, match="'rex' needs a prior"):
        encode_subject(tiny_base, rex, tmp_path / "encoded")
    with pytest.raises(PriorError, match="not complete: found 0 of 3 images"):
        encode_subject(tiny_base, rex, tmp_path / "encoded", priors=priors)
    key = prior_key(rex.train, rex.class_prompt, tiny_base.fingerprint)
    build_prior(tiny_base, priors, key, 3)
    tensors = encode_subject(tiny_base, rex, tmp_path / "encoded", priors=priors)
    assert tensors.prior is not None
    assert tensors.prior.mean_NCHW.shape == tensors.mean_NCHW.shape


def test_a_photo_that_broke_meanwhile_is_named(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    photos[1].write_bytes(photos[1].read_bytes()[:100])
    with pytest.raises(SubjectError, match=r"1\.png"):
        encode_subject(tiny_base, subject(photos), tmp_path / "encoded")


def test_a_cache_that_cannot_be_written_is_a_clear_error(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    (tmp_path / "encoded").touch()
    with pytest.raises(TrainingError, match="'rex' cannot be kept in"):
        encode_subject(tiny_base, subject(photos), tmp_path / "encoded")


def test_greyscale_photos_train_too(tiny_base: Base, tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (40, 40), 90).save(path)
    tensors = encode_subject(tiny_base, subject((path,)), tmp_path / "encoded")
    assert torch.isfinite(tensors.mean_NCHW).all()


def test_buckets_flips_captions_and_masks_are_encoded_sample_by_sample(
    tiny_base: Base, tmp_path: Path
) -> None:
    shapes = [(64, 64), (90, 45), (45, 90)]  # width, height
    paths = tuple(tmp_path / f"{i}.png" for i in range(3))
    for seed, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        picture(seed, shape).save(path)
    caption_file(paths[1]).write_text("a red {identifier} {class_noun}", encoding="utf-8")
    mask = Image.new("L", shapes[0], 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save(mask_file(paths[0]))
    options = {"fit": "buckets", "flip": True, "captions": True, "masks": True}
    one = subject(paths, photos=options)
    tensors = encode_subject(tiny_base, one, tmp_path / "encoded")
    assert tensors.size_N == ((8, 8), (8, 8), (6, 10), (6, 10), (10, 6), (10, 6))
    assert tensors.prompts == ("a photo of sks dog", "a red sks dog")
    assert tensors.prompt_N == (0, 0, 1, 1, 0, 0)
    assert tensors.mean_NCHW.shape[2:] == (10, 10)
    assert (tensors.mean_NCHW[2, :, 6:] == 0).all()
    frame = plan_frame((45, 90), (24, 40), "center", flip=True)
    mean_BCHW, _ = encode_images(tiny_base, pixels_of(load_photo(paths[1]), frame)[None])
    assert torch.equal(tensors.mean_NCHW[3, :, :6, :10], mean_BCHW[0])
    expected = encode_prompts(tiny_base, ["a red sks dog"])
    for name, row in expected.items():
        assert torch.equal(tensors.instance_conditioning[name][1:], row)
    assert tensors.mask_NHW is not None
    assert tensors.mask_NHW[0, 0, :8].round().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.equal(tensors.mask_NHW[1, :8, :8], tensors.mask_NHW[0, :8, :8].flip(1))
    assert (tensors.mask_NHW[2, :6, :10] == 1).all()
    again = encode_subject(tiny_base, one, tmp_path / "encoded")
    assert same(again, tensors)
    assert (again.size_N, again.prompt_N) == (tensors.size_N, tensors.prompt_N)
    caption_file(paths[1]).write_text("a blue {identifier} {class_noun}", encoding="utf-8")
    assert encode_subject(tiny_base, one, tmp_path / "encoded").prompts[1] == "a blue sks dog"
    assert len(files(tmp_path / "encoded")) == 2


def test_a_crop_that_shows_nothing_of_its_mask_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    picture(0, (96, 32)).save(path)
    mask = Image.new("L", (96, 32), 0)
    mask.paste(255, (0, 0, 8, 32))
    mask.save(mask_file(path))
    with pytest.raises(SubjectError, match=r"a crop of .*0\.png shows nothing of its mask"):
        encode_subject(tiny_base, subject((path,), photos={"masks": True}), tmp_path / "encoded")
    kept = subject((path,), photos={"masks": True, "background_weight": 0.5})
    mask_NHW = encode_subject(tiny_base, kept, tmp_path / "encoded").mask_NHW
    assert mask_NHW is not None
    assert (mask_NHW == 0).all()


def test_base_prediction_encodes_the_class_prompt_and_reads_no_prior(
    tiny_base: Base, photos: tuple[Path, ...], tmp_path: Path
) -> None:
    one = subject(photos, prior={"kind": "base_prediction"})
    tensors = encode_subject(tiny_base, one, tmp_path / "encoded")
    assert tensors.prior is None
    for name, row in encode_prompts(tiny_base, ["a photo of a dog"]).items():
        assert torch.equal(tensors.class_conditioning[name], row)
