"""Each tracker holds a subject's config, curves, picture and files; a second process goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from raybooth.config import TrackingConfig
from raybooth.tracking import RunIdentity, flattened, open_run

REX = RunIdentity("rex-0123abcd", "rex", {"base": "tiny", "train": {"rank": 4, "words": ["a"]}})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "samples.png"
    Image.new("RGB", (4, 3), (200, 10, 20)).save(path)
    return path


def tell(config: TrackingConfig, folder: Path, picture: Path) -> None:
    """Two processes' worth of one subject's training."""
    tracker = config.trackers[0]
    first = open_run(tracker, config, folder, REX, new=True)
    first.scalars(1, {"loss": 0.5})
    first.scalars(3, {"loss": 0.25, "grad_norm": 2.0})
    first.flush()
    first.close("left")
    if tracker == "wandb":
        time.sleep(1.1)  # it names an offline run's folder by the second
    second = open_run(tracker, config, folder, REX, new=False)
    second.scalars(5, {"loss": 0.125})
    second.picture("samples", 5, picture)
    second.validation([(2, {"loss": 0.75}), (4, {"loss": 0.5, "dino": 0.25})])
    second.artifacts([picture])
    second.flush()
    second.close("published")


def test_tensorboard_reads_its_files(tmp_path: Path, picture: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TrackingConfig(project="pets"), tmp_path / "t", picture)
    place = tmp_path / "t" / "tensorboard" / "pets" / "rex-0123abcd"
    events = EventAccumulator(str(place))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (3, 0.25), (5, 0.125)]
    assert [e.step for e in events.Scalars("grad_norm")] == [3]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(2, 0.75), (4, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/dino")] == [(4, 0.25)]
    (shown,) = events.Images("samples")
    assert (shown.step, shown.width, shown.height) == (5, 4, 3)
    (text,) = events.Tensors("config/text_summary")
    assert b'"rank": 4' in text.tensor_proto.string_val[0]


def test_mlflow_keeps_one_run_in_its_sqlite_file(tmp_path: Path, picture: Path) -> None:
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "t"
    tell(TrackingConfig(trackers=("mlflow",), project="pets"), folder, picture)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pets")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("rex", "FINISHED")
    assert run.data.params == {"base": "tiny", "train.rank": "4", "train.words": "['a']"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (3, 0.25), (5, 0.125)]
    history = client.get_metric_history(run.info.run_id, "validation/loss")
    assert [(m.step, m.value) for m in history] == [(2, 0.75), (4, 0.5)]
    files = {f.name for f in (folder / "mlflow").rglob("*") if f.is_file()}
    assert files == {"samples.png"}
    kept = [a.path for a in client.list_artifacts(run.info.run_id)]
    assert kept == ["model", "pictures"]


def test_wandb_keeps_an_offline_run_of_the_jobs_id(tmp_path: Path, picture: Path) -> None:
    config = TrackingConfig(trackers=("wandb",), project="pets", wandb_mode="offline")
    tell(config, tmp_path / "t", picture)
    folders = sorted((tmp_path / "t" / "wandb").glob("offline-run-*-rex-0123abcd"))
    assert len(folders) == 2
    deadline = time.monotonic() + 30
    history: list[dict[str, Any]] = []
    while len(history) < 5 and time.monotonic() < deadline:  # W&B's own process writes the files
        time.sleep(0.1)
        history = [entry for folder in folders for entry in wandb_history(folder)]
    losses = [(entry["_step"], entry["loss"]) for entry in history if "loss" in entry]
    assert losses == [(1, 0.5), (3, 0.25), (5, 0.125)]
    assert [entry["_step"] for entry in history if any(k.startswith("samples") for k in entry)] == [
        5
    ]
    places = [e["validation/train_step"] for e in history if "validation/loss" in e]
    assert places == [2, 4]
    pictures = [path for path in folders[1].rglob("*.png") if "media" in path.parts]
    assert len(pictures) == 1


def wandb_history(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of an offline run's own log."""
    import json

    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.glob("run-*.wandb")
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
            }


def test_options_without_effect_are_refused() -> None:
    for values in (
        {"wandb_mode": "offline"},
        {"mlflow_uri": "http://localhost:5000"},
        {"trackers": ()},
        {"trackers": ("wandb", "wandb")},
    ):
        if values == {"trackers": ()}:
            assert TrackingConfig(**values).trackers == ()
            values = {"trackers": (), "project": "pets"}
        with pytest.raises(ValidationError, match=r"no effect|name each once"):
            TrackingConfig.model_validate(values)


def test_nested_values_are_named_by_their_path() -> None:
    assert dict(flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": None})) == {
        "a.b": 1,
        "a.c.d": [2],
        "e": None,
    }
