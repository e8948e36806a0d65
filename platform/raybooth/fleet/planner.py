"""Decides which subjects share a pack, how many packs there are and which priors come first.

Pure: takes what is known of jobs and cluster, returns a plan, touches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from raybooth.config import PackConfig, Precision, ResourcesConfig
from raybooth.errors import ClusterError


@dataclass(frozen=True, slots=True)
class Resources:
    """What one worker holds while it runs."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def fits(self, node: NodeCapacity) -> bool:
        """Whether the node could run one such worker."""
        return self.num_cpus <= node.num_cpus + 1e-6 and self.num_gpus <= node.num_gpus + 1e-6

    def __str__(self) -> str:
        gpus = f" and {self.num_gpus:g} GPU" if self.num_gpus else ""
        return f"{self.num_cpus:g} CPU{gpus}"


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What one node of the cluster has (or has left)."""

    num_cpus: float
    num_gpus: float = 0.0
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None

    def less(self, asked: Resources) -> NodeCapacity:
        """The node with a worker placed on it."""
        cpus, gpus = self.num_cpus - asked.num_cpus, self.num_gpus - asked.num_gpus
        return NodeCapacity(cpus, gpus, self.memory_bytes, self.gpu_memory_bytes)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The nodes of a cluster."""

    nodes: tuple[NodeCapacity, ...]

    @property
    def has_gpus(self) -> bool:
        return any(node.num_gpus > 0 for node in self.nodes)

    def num_workers(self, asked: Resources) -> int:
        """Workers of this kind that can run at once."""
        return sum(_workers_on(node, asked) for node in self.nodes)

    def place(self, asked: Resources, count: int = 1) -> Capacity | None:
        """The capacity left once `count` such workers run, each on the fullest node for it."""
        if count > 1:
            left = self.place(asked)
            return None if left is None else left.place(asked, count - 1)
        fitting = [i for i, node in enumerate(self.nodes) if asked.fits(node)]
        if not fitting:
            return None
        best = min(fitting, key=lambda i: (self.nodes[i].num_gpus, self.nodes[i].num_cpus))
        nodes = list(self.nodes)
        nodes[best] = nodes[best].less(asked)
        return Capacity(tuple(nodes))


@dataclass(frozen=True, slots=True)
class PriorNeed:
    """Prior images that a subject asks for, by the digest of their key."""

    digest: str
    class_prompt: str
    num_images: int
    num_cached: int

    @property
    def num_missing(self) -> int:
        return max(0, self.num_images - self.num_cached)


@dataclass(frozen=True, slots=True)
class PlanJob:
    """What the planner must know of one subject's job."""

    job_id: str
    base: str
    """Fingerprint."""

    method: str
    resolution: int
    precision: Precision
    gradient_checkpointing: bool
    targets: str | tuple[str, ...]
    rank: int
    batch_size: int
    num_steps_left: int
    prior: PriorNeed | None
    pack: PackConfig
    resources: ResourcesConfig
    num_workers: int = 1
    """Workers that share a full run."""
    base_prediction: bool = False
    """Whether prior rows learn what the base predicts, without prior images."""
    text_targets: str | tuple[str, ...] | None = None
    identifier_tokens: int = 0
    """Learned tokens; words that train differently are encoded in different packs."""

    @property
    def num_rows(self) -> int:
        """Rows of one train step: instance rows, and as many prior rows."""
        return self.batch_size * (2 if self.prior or self.base_prediction else 1)

    @property
    def load(self) -> int:
        """Rows that are left to train."""
        return max(1, self.num_steps_left) * self.num_rows

    @property
    def num_missing_priors(self) -> int:
        return self.prior.num_missing if self.prior else 0


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Subjects that one worker trains together, or one that several share in a full run."""

    pack_id: str
    job_ids: tuple[str, ...]
    resources: Resources
    max_failures: int
    num_rows: int
    num_train_steps: int
    """Steps of the longest job."""

    memory_bytes: int
    priors: tuple[str, ...]
    """Digests of the missing priors that it must wait for."""

    num_workers: int = 1
    """Workers of `resources` each: more than one in a full run alone."""


@dataclass(frozen=True, slots=True)
class PriorPlan:
    """Prior images that are generated once, for all the jobs that ask for them."""

    need: PriorNeed
    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """Packs in the order in which they are to start, and the priors that they need."""

    packs: tuple[PackPlan, ...]
    priors: tuple[PriorPlan, ...]

    @property
    def missing_priors(self) -> tuple[PriorPlan, ...]:
        """Those with images to generate, those that hold up the most jobs first."""
        missing = [prior for prior in self.priors if prior.need.num_missing]
        return tuple(sorted(missing, key=lambda prior: (-len(prior.job_ids), prior.need.digest)))


PackMemory = Callable[[Sequence[PlanJob]], int]
"""Predicted bytes of a pack of these jobs on its device."""


def plan_fleet(
    jobs: Sequence[PlanJob],
    capacity: Capacity,
    pack_memory: PackMemory = lambda jobs: 0,
    *,
    can_grow: bool = False,
) -> FleetPlan:
    """Packs of alike jobs, as many as keep every worker of the cluster busy, evenly loaded.

    Raises ClusterError naming what is asked when no node could ever run a pack (unless the
    cluster `can_grow`) or when a subject alone does not fit the memory.
    """
    groups: dict[tuple[object, ...], list[PlanJob]] = {}
    for job in jobs:
        groups.setdefault(_alike(job), []).append(job)
    packs: list[PackPlan] = []
    shares = _shares([list(group) for group in groups.values()], capacity, pack_memory, can_grow)
    for group, num_packs, limit in shares:
        for members in _split(sorted(group, key=_order), num_packs, limit):
            packs.append(_pack(members, capacity, pack_memory))
    packs.sort(key=lambda pack: (len(pack.priors) > 0, -pack.num_train_steps * pack.num_rows))
    named = tuple(_named(pack, index) for index, pack in enumerate(packs))
    return FleetPlan(named, _priors(jobs))


def halves(num_rows: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """The jobs of a pack that ran out of memory as two packs of close to equal rows.

    Empty when there is nothing to split.
    """
    if len(num_rows) < 2:
        return ()
    packs: tuple[list[str], list[str]] = ([], [])
    for job_id in sorted(num_rows, key=lambda job_id: -num_rows[job_id]):
        smaller = min(packs, key=lambda pack: sum(num_rows[other] for other in pack))
        smaller.append(job_id)
    return tuple(tuple(pack) for pack in packs)


def resources_of(config: ResourcesConfig, capacity: Capacity) -> Resources:
    """What a worker asks: one GPU where the cluster has any, unless the config says otherwise."""
    gpus = config.num_gpus
    return Resources(config.num_cpus, float(capacity.has_gpus) if gpus is None else gpus)


def _alike(job: PlanJob) -> tuple[object, ...]:
    """What jobs must share to be trained in one pack; a full run has a process for itself."""
    return (
        job.job_id if job.method == "full" else "",
        job.base,
        job.method,
        job.resolution,
        job.precision,
        job.gradient_checkpointing,
        job.targets,
        job.text_targets,
        job.identifier_tokens,
        job.pack,
        job.resources,
    )


def _shares(
    groups: list[list[PlanJob]], capacity: Capacity, pack_memory: PackMemory, can_grow: bool
) -> list[tuple[list[PlanJob], int, int]]:
    """(group, number of packs, most jobs of one pack), the workers shared out by load."""
    limits = [_limit(group, capacity, pack_memory, can_grow) for group in groups]
    counts = [-(-len(group) // limit) for group, limit in zip(groups, limits, strict=True)]
    workers = max((_workers(group, capacity) for group in groups), default=1)
    wanted = -(-sum(counts) // workers) * workers  # whole waves: no worker idles in the last one
    while sum(counts) < wanted:
        loads = [
            sum(job.load for job in group) / count if count < len(group) else 0.0
            for group, count in zip(groups, counts, strict=True)
        ]
        if max(loads) == 0.0:
            break  # every job is alone already
        counts[loads.index(max(loads))] += 1
    return list(zip(groups, counts, limits, strict=True))


def _limit(
    group: Sequence[PlanJob], capacity: Capacity, pack_memory: PackMemory, can_grow: bool
) -> int:
    """Most jobs of this kind that one pack may hold."""
    asked = resources_of(group[0].resources, capacity)
    nodes = [node for node in capacity.nodes if asked.fits(node)]
    workers = group[0].num_workers
    if nodes and not can_grow and capacity.place(asked, workers) is None:
        found = f"room for {capacity.num_workers(asked)}"
        what = f"{group[0].job_id} asks {workers} workers of {asked}"
        raise ClusterError(what, found, "lower full.num_workers, or use a larger cluster")
    if not nodes and not can_grow:
        cpus = max((node.num_cpus for node in capacity.nodes), default=0.0)
        gpus = max((node.num_gpus for node in capacity.nodes), default=0.0)
        found = f"at most {cpus:g} CPU and {gpus:g} GPU on a node"
        do = "lower resources.num_cpus or num_gpus, or use a larger cluster"
        raise ClusterError(f"no node can run a pack that asks {asked}", found, do)
    room = _memory(nodes, asked)
    largest_first = sorted(group, key=lambda job: (-job.num_rows, -job.rank))
    limit = min(group[0].pack.max_subjects, len(group))
    while room is not None and limit > 0 and pack_memory(largest_first[:limit]) > room:
        limit -= 1
    if limit == 0:
        found = f"{pack_memory(largest_first[:1]) / 2**30:.1f} GiB of {(room or 0) / 2**30:.1f} GiB"
        do = "lower resolution, batch_size or adapter.rank, or use a larger device"
        raise ClusterError(f"{group[0].job_id} does not fit the memory of a worker", found, do)
    return limit


def _memory(nodes: Sequence[NodeCapacity], asked: Resources) -> int | None:
    """Bytes that one worker may use on the smallest of the nodes; None when not known."""
    if asked.num_gpus:
        devices = [node.gpu_memory_bytes for node in nodes if node.gpu_memory_bytes]
        return int(min(devices) * min(1.0, asked.num_gpus)) if devices else None
    shares = [
        node.memory_bytes // max(1, _workers_on(node, asked)) for node in nodes if node.memory_bytes
    ]
    return min(shares) if shares else None


def _workers(group: Sequence[PlanJob], capacity: Capacity) -> int:
    return max(1, capacity.num_workers(resources_of(group[0].resources, capacity)))


def _workers_on(node: NodeCapacity, asked: Resources) -> int:
    count = int(node.num_cpus / asked.num_cpus + 1e-6)
    return min(count, int(node.num_gpus / asked.num_gpus + 1e-6)) if asked.num_gpus else count


def _order(job: PlanJob) -> tuple[object, ...]:
    """Jobs that wait for the same prior stand together, those that wait for none first."""
    digest = _waits_for(job)
    return (bool(digest), digest, -job.load, job.job_id)


def _waits_for(job: PlanJob) -> str:
    return job.prior.digest if job.prior and job.num_missing_priors else ""


def _split(jobs: Sequence[PlanJob], num_packs: int, limit: int) -> list[list[PlanJob]]:
    """The jobs, in order, in `num_packs` runs of at most `limit` with loads close to equal."""
    packs: list[list[PlanJob]] = []
    rest = list(jobs)
    for packs_left in range(num_packs, 0, -1):
        target = sum(job.load for job in rest) / packs_left
        least = max(1, len(rest) - limit * (packs_left - 1))
        most = min(limit, len(rest) - (packs_left - 1))
        size, load = least, sum(job.load for job in rest[:least])
        while size < most:
            short = target - load - rest[size].load / 2
            if short < 0 or (short == 0 and _waits_for(rest[size]) != _waits_for(rest[size - 1])):
                break
            load += rest[size].load
            size += 1
        packs.append(rest[:size])
        rest = rest[size:]
    assert not rest, "every job is in a pack"
    return packs


def _pack(members: Sequence[PlanJob], capacity: Capacity, pack_memory: PackMemory) -> PackPlan:
    waiting = {job.prior.digest for job in members if job.prior and job.num_missing_priors}
    return PackPlan(
        pack_id="",
        job_ids=tuple(job.job_id for job in members),
        resources=resources_of(members[0].resources, capacity),
        max_failures=members[0].pack.max_failures,
        num_rows=sum(job.num_rows for job in members),
        num_train_steps=max(job.num_steps_left for job in members),
        memory_bytes=pack_memory(members),
        priors=tuple(sorted(waiting)),
        num_workers=members[0].num_workers,
    )


def _named(pack: PackPlan, index: int) -> PackPlan:
    return replace(pack, pack_id=f"pack-{index + 1}")


def _priors(jobs: Sequence[PlanJob]) -> tuple[PriorPlan, ...]:
    """Each distinct prior once, as many images as its most demanding job asks."""
    needs: dict[str, PriorNeed] = {}
    users: dict[str, list[str]] = {}
    for job in jobs:
        if job.prior is None:
            continue
        known = needs.setdefault(job.prior.digest, job.prior)
        if job.prior.num_images > known.num_images:
            needs[job.prior.digest] = job.prior
        users.setdefault(job.prior.digest, []).append(job.job_id)
    return tuple(PriorPlan(need, tuple(users[digest])) for digest, need in needs.items())
