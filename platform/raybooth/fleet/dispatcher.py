"""Runs a fleet: admits priors and packs against capacity, drains events, keeps the queue true."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from raybooth.data.prior_cluster import PriorTask, generate_prior
from raybooth.errors import RayBoothError
from raybooth.fleet.events import Event, NoteEvent, Orders, PackEvent, PriorEvent, StateEvent
from raybooth.fleet.growth import Patience, bundles
from raybooth.fleet.launch import (
    free_capacity,
    free_orphans,
    new_monitor,
    reason_of,
    run_pack,
    total_capacity,
)
from raybooth.fleet.ledger import JobLedger
from raybooth.fleet.live import View
from raybooth.fleet.planner import Capacity, FleetPlan, PackPlan, PriorPlan, Resources, resources_of
from raybooth.fleet.queue import JobState
from raybooth.fleet.survey import SubjectJob, Survey
from raybooth.fleet.task import Folders, Member, PackOutcome, PackTask

TICK_S = 0.25
STOP_GRACE_S = 60.0
"""Time that workers have to write their checkpoints after the first Ctrl-C."""

CANCEL_GRACE_S = 15.0
LEAST_IMAGES_OF_A_TASK = 16
"""A prior is not split finer than this: every sampling task loads the base."""


class Dispatcher:
    """One planned fleet on a running cluster; `run` returns when nothing is left to do."""

    def __init__(
        self,
        survey: Survey,
        plan: FleetPlan,
        ledger: JobLedger,
        folders: Folders,
        view: View,
        *,
        can_grow: bool,
    ) -> None:
        self._survey, self._plan, self._ledger = survey, plan, ledger
        self._folders, self._view, self._can_grow = folders, view, can_grow
        self._jobs = {job.job_id: job for job in survey.jobs}
        self._total = total_capacity()
        self._monitor = new_monitor()
        self._packs_waiting = list(plan.packs)
        self._priors_waiting = list(plan.missing_priors)
        self._packs: dict[Any, PackPlan] = {}
        self._priors: dict[Any, tuple[PriorPlan, PriorTask]] = {}
        self._unstarted: set[str] = set()
        self._missing = {prior.need.digest for prior in plan.missing_priors}
        self._stop_asked_at: float | None = None
        self._cancelled_at: float | None = None
        self._orders = Orders()
        self._patience = Patience()
        self._asked_nodes: list[dict[str, float]] = []

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Trains until every pack has ended, or has stopped because it should."""
        for pack in self._packs_waiting:
            for job_id in pack.job_ids:
                state: JobState = "waiting_prior" if pack.priors else "queued"
                self._apply(StateEvent(job_id, state), pack=pack.pack_id)
        try:
            while True:
                self._drain()
                self._end_priors()
                self._end_packs()
                if self._stop_asked_at is None and should_stop():
                    self._stop()
                if self._stop_asked_at is None:
                    self._start_priors()
                    self._admit_packs()
                    self._ask_for_nodes()
                else:
                    self._stop_harder()
                if not self._packs and not self._priors and not self._packs_waiting:
                    break
                self._follow_leases()
                self._rest()
        finally:
            self._request([])  # or nodes that nobody needs would stay
        self._drain()
        self._ledger.flush()

    def _rest(self) -> None:
        """Until something of ours ends, but a moment at most."""
        refs = [*self._packs, *self._priors]
        if refs:
            ray.wait(refs, num_returns=1, timeout=TICK_S)
        else:
            time.sleep(TICK_S)

    def _stop(self) -> None:
        """Workers write their checkpoints and return; nothing new is started."""
        self._stop_asked_at = time.monotonic()
        text = "stopping: workers write their checkpoints (Ctrl-C again stops at once)"
        self._apply(NoteEvent(text))
        self._give(replace(self._orders, stop=True))
        for ref in self._priors:
            ray.cancel(ref, recursive=True)
        for pack in self._packs_waiting:
            self._put_back(pack.job_ids)
        self._packs_waiting, self._priors_waiting = [], []

    # priors

    def _start_priors(self) -> None:
        while self._priors_waiting:
            prior = self._priors_waiting[0]
            task = self._prior_task(prior)
            free = self._unreserved()
            placed = 0
            asked = Resources(task.num_cpus, task.num_gpus)
            while placed < task.num_workers and (after := free.place(asked)) is not None:
                free, placed = after, placed + 1
            if not placed:
                return
            self._priors_waiting.pop(0)
            task = replace(task, num_workers=placed)
            ref = generate_prior.remote(task, self._monitor)
            self._priors[ref] = (prior, task)
            self._apply(PriorEvent(task.key.digest, prior.need.num_cached, task.num_images))

    def _prior_task(self, prior: PriorPlan) -> PriorTask:
        job = self._jobs[prior.job_ids[0]]
        assert job.prior_key is not None
        asked = self._prior_resources(prior)
        ready = sum(not pack.priors for pack in self._packs_waiting)
        workers = self._total.num_workers(asked)
        share = (workers - min(ready, workers - 1)) // max(1, len(self._priors_waiting))
        most = -(-prior.need.num_missing // LEAST_IMAGES_OF_A_TASK)
        return PriorTask(
            base=self._survey.fleet.base,
            revision=self._survey.fleet.revision,
            cache_root=self._folders.priors,
            key=job.prior_key,
            num_images=prior.need.num_images,
            num_workers=max(1, min(share, most)),
            num_cpus=asked.num_cpus,
            num_gpus=asked.num_gpus,
        )

    def _end_priors(self) -> None:
        for ref in _done(self._priors):
            prior, task = self._priors.pop(ref)
            digest = prior.need.digest
            try:
                report = ray.get(ref)
            except (RayError, RayBoothError) as error:
                if self._stop_asked_at is None:
                    self._drop_waiting(digest, f"its prior could not be made: {reason_of(error)}")
                continue
            self._missing.discard(digest)
            self._apply(PriorEvent(digest, task.num_images, task.num_images))
            if report.num_damaged:
                text = f"prior {prior.need.class_prompt!r}: {report.num_damaged} damaged, remade"
                self._apply(NoteEvent(text))

    def _drop_waiting(self, digest: str, reason: str) -> None:
        """Fails the jobs that need this prior; their packs go on without them."""
        kept = []
        for pack in self._packs_waiting:
            lost = {job_id for job_id in pack.job_ids if self._needs(job_id, digest)}
            for job_id in sorted(lost):
                self._apply(StateEvent(job_id, "failed", error=reason))
            left = tuple(job_id for job_id in pack.job_ids if job_id not in lost)
            priors = tuple(other for other in pack.priors if other != digest)
            if left:
                kept.append(replace(pack, job_ids=left, priors=priors))
        self._packs_waiting = kept

    def _needs(self, job_id: str, digest: str) -> bool:
        key = self._jobs[job_id].prior_key
        return key is not None and key.digest == digest

    # packs

    def _admit_packs(self) -> None:
        ready = [pack for pack in self._packs_waiting if not self._missing & set(pack.priors)]
        for pack in ready:
            if not self._has_room(pack):
                continue
            self._packs_waiting.remove(pack)
            task = self._pack_task(pack)
            ref = run_pack.remote(task, self._monitor)
            self._packs[ref] = pack
            self._unstarted.add(pack.pack_id)
            self._apply(PackEvent(pack.pack_id, "starting", f"{len(pack.job_ids)} subjects"))

    def _has_room(self, pack: PackPlan) -> bool:
        """Whether its workers can run at once: by our own count and by what the cluster says."""
        if self._unreserved().place(pack.resources, pack.num_workers) is None:
            return False
        free = free_capacity()
        for other in self._packs.values():
            if other.pack_id in self._unstarted:
                free = free.place(other.resources, other.num_workers) or free
        return free.place(pack.resources, pack.num_workers) is not None

    def _unreserved(self) -> Capacity:
        """The cluster without what our own packs and priors hold."""
        self._total = free = total_capacity()
        for resources in self._held():
            free = free.place(resources) or free
        return free

    def _held(self) -> list[Resources]:
        """The workers of our own packs and priors."""
        held = [worker for pack in self._packs.values() for worker in _workers(pack)]
        for _, task in self._priors.values():
            held += [Resources(task.num_cpus, task.num_gpus)] * task.num_workers
        return held

    # nodes

    def _ask_for_nodes(self) -> None:
        """Has the autoscaler bring nodes for all that runs or could start; gives up on the rest."""
        if not self._can_grow:
            return
        packs = {
            pack.pack_id: pack.resources
            for pack in self._packs_waiting
            if not self._missing & set(pack.priors)
        }
        priors = {prior.need.digest: self._prior_resources(prior) for prior in self._priors_waiting}
        waiting = {**packs, **priors}
        more = [
            worker
            for pack in self._packs_waiting
            if pack.pack_id in packs
            for worker in _workers(pack)[1:]
        ]
        self._request([*self._held(), *waiting.values(), *more])
        for name in sorted(self._patience.overdue(waiting, self._total, time.monotonic())):
            reason = f"no node with {waiting[name]} came up in time"
            if name in priors:
                self._priors_waiting = [p for p in self._priors_waiting if p.need.digest != name]
                self._drop_waiting(name, f"its prior could not be made: {reason}")
                continue
            for pack in [pack for pack in self._packs_waiting if pack.pack_id == name]:
                self._packs_waiting.remove(pack)
                for job_id in pack.job_ids:
                    self._apply(StateEvent(job_id, "failed", error=reason))

    def _request(self, workers: list[Resources]) -> None:
        """Tells the autoscaler what the cluster should hold; stands until the next word."""
        asked = bundles(workers)
        if not self._can_grow or asked == self._asked_nodes:
            return
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=asked)
        self._asked_nodes = asked
        missing = [worker for worker in workers if not self._total.num_workers(worker)]
        if missing:
            self._apply(NoteEvent(f"waiting for nodes: {len(missing)} with {missing[0]}"))

    def _prior_resources(self, prior: PriorPlan) -> Resources:
        train = self._jobs[prior.job_ids[0]].subject.train
        return resources_of(train.resources, self._total)

    def _pack_task(self, pack: PackPlan) -> PackTask:
        return PackTask(
            pack_id=pack.pack_id,
            run_name=f"{pack.pack_id}-{secrets.token_hex(4)}",
            base=self._survey.fleet.base,
            revision=self._survey.fleet.revision,
            base_fingerprint=self._survey.base_fingerprint,
            members=tuple(_member(self._jobs[job_id]) for job_id in pack.job_ids),
            resources=pack.resources,
            max_failures=pack.max_failures,
            folders=self._folders,
        )

    def _end_packs(self) -> None:
        for ref in _done(self._packs):
            pack = self._packs.pop(ref)
            self._unstarted.discard(pack.pack_id)
            reason, outcome = "the pack ended without it", None
            try:
                outcome = ray.get(ref)
            except (RayError, RayBoothError) as error:
                reason = reason_of(error)
                free_orphans()
            self._drain()
            self._close_pack(pack, outcome, reason)

    def _close_pack(self, pack: PackPlan, outcome: PackOutcome | None, reason: str) -> None:
        """Jobs that the worker left open go back to the queue on a stop, else they fail."""
        for job_id in pack.job_ids:
            if not self._ledger.is_open(job_id):
                continue
            reference = self._ledger.published_reference(job_id)
            if reference is not None:  # its last words were lost
                self._apply(StateEvent(job_id, "published", reference=reference))
            elif self._stop_asked_at is not None:
                self._put_back([job_id])
            elif job_id not in self._orders.cancelled:
                self._apply(StateEvent(job_id, "failed", error=reason))
        text = "ended" if outcome is not None else f"failed for good: {reason}"
        if outcome is not None or self._stop_asked_at is None:
            self._apply(PackEvent(pack.pack_id, text))

    def _put_back(self, job_ids: Iterable[str]) -> None:
        for job_id in job_ids:
            if self._ledger.is_open(job_id):
                self._apply(StateEvent(job_id, "queued"))

    # events and orders

    def _drain(self) -> None:
        for event in ray.get(self._monitor.drain.remote()):
            if isinstance(event, PackEvent) and event.state == "started":
                self._unstarted.discard(event.pack_id)
            self._apply(event)

    def _apply(self, event: Event, pack: str | None = None) -> None:
        if self._ledger.apply(event, pack=pack):
            self._view.show(event)

    def _give(self, orders: Orders) -> None:
        self._orders = orders
        ray.get(self._monitor.give.remote(orders))

    def _follow_leases(self) -> None:
        """Jobs that another trainer took over (this one was asleep too long) leave our packs."""
        training = [job_id for pack in self._packs.values() for job_id in pack.job_ids]
        lost = self._ledger.lost(training) - self._orders.cancelled
        if lost:
            self._give(replace(self._orders, cancelled=self._orders.cancelled | lost))

    def _stop_harder(self) -> None:
        assert self._stop_asked_at is not None
        now = time.monotonic()
        if self._cancelled_at is None and now - self._stop_asked_at > STOP_GRACE_S:
            self._cancelled_at = now
            for ref in self._packs:
                ray.cancel(ref)
        elif self._cancelled_at is not None and now - self._cancelled_at > CANCEL_GRACE_S:
            for pack in self._packs.values():
                self._put_back(pack.job_ids)
            self._packs, self._priors = {}, {}


def _member(job: SubjectJob) -> Member:
    return Member(job.job_id, job.subject)


def _workers(pack: PackPlan) -> list[Resources]:
    return [pack.resources] * pack.num_workers


def _done(refs: Iterable[Any]) -> list[Any]:
    waiting = list(refs)
    if not waiting:
        return []
    done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
    return list(done)
