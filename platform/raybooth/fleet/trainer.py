"""Ray Train's trainer without the helper actors that a pack has no use for."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class PackTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer that starts four processes where Ray's own starts seven.

    A pack has no Ray Data sets, and the dispatcher frees the placement groups of dead
    controllers itself (`launch.free_orphans`), also where Ray's cleaner cannot: without a
    dashboard, or while the group is pending.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept: list[Any] = super()._create_default_callbacks()
        return [callback for callback in kept if not isinstance(callback, unused)]
