"""Where curves and pictures of a training go, besides the store."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from raybooth.reading import Strict

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class TrackingConfig(Strict):
    """Trackers of a fleet; each subject has a run of its own in each of them."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """`tensorboard`, `wandb` (Weights & Biases), `mlflow`, or none of them."""

    project: str = Field("raybooth", min_length=1)
    """TensorBoard's folder, W&B's project, MLflow's experiment."""

    folder: Path | None = None
    """Local files of every tracker; none: `tracking` in RAYBOOTH_HOME."""

    wandb_mode: Literal["online", "offline"] = "online"
    """`offline` keeps runs in the folder until `wandb sync` sends them."""

    wandb_entity: str | None = None
    """W&B's team; none: your own default."""

    mlflow_uri: str | None = None
    """MLflow's server or database; none: `mlflow.db`, an SQLite file in the folder."""

    @model_validator(mode="after")
    def _options_have_effect(self) -> Self:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers is {list(self.trackers)}; name each once")
        for name in ("wandb_mode", "wandb_entity", "mlflow_uri"):
            tracker = name.partition("_")[0]
            if name in self.model_fields_set and tracker not in self.trackers:
                raise ValueError(f"{name} has no effect; add {tracker} to trackers")
        if not self.trackers and {"project", "folder"} & self.model_fields_set:
            raise ValueError("project and folder have no effect without trackers")
        return self
