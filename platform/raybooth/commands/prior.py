"""`raybooth prior ls | build | gc`: the prior cache, for people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config import FleetConfig, TrainConfig, find_config, load_config
from raybooth.errors import InputError
from raybooth.home import priors_folder
from raybooth.subject import Subject, load_fleet

if TYPE_CHECKING:
    from raybooth.data.prior import OnProgress, PriorCache, PriorEntry, PriorReport
    from raybooth.data.prior_key import PriorKey
    from raybooth.model.base import Base


def register(subparsers: Any) -> None:
    """Add the command and its three actions."""
    parser = subparsers.add_parser("prior", help="list, make or delete class priors")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _register_ls(actions)
    _register_build(actions)
    _register_gc(actions)


def _register_ls(actions: Any) -> None:
    ls = actions.add_parser("ls", help="what the prior cache holds")
    _add_json(ls)
    ls.set_defaults(run=_ls)


def _register_build(actions: Any) -> None:
    build = actions.add_parser("build", help="make the priors of a fleet, or of one class noun")
    build.add_argument("fleet", nargs="?", type=Path, metavar="FLEET")
    build.add_argument("--base", help="`pocket`, a folder or a Hub id; with --class-noun")
    build.add_argument("--revision", help="commit of a Hub id")
    build.add_argument("--class-noun", metavar="NOUN")
    build.add_argument(
        "--train", metavar="CONFIG", help="a file of configs/train; with --class-noun"
    )
    build.add_argument("-n", "--num-images", type=int, metavar="N")
    build.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    build.add_argument("--rows", type=int, default=16, help="images denoised together")
    _add_json(build)
    build.set_defaults(run=_build)


def _register_gc(actions: Any) -> None:
    gc = actions.add_parser("gc", help="delete priors")
    which = gc.add_mutually_exclusive_group(required=True)
    which.add_argument("--older-than", type=float, metavar="DAYS", help="unused for so long")
    which.add_argument("--unused-by", type=Path, metavar="FLEET", help="that this fleet needs not")
    which.add_argument("--all", action="store_true")
    gc.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    _add_json(gc)
    gc.set_defaults(run=_gc)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _cache() -> PriorCache:
    from raybooth.data.prior import PriorCache

    return PriorCache(priors_folder())


def _ls(arguments: argparse.Namespace) -> int:
    entries = _cache().entries()
    if arguments.json:
        print(json.dumps([_row(entry) for entry in entries], indent=2))
        return 0
    if not entries:
        print("no prior is cached yet; `raybooth prior build FLEET` makes some")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("class prompt", "base", "resolution", "images", "size", "damaged", "last used")
    for entry in entries:
        key, status = entry.key, entry.status
        prompt, resolution = (key.class_prompt, key.resolution) if key else ("(record damaged)", "")
        base = f"{_base_name(entry)} {key.base_fingerprint[:8]}" if key else ""
        damaged = f"[red]{status.num_damaged}[/red]" if status.num_damaged else "0"
        used = datetime.fromtimestamp(entry.used_at).strftime("%Y-%m-%d %H:%M")
        cells = (prompt, base, str(resolution), str(status.num_whole), _size(status.size_bytes))
        table.add_row(*cells, damaged, used)
    Console().print(table)
    return 0


@dataclass(frozen=True)
class _Wanted:
    """One prior to make."""

    key: PriorKey
    num_images: int


def _build(arguments: argparse.Namespace) -> int:
    if (arguments.fleet is None) == (arguments.class_noun is None):
        raise InputError(
            "prior build needs a fleet file or a class noun",
            "both" if arguments.fleet else "neither",
            "write `raybooth prior build FLEET` or `raybooth prior build --class-noun dog`",
        )
    if arguments.rows < 1 or (arguments.num_images is not None and arguments.num_images < 1):
        raise InputError("--rows and --num-images must be at least 1")
    base, revision, wanted = _of_fleet(arguments) if arguments.fleet else _of_noun(arguments)
    cache, bases = _cache(), _Bases(base, revision, arguments.device)
    reports: list[tuple[_Wanted, PriorReport]] = []
    for prior in wanted:
        reports.append((prior, _make(cache, bases, prior, arguments.rows)))
        if not arguments.json:
            print(_told(*reports[-1]))
    if arguments.json:
        rows = [{**_key_row(p.key), "num_images": p.num_images, **asdict(r)} for p, r in reports]
        print(json.dumps(rows, indent=2))
    elif not reports:
        print("this fleet needs no prior")
    return 0


def _of_fleet(arguments: argparse.Namespace) -> tuple[str, str | None, list[_Wanted]]:
    for name in ("base", "revision", "train"):
        if getattr(arguments, name) is not None:
            do = "remove it, or give --class-noun instead of a fleet"
            raise InputError(f"--{name} has no effect with a fleet file", "", do)
    fleet = load_fleet(arguments.fleet)
    most: dict[PriorKey, int] = {}
    for key, subject in _keys(fleet.base, fleet.revision, fleet.subjects):
        num_images = arguments.num_images or subject.train.prior.num_images
        most[key] = max(most.get(key, 0), num_images)
    return fleet.base, fleet.revision, [_Wanted(key, num) for key, num in most.items()]


def _of_noun(arguments: argparse.Namespace) -> tuple[str, str | None, list[_Wanted]]:
    name = arguments.train or str(FleetConfig.model_fields["train"].default)
    train = load_config(TrainConfig, find_config("train", name))
    if train.prior.num_images == 0 and arguments.num_images is None:
        raise InputError(f"the train config {name} has no prior", "", "give -n")
    from raybooth.data.prior_key import prior_key

    base = arguments.base or str(FleetConfig.model_fields["base"].default)
    class_prompt = train.class_prompt.format(identifier="", class_noun=arguments.class_noun)
    key = prior_key(train, class_prompt, _fingerprint(base, arguments.revision))
    num_images = arguments.num_images or train.prior.num_images
    return base, arguments.revision, [_Wanted(key, num_images)]


def _keys(
    base: str, revision: str | None, subjects: Sequence[Subject]
) -> Iterator[tuple[PriorKey, Subject]]:
    """The prior of each subject that has one."""
    from raybooth.data.prior_key import prior_key

    fingerprint = _fingerprint(base, revision)
    for subject in subjects:
        if subject.train.prior.num_images > 0:
            yield prior_key(subject.train, subject.class_prompt, fingerprint), subject


def _fingerprint(base: str, revision: str | None) -> str:
    from raybooth.model.fingerprint import fingerprint_base
    from raybooth.model.source import resolve_base

    return fingerprint_base(resolve_base(base, revision))


class _Bases:
    """The base in each number format that a prior needs, loaded when one is really made."""

    def __init__(self, base: str, revision: str | None, device: str | None) -> None:
        self._base, self._revision, self._device = base, revision, device
        self._loaded: dict[str, Base] = {}

    def of(self, key: PriorKey) -> Base:
        import torch

        from raybooth.model.base import load_base

        if key.dtype not in self._loaded:
            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            dtype: torch.dtype = getattr(torch, key.dtype)
            self._loaded[key.dtype] = load_base(
                self._base, revision=self._revision, device=device, dtype=dtype
            )
        return self._loaded[key.dtype]

    @property
    def name(self) -> str:
        return self._base


def _make(cache: PriorCache, bases: _Bases, prior: _Wanted, max_rows: int) -> PriorReport:
    from raybooth.data.generated import Generated
    from raybooth.data.prior_build import sample_prior

    def generate(indices: Sequence[int]) -> Iterator[Generated]:
        return sample_prior(bases.of(prior.key), prior.key, indices, max_rows=max_rows)

    with _progress_bar(prior) as tell:
        return cache.ensure(prior.key, prior.num_images, generate, tell, base_name=bases.name)


@contextmanager
def _progress_bar(prior: _Wanted) -> Iterator[OnProgress]:
    """A bar on stderr, on terminals only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(prior.key.class_prompt, total=prior.num_images)
        yield lambda done, wanted: progress.update(task, completed=done, total=wanted)


def _told(prior: _Wanted, report: PriorReport) -> str:
    text = f"{prior.key.class_prompt!r}: {prior.num_images} images"
    text += f", {report.num_cached} cached, {report.num_generated} made"
    if report.num_damaged:
        text += f", {report.num_damaged} damaged files made again"
    return f"{text}, {report.seconds:.1f} s"


def _gc(arguments: argparse.Namespace) -> int:
    older_than, keep = None, []
    if arguments.older_than is not None:
        if arguments.older_than < 0:
            raise InputError("--older-than must not be negative", str(arguments.older_than))
        older_than = timedelta(days=arguments.older_than)
    if arguments.unused_by is not None:
        fleet = load_fleet(arguments.unused_by)
        keep = [key.digest for key, _ in _keys(fleet.base, fleet.revision, fleet.subjects)]
    deleted = _cache().gc(older_than=older_than, keep=keep, dry_run=arguments.dry_run)
    if arguments.json:
        print(json.dumps([_row(entry) for entry in deleted], indent=2))
        return 0
    verb = "would delete" if arguments.dry_run else "deleted"
    for entry in deleted:
        prompt = repr(entry.key.class_prompt) if entry.key else "(record damaged)"
        print(f"{verb} {prompt} {entry.digest[:12]}, {_size(entry.status.size_bytes)}")
    total = sum(entry.status.size_bytes for entry in deleted)
    print(f"{verb} {len(deleted)} priors, {_size(total)}")
    return 0


def _row(entry: PriorEntry) -> Mapping[str, Any]:
    key = _key_row(entry.key) if entry.key is not None else {"digest": entry.digest}
    used = datetime.fromtimestamp(entry.used_at, UTC).isoformat(timespec="seconds")
    return {**key, "base": entry.base_name, **asdict(entry.status), "used_at": used}


def _key_row(key: PriorKey) -> dict[str, Any]:
    return {"digest": key.digest, **asdict(key)}


def _base_name(entry: PriorEntry) -> str:
    return Path(entry.base_name).name


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
