"""What runs in the processes of the engine deployments: a service of one base, or full models."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybooth.config import ServeConfig, parse_config
from raybooth.store import Store
from raybooth_serving.names.catalog import KnownBase
from raybooth_serving.scale.prometheus import Exporter
from raybooth_serving.scale.scaling import BACKLOG_S, FULLNESS
from raybooth_serving.wire.api import ImagesRequest, ImagesResponse
from raybooth_serving.wire.caller import Caller
from raybooth_serving.wire.streams import StreamEvent

if TYPE_CHECKING:
    from raybooth_serving.service import Service


class EngineReplica:
    """A service of the base at `place` of the config, on the hardware of one Ray actor."""

    def __init__(self, config: Mapping[str, Any], place: int, root: str) -> None:
        parsed = parse_config(ServeConfig, config, "the engine's config")
        from raybooth_serving.service import Service  # torch is for engines, not for gateways

        self.service = Service.start(parsed, parsed.bases[place], Store(Path(root) / "models"))
        self.exporter = Exporter(self.service.name, self.service.engine.metrics)

    async def generate(self, request: ImagesRequest, caller: Caller) -> ImagesResponse:
        """See Service."""
        return await self.service.generate(request, caller)

    async def stream(
        self, request: ImagesRequest, caller: Caller
    ) -> AsyncGenerator[StreamEvent, None]:
        """See Service."""
        async with aclosing(self.service.stream(request, caller)) as events:
            async for event in events:
                yield event

    async def describe(self) -> KnownBase:
        """The base that it serves."""
        return self.service.known

    async def forget(self, subject_id: str) -> None:
        """A subject was deleted: nothing of it stays in memory."""
        self.service.engine.forget(subject_id)

    async def metrics(self) -> dict[str, float]:
        """Counters of this replica."""
        return await self.service.metrics()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve's hook: what BacklogPolicy reads."""
        engine = self.service.engine
        return {BACKLOG_S: engine.backlog_s(), FULLNESS: engine.fullness()}

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine has died."""
        await self.service.check_health()
        await self.service.metrics()
        self.exporter.refresh()


class FullReplica:
    """Full fine-tunes on the hardware of one Ray actor, loaded when they are asked for."""

    def __init__(self, config: Mapping[str, Any], root: str) -> None:
        parsed = parse_config(ServeConfig, config, "the engine's config")
        from raybooth_serving.scale.full import FullModel, FullModels, load_full_service

        assert parsed.full is not None
        store = Store(Path(root) / "models")

        def load(model: FullModel) -> Service:
            served = parsed.bases[model.place]
            service = load_full_service(parsed, served, store, model.reference)
            self.exporters[model] = Exporter(model.reference, service.engine.metrics)
            return service

        self.exporters: dict[FullModel, Exporter] = {}
        self.model = FullModel
        self.models = FullModels(load, parsed.full.max_models, parsed.limits.timeout_s)

    async def generate(self, request: ImagesRequest, caller: Caller, place: int) -> ImagesResponse:
        """See Service; `place` is that of the model's base."""
        async with self.models.use(self.model(place, request.model)) as service:
            return await service.generate(request, caller)

    async def stream(
        self, request: ImagesRequest, caller: Caller, place: int
    ) -> AsyncGenerator[StreamEvent, None]:
        """See Service."""
        async with (
            self.models.use(self.model(place, request.model)) as service,
            aclosing(service.stream(request, caller)) as events,
        ):
            async for event in events:
                yield event

    async def metrics(self) -> dict[str, float]:
        """Counters of this replica, over all its models."""
        return self.models.snapshot()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve's hook: what BacklogPolicy reads; models take turns, so backlogs add up."""
        engines = [service.engine for service in self.models.services.values()]
        return {
            BACKLOG_S: sum(engine.backlog_s() for engine in engines),
            FULLNESS: max((engine.fullness() for engine in engines), default=0.0),
        }

    async def forget(self, subject_id: str) -> None:
        """A subject was deleted: nothing of it stays in memory."""
        await self.models.forget(subject_id)

    async def check_health(self) -> None:
        """Ray Serve replaces a replica one of whose engines has died."""
        for model, service in list(self.models.services.items()):
            await service.check_health()
            await service.metrics()
            self.exporters[model].refresh()
