"""Trackers of other programs behind one small interface: TensorBoard, Weights & Biases, MLflow.

A run is one subject's job, never a pack: its name is the subject's, its identity the job's, so
that whoever goes on with the job goes on with the same curves.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from raybooth.config.tracking import TrackerName, TrackingConfig

Ending = Literal["published", "failed", "left"]
"""`left`: stopped in the middle; the same command goes on with it."""

Points = Sequence[tuple[int, Mapping[str, float]]]
"""Train step and the figures that were measured there."""

_BATCH = 100
"""Most parameters that MLflow takes at once."""


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """Whose run it is, and with what it was configured."""

    job_id: str
    subject_id: str
    config: Mapping[str, Any]
    """As resolved, nested."""


class Run(Protocol):
    """One subject's run in one tracker. May raise whatever the tracker's package raises."""

    def scalars(self, train_step: int, values: Mapping[str, float]) -> None:
        """Points of curves; train steps ascend."""

    def picture(self, name: str, train_step: int, path: Path) -> None:
        """An image file."""

    def validation(self, points: Points) -> None:
        """Figures of earlier train steps, known when all is done; told after any picture."""

    def artifacts(self, paths: Sequence[Path]) -> None:
        """Files that belong to the result, where the tracker keeps files."""

    def flush(self) -> None:
        """What was told is where others can read it."""

    def close(self, ending: Ending) -> None:
        """Nothing more will be told in this process."""


def open_run(
    tracker: TrackerName, config: TrackingConfig, folder: Path, identity: RunIdentity, *, new: bool
) -> Run:
    """The run of `identity` in `tracker`, made, or opened again where it is not `new`."""
    folder.mkdir(parents=True, exist_ok=True)
    match tracker:
        case "tensorboard":
            return TensorBoardRun(config, folder, identity, new)
        case "wandb":
            return WandbRun(config, folder, identity)
        case "mlflow":
            return MlflowRun(config, folder, identity)


class TensorBoardRun:
    """Event files in `<folder>/tensorboard/<project>/<job>`."""

    def __init__(
        self, config: TrackingConfig, folder: Path, identity: RunIdentity, new: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard" / config.project / identity.job_id
        self._writer: Any = SummaryWriter(str(place))
        if new:
            text = json.dumps(identity.config, indent=2)
            self._writer.add_text("config", "    " + text.replace("\n", "\n    "), 0)

    def scalars(self, train_step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, train_step)

    def picture(self, name: str, train_step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            pixels_HWC = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels_HWC, train_step, dataformats="HWC")

    def validation(self, points: Points) -> None:
        for train_step, values in points:
            self.scalars(train_step, {f"validation/{k}": v for k, v in values.items()})

    def artifacts(self, paths: Sequence[Path]) -> None:
        """TensorBoard keeps no files: the store has them."""

    def flush(self) -> None:
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        self._writer.close()


class WandbRun:
    """A run of Weights & Biases; its id is the job's, so that a later process resumes it."""

    def __init__(self, config: TrackingConfig, folder: Path, identity: RunIdentity) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.wandb_entity,
            id=identity.job_id,
            name=identity.subject_id,
            dir=str(folder),
            mode=config.wandb_mode,
            config=dict(identity.config),
            resume="allow" if config.wandb_mode == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, x_disable_stats=True
            ),
        )
        self._subject_id = identity.subject_id

    def scalars(self, train_step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=train_step)

    def picture(self, name: str, train_step: int, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=train_step, commit=True)

    def validation(self, points: Points) -> None:
        step = "validation/train_step"  # W&B's own step never goes back
        self._run.define_metric("validation/*", step_metric=step)
        for train_step, values in points:
            named = {f"validation/{name}": value for name, value in values.items()}
            self._run.log({step: train_step, **named})

    def artifacts(self, paths: Sequence[Path]) -> None:
        artifact = self._wandb.Artifact(self._subject_id, type="model")
        for path in paths:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def flush(self) -> None:
        """A process of W&B's own writes at once."""

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=int(ending != "published"))


class MlflowRun:
    """A run of MLflow, found again by its tag `raybooth.job_id`."""

    def __init__(self, config: TrackingConfig, folder: Path, identity: RunIdentity) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # which set their own levels when they are imported
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = config.mlflow_uri or f"sqlite:///{folder / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(config, folder)
        tag = f"tags.`raybooth.job_id` = '{identity.job_id}'"
        found = self._client.search_runs([experiment], filter_string=tag)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"raybooth.job_id": identity.job_id, "raybooth.subject_id": identity.subject_id}
        run = self._client.create_run(experiment, run_name=identity.subject_id, tags=tags)
        self._id = run.info.run_id
        self._params(identity.config)

    def _experiment(self, config: TrackingConfig, folder: Path) -> str:
        known = self._client.get_experiment_by_name(config.project)
        if known is not None:
            return str(known.experiment_id)
        place = None if config.mlflow_uri else (folder / "mlflow" / config.project).as_uri()
        return str(self._client.create_experiment(config.project, artifact_location=place))

    def _params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:500]) for name, value in flattened(config)]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def scalars(self, train_step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, train_step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, name: str, train_step: int, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), artifact_path="pictures")

    def validation(self, points: Points) -> None:
        for train_step, values in points:
            self.scalars(train_step, {f"validation/{k}": v for k, v in values.items()})

    def artifacts(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path), artifact_path="model")

    def flush(self) -> None:
        """Every call is a transaction."""

    def close(self, ending: Ending) -> None:
        states = {"published": "FINISHED", "failed": "FAILED", "left": "KILLED"}
        self._client.set_terminated(self._id, states[ending])


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
