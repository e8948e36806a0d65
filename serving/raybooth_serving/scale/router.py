"""Ray Serve's part of `spill.py`: a subject's requests go to the replica that holds its adapter.

Ray's ConsistentHashRouter leaves a replica only when it rejects a call, which an engine with a
queue of its own does not do before it is full: a hot subject would be refused while other replicas
idle. This one counts the images that it has sent, and spills.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from raybooth_serving.scale.spill import spill_order

_WHOLE_RING = 1 << 16


class BoundedLoadRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray has no types
    """Chooses replicas by subject and load; waits a bounded time where there is none."""

    queue_len_response_deadline_s = 2.0
    """Ray's 0.1 s would leave a replica that is busy with its batch for one without the adapter."""

    def initialize_state(self, *, num_free: int, wait_s: float) -> None:
        """Ray's hook: the router's kwargs. `num_free` as in `spill_order`."""
        super().initialize_state(num_fallback_replicas=_WHOLE_RING)
        self._num_free = num_free
        self._wait_s = wait_s
        self._in_flight: dict[str, tuple[ReplicaID, int]] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, in the order of `spill_order`."""
        chosen = super().choose_replicas(candidate_replicas, pending_request)
        ranks: list[list[RunningReplica]] = await chosen
        if pending_request is None or not ranks:
            return ranks
        key = pending_request.metadata.internal_request_id
        self._in_flight.pop(key, None)  # tried before, and rejected
        loads: Counter[ReplicaID] = Counter()
        for replica_id, count in self._in_flight.values():
            loads[replica_id] += count
        ring = {rank[0].replica_id: rank for rank in ranks}
        num_images = _num_images(pending_request)
        order = spill_order(list(ring), loads, num_images, self._num_free)
        self._in_flight[key] = order[0], num_images
        return [ring[replica_id] for replica_id in order]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Ray's own waits for ever; raises DeploymentUnavailableError after `wait_s`."""
        key = pending_request.metadata.internal_request_id
        try:
            async with asyncio.timeout(self._wait_s):
                return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        except TimeoutError as error:
            self._in_flight.pop(key, None)
            raise DeploymentUnavailableError(self._deployment_id) from error
        except asyncio.CancelledError:
            self._in_flight.pop(key, None)
            raise

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Ray's hook: the call is at this replica, be it the first choice or not."""
        key = pending_request.metadata.internal_request_id
        if key in self._in_flight:
            self._in_flight[key] = replica_id, self._in_flight[key][1]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray's hook: the call has ended, however."""
        self._in_flight.pop(internal_request_id, None)


def _num_images(request: PendingRequest) -> int:
    """Images that a call asks for; none for calls that are not for images."""
    first: Any = request.args[0] if request.args else None
    return getattr(first, "n", 0)
