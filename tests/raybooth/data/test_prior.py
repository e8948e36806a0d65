"""Priors by content: made once, grown, mended, never half there."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from raybooth.config import TrainConfig
from raybooth.data.prior import PriorCache, PriorKey, PriorReport, image_seed, prior_key
from raybooth.errors import PriorError

from .priors import KEY, Generator, prior_image

PROGRAM = Path(__file__).with_name("priors.py")


def start(root: Path, log: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(root), str(log), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kept(report: PriorReport) -> tuple[int, int, int]:
    return report.num_cached, report.num_generated, report.num_damaged


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_every_field_of_the_key_decides() -> None:
    others = {
        "base_fingerprint": "cd" * 32,
        "class_prompt": "a photo of a cat",
        "negative_prompt": "blurry",
        "solver": "euler",
        "num_inference_steps": 26,
        "guidance_scale": 3.5,
        "resolution": 24,
        "dtype": "bfloat16",
        "generator_version": 2,
    }
    assert set(others) == {field.name for field in dataclasses.fields(PriorKey)}
    keys = [KEY, *(dataclasses.replace(KEY, **{name: other}) for name, other in others.items())]  # type: ignore[arg-type]
    assert len({key.digest for key in keys}) == len(keys)
    assert len({image_seed(key, 3) for key in keys}) == len(keys)
    assert dataclasses.replace(KEY).digest == KEY.digest


def test_seeds_are_stable_and_fit() -> None:
    assert len(KEY.digest) == 64
    seeds = [image_seed(KEY, index) for index in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == 3677652237863012091


def test_a_subjects_key_comes_from_its_config() -> None:
    train = TrainConfig.model_validate(
        {"resolution": 64, "precision": "bf16", "prior": {"guidance_scale": 3, "num_images": 5}}
    )
    key = prior_key(train, "a photo of a dog", "f" * 64)
    assert (key.resolution, key.dtype, key.guidance_scale) == (64, "bfloat16", 3.0)
    more = train.model_copy(update={"prior": train.prior.model_copy(update={"num_images": 9})})
    assert prior_key(more, "a photo of a dog", "f" * 64) == key


def test_made_once_then_found(tmp_path: Path) -> None:
    cache, generator = PriorCache(tmp_path / "priors"), Generator()
    assert cache.status(KEY).num_whole == 0
    seen: list[tuple[int, int]] = []
    report = cache.ensure(KEY, 4, generator, lambda done, wanted: seen.append((done, wanted)))
    assert kept(report) == (0, 4, 0)
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)
    assert sorted(seen) == seen
    again = Generator()
    assert kept(cache.ensure(KEY, 4, again)) == (4, 0, 0)
    assert again.made == []
    status = cache.status(KEY)
    assert (status.num_whole, status.num_damaged) == (4, 0)
    files = (path for path in (cache.root / KEY.digest).rglob("*") if path.is_file())
    assert status.size_bytes == sum(path.stat().st_size for path in files)


def test_what_is_loaded_is_what_was_made(tmp_path: Path) -> None:
    from safetensors.torch import load

    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 5, Generator())
    tensors = cache.load(KEY, 3)
    assert tensors.mean_NCHW.shape == tensors.std_NCHW.shape == (3, 4, 2, 2)
    for index in range(3):
        made = load(prior_image(KEY, index).latents)
        assert torch.equal(tensors.mean_NCHW[index], made["mean"])
        assert torch.equal(tensors.std_NCHW[index], made["std"])
    assert tensors.conditioning["encoder_hidden_states"].shape == (1, 3, 2)
    assert len(set(tensors.image_digests)) == 3


def test_growing_makes_only_what_is_missing(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 4, Generator())
    before = {path: path.read_bytes() for path in (tmp_path / KEY.digest / "images").iterdir()}
    grower = Generator()
    assert kept(cache.ensure(KEY, 9, grower)) == (4, 5, 0)
    assert grower.made == [4, 5, 6, 7, 8]
    assert all(path.read_bytes() == data for path, data in before.items())
    PriorCache(tmp_path / "other").ensure(KEY, 9, Generator())
    both = [PriorCache(root).load(KEY, 9) for root in (tmp_path, tmp_path / "other")]
    assert torch.equal(both[0].mean_NCHW, both[1].mean_NCHW)
    assert kept(cache.ensure(KEY, 2, Generator())) == (2, 0, 0)


def test_a_key_of_its_own_has_a_prior_of_its_own(tmp_path: Path) -> None:
    """Bug 8 of the peers: class images counted by file, whatever they showed."""
    cache, cat = PriorCache(tmp_path), dataclasses.replace(KEY, class_prompt="a photo of a cat")
    cache.ensure(KEY, 2, Generator())
    assert kept(cache.ensure(cat, 2, Generator(cat))) == (0, 2, 0)
    assert [entry.key for entry in cache.entries()] == [cat, KEY]
    assert not torch.equal(cache.load(KEY, 2).mean_NCHW, cache.load(cat, 2).mean_NCHW)


@pytest.mark.parametrize(
    "name", ["images/00001.png", "latents/00001.safetensors", "conditioning.safetensors"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_found_reported_and_made_again(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 3, Generator())
    path = tmp_path / KEY.digest / name
    whole = path.read_bytes()
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    if not name.startswith("images"):
        with pytest.raises(PriorError, match="not complete"):
            cache.load(KEY, 3)
    mender = Generator()
    with caplog.at_level(logging.WARNING):
        report = cache.ensure(KEY, 3, mender)
    assert report.num_damaged == 1
    assert mender.made == ([] if name.startswith("conditioning") else [1])
    assert "1 damaged file" in caplog.text
    assert KEY.class_prompt in caplog.text
    assert path.read_bytes() == whole
    assert kept(cache.ensure(KEY, 3, Generator())) == (3, 0, 0)


def test_a_damaged_record_means_that_nothing_is_trusted(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 3, Generator())
    flip(tmp_path / KEY.digest / "record.json")
    assert (cache.status(KEY).num_whole, cache.status(KEY).num_damaged) == (0, 3)
    assert [entry.key for entry in cache.entries()] == [None]
    assert kept(cache.ensure(KEY, 3, Generator())) == (0, 3, 3)


def test_every_single_byte_of_the_record_is_guarded(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 1, Generator())
    record = tmp_path / KEY.digest / "record.json"
    whole = record.read_bytes()
    for place in range(len(whole)):
        hurt = bytearray(whole)
        hurt[place] ^= 4
        record.write_bytes(bytes(hurt))
        status = cache.status(KEY)
        white_space = (
            whole[place : place + 1].isspace() and bytes(hurt)[place : place + 1].isspace()
        )
        assert white_space or (status.num_whole, status.num_damaged) == (0, 1), place


def test_a_record_of_a_later_version_is_not_touched(tmp_path: Path) -> None:
    from raybooth.data.whole_file import seal, unseal

    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 1, Generator())
    record = tmp_path / KEY.digest / "record.json"
    values = unseal(record.read_bytes())
    assert values is not None
    record.write_bytes(seal({**values, "format": 99}))
    with pytest.raises(PriorError, match="format 99"):
        cache.ensure(KEY, 1, Generator())


@pytest.mark.parametrize("kill_at", [0, 3, 5])
def test_killed_half_way_keeps_what_is_whole(tmp_path: Path, kill_at: int) -> None:
    process = start(tmp_path / "priors", tmp_path / "log", 6, kill_at)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    cache, rest = PriorCache(tmp_path / "priors"), Generator()
    assert cache.status(KEY).num_damaged == 0
    assert kept(cache.ensure(KEY, 6, rest)) == (kill_at, 6 - kill_at, 0)
    assert rest.made == list(range(kill_at, 6))


def test_killed_at_any_moment_nothing_is_half_there(tmp_path: Path) -> None:
    root, log, num_images = tmp_path / "priors", tmp_path / "log", 150
    cache, num_before = PriorCache(root), 0
    for _ in range(3):
        process = start(root, log, num_images)
        while process.poll() is None and cache.status(KEY).num_whole < num_before + 12:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        status = cache.status(KEY)
        assert status.num_damaged == 0
        assert status.num_whole >= num_before + 12
        num_before = status.num_whole
    report = cache.ensure(KEY, num_images, Generator())
    assert kept(report) == (num_before, num_images - num_before, 0)
    assert not [path for path in root.rglob("*") if path.name.endswith(".partial")]


def test_processes_that_want_one_prior_make_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = [start(tmp_path / "priors", log, n, -1, 0.01) for n in (12, 12, 8, 20)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 4, outputs
    made = [int(line) for line in log.read_text().split()]
    assert sorted(made) == list(range(20))
    assert sum(int(out.split()[1]) for out, _ in outputs) == 20


def test_a_waiter_follows_a_killed_maker(tmp_path: Path) -> None:
    log = tmp_path / "log"
    maker = start(tmp_path / "priors", log, 30, 12, 0.02)
    cache = PriorCache(tmp_path / "priors")
    while cache.status(KEY).num_whole < 3:
        time.sleep(0.01)
    report = cache.ensure(KEY, 30, Generator(log=log))
    maker.communicate()
    assert maker.returncode == -signal.SIGKILL
    assert sorted(int(line) for line in log.read_text().split()) == list(range(30))
    assert kept(report) == (12, 18, 0)


def test_a_maker_that_was_taken_over_stops_without_writing(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    leases = tmp_path / "leases" / KEY.digest

    def generate(indices):  # type: ignore[no-untyped-def]
        for made in Generator()(indices):
            if getattr(made, "index", None) == 2:
                (leases / "00000002").write_bytes(b"another node")
            yield made

    with pytest.raises(PriorError, match="taken over"):
        cache.ensure(KEY, 4, generate)
    assert cache.status(KEY).num_whole == 2


def test_a_failing_generator_keeps_what_it_made_and_frees_the_lease(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        cache.ensure(KEY, 5, Generator(fail_at=2))
    assert kept(cache.ensure(KEY, 5, Generator())) == (2, 3, 0)


def test_a_generator_that_makes_too_little_is_an_error(tmp_path: Path) -> None:
    generator = Generator()
    with pytest.raises(PriorError, match="not made whole: found 2 images missing"):
        PriorCache(tmp_path).ensure(KEY, 4, lambda indices: generator(indices[:2]))


def test_readers_see_whole_priors_while_they_are_made_and_mended(tmp_path: Path) -> None:
    cache, stop = PriorCache(tmp_path), threading.Event()
    cache.ensure(KEY, 4, Generator())
    expected = cache.load(KEY, 4)
    failures: list[str] = []

    def read() -> None:
        while not stop.is_set():
            tensors = PriorCache(tmp_path).load(KEY, 4)
            if not torch.equal(tensors.mean_NCHW, expected.mean_NCHW):
                failures.append("other latents")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for num_images in (20, 40, 60):
        flip(tmp_path / KEY.digest / "images" / "00001.png")  # pictures are not loaded
        cache.ensure(KEY, num_images, Generator())
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


def test_gc_by_age_by_need_and_all(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    keys = [
        dataclasses.replace(KEY, class_prompt=f"a photo of a {n}") for n in ("cat", "dog", "toy")
    ]
    for age_days, key in zip((0, 10, 20), keys, strict=True):
        cache.ensure(key, 1, Generator(key))
        used = time.time() - age_days * 86400
        os.utime(tmp_path / key.digest / "record.json", (used, used))
    old = cache.gc(older_than=timedelta(days=15), dry_run=True)
    assert [entry.key for entry in old] == [keys[2]]
    assert len(cache.entries()) == 3
    cache.load(keys[2], 1)  # a use makes it young
    assert [e.key for e in cache.gc(older_than=timedelta(days=5))] == [keys[1]]
    assert [e.key for e in cache.gc(keep=[keys[0].digest])] == [keys[2]]
    assert [entry.key for entry in cache.entries()] == [keys[0]]
    assert len(cache.gc()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["leases"]
    assert kept(cache.ensure(KEY, 1, Generator())) == (0, 1, 0)


def test_gc_leaves_a_prior_that_is_being_made(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    deleted: list[int] = []

    def generate(indices):  # type: ignore[no-untyped-def]
        for made in Generator()(indices):
            deleted.append(len(PriorCache(tmp_path).gc()))
            yield made

    cache.ensure(KEY, 3, generate)
    assert deleted == [0] * 4
    assert cache.status(KEY).num_whole == 3


FULL = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from priors import KEY, Generator
from raybooth.data.prior import PriorCache
from raybooth.errors import PriorError
{limit}
try:
    PriorCache(Path(sys.argv[1])).ensure(KEY, 50, Generator({sizes}))
except PriorError as error:
    print(error)
    sys.exit(7)
"""
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"


def run_full(
    root: Path, limit: str, *before: str, sizes: str = "image_size=128"
) -> subprocess.CompletedProcess[str]:
    program = FULL.format(tests=str(PROGRAM.parent), limit=limit, sizes=sizes)
    command = [*before, sys.executable, "-c", program, str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("sizes", ["image_size=128", "latent_size=64"])
def test_a_file_that_cannot_be_written_whole_leaves_nothing_of_it(
    tmp_path: Path, sizes: str
) -> None:
    done = run_full(tmp_path / "priors", LIMIT, sizes=sizes)
    assert done.returncode == 7, done.stderr
    assert "cannot be written" in done.stdout
    assert "free some space" in done.stdout
    files = [path.name for path in (tmp_path / "priors" / KEY.digest).rglob("*") if path.is_file()]
    assert sorted(files) == ["conditioning.safetensors", "record.json"]
    cache = PriorCache(tmp_path / "priors")
    assert cache.status(KEY).num_damaged == 0
    assert kept(cache.ensure(KEY, 3, Generator())) == (0, 3, 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> tuple[str, ...]:
    """Runs a command where `tmp_path/disk` is a file system of its own; its options are $0."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ("unshare", "-rm", "sh", "-c")
    mount = f"mount -t tmpfs -o $0 tmpfs {disk}"
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    if subprocess.run([*command, mount, "size=1m"], capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    return (*command, f'{mount} && "$@"; code=$?; ls -R {disk} >&2; exit $code')


def test_a_full_disk_is_a_clear_error(tmp_path: Path, small_disk: tuple[str, ...]) -> None:
    done = run_full(tmp_path / "disk" / "priors", "", *small_disk, "size=1m")
    assert done.returncode == 7, done.stderr
    assert "No space left on device" in done.stdout
    assert "free some space" in done.stdout
    assert ".png" in done.stderr
    assert "partial" not in done.stderr


def test_a_read_only_disk_is_a_clear_error(tmp_path: Path, small_disk: tuple[str, ...]) -> None:
    done = run_full(tmp_path / "disk" / "priors", "", *small_disk, "size=1m,ro")
    assert done.returncode == 7, done.stderr
    assert "Read-only file system" in done.stdout
    assert "RAYBOOTH_HOME" in done.stdout


def test_a_whole_prior_is_read_from_a_read_only_disk(tmp_path: Path) -> None:
    cache = PriorCache(tmp_path)
    cache.ensure(KEY, 2, Generator())
    shutil.rmtree(tmp_path / "leases")
    (tmp_path / "leases").touch()  # nobody can take a lease
    assert kept(cache.ensure(KEY, 2, Generator())) == (2, 0, 0)
    assert len(cache.load(KEY, 2).mean_NCHW) == 2
