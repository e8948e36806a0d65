"""Packs hold alike jobs, fit their worker, are evenly loaded, and wait only for missing priors."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from raybooth.config import PackConfig, ResourcesConfig
from raybooth.errors import ClusterError
from raybooth.fleet.planner import (
    Capacity,
    FleetPlan,
    NodeCapacity,
    PlanJob,
    PriorNeed,
    Resources,
    halves,
    plan_fleet,
    resources_of,
)


def cpus(*counts: float) -> Capacity:
    return Capacity(tuple(NodeCapacity(count) for count in counts))


def prior(word: str, cached: int = 0, wanted: int = 100) -> PriorNeed:
    return PriorNeed(f"digest-{word}", f"a photo of a {word}", wanted, cached)


JOB = PlanJob(
    job_id="job",
    base="base",
    method="lora",
    resolution=64,
    precision="fp32",
    gradient_checkpointing=False,
    targets="all",
    rank=4,
    batch_size=1,
    num_steps_left=100,
    prior=None,
    pack=PackConfig(),
    resources=ResourcesConfig(),
)


def jobs(count: int, job: PlanJob = JOB, name: str = "job") -> list[PlanJob]:
    return [replace(job, job_id=f"{name}-{i:03}") for i in range(count)]


def sizes(plan: FleetPlan) -> list[int]:
    return [len(pack.job_ids) for pack in plan.packs]


def test_six_subjects_on_two_workers_are_three_and_three() -> None:
    plan = plan_fleet(jobs(6), cpus(2))
    assert sizes(plan) == [3, 3]
    assert [pack.pack_id for pack in plan.packs] == ["pack-1", "pack-2"]
    assert plan.packs[0].num_rows == 3
    assert plan.packs[0].num_train_steps == 100


def test_one_subject_is_one_pack() -> None:
    assert sizes(plan_fleet(jobs(1), cpus(8))) == [1]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert plan_fleet([], cpus(2)) == FleetPlan((), ())


def test_every_worker_has_a_pack_while_there_are_subjects() -> None:
    assert sorted(sizes(plan_fleet(jobs(6), cpus(4)))) == [1, 1, 2, 2]


def test_packs_come_in_whole_waves() -> None:
    """20 subjects at most 8 a pack fill 3 packs; on 2 workers 4 packs of 5 end sooner."""
    assert sizes(plan_fleet(jobs(20), cpus(2))) == [5, 5, 5, 5]


def test_a_pack_holds_at_most_max_subjects() -> None:
    job = replace(JOB, pack=PackConfig(max_subjects=4))
    plan = plan_fleet(jobs(10, job), cpus(1))
    assert max(sizes(plan)) <= 4
    assert sum(sizes(plan)) == 10


def test_a_pack_holds_no_more_than_memory_allows() -> None:
    machine = Capacity((NodeCapacity(1, memory_bytes=1000),))
    plan = plan_fleet(jobs(10), machine, lambda members: 100 + 300 * len(members))
    assert max(sizes(plan)) == 3
    assert all(pack.memory_bytes <= 1000 for pack in plan.packs)


def test_workers_of_a_node_share_its_memory() -> None:
    machine = Capacity((NodeCapacity(2, memory_bytes=2000),))
    plan = plan_fleet(jobs(10), machine, lambda members: 100 + 300 * len(members))
    assert max(sizes(plan)) == 3


def test_a_gpu_s_memory_bounds_a_gpu_pack() -> None:
    machine = Capacity((NodeCapacity(8, 1, memory_bytes=50, gpu_memory_bytes=700),))
    plan = plan_fleet(jobs(4), machine, lambda members: 100 + 300 * len(members))
    assert sizes(plan) == [2, 2]
    assert plan.packs[0].resources == Resources(1.0, 1.0)


def test_a_subject_that_fits_no_worker_is_refused_with_figures() -> None:
    machine = Capacity((NodeCapacity(1, memory_bytes=2**30),))
    with pytest.raises(ClusterError, match=r"job-000 does not fit.*3\.0 GiB of 1\.0 GiB"):
        plan_fleet(jobs(2), machine, lambda members: 3 * 2**30 * len(members))


def test_resources_that_no_node_has_are_refused_unless_the_cluster_grows() -> None:
    big = jobs(3, replace(JOB, resources=ResourcesConfig(num_cpus=4, num_gpus=1)))
    with pytest.raises(ClusterError, match=r"4 CPU and 1 GPU.*2 CPU and 0 GPU"):
        plan_fleet(big, cpus(2, 2))
    assert sizes(plan_fleet(big, cpus(2, 2), can_grow=True)) == [3]


def test_a_gpu_is_taken_where_there_is_one_unless_the_config_says() -> None:
    with_gpu = Capacity((NodeCapacity(8, 2),))
    assert resources_of(ResourcesConfig(), with_gpu) == Resources(1.0, 1.0)
    assert resources_of(ResourcesConfig(), cpus(8)) == Resources(1.0, 0.0)
    assert resources_of(ResourcesConfig(num_gpus=0), with_gpu) == Resources(1.0, 0.0)
    assert resources_of(ResourcesConfig(num_gpus=0.5), with_gpu) == Resources(1.0, 0.5)


def test_workers_are_counted_node_by_node() -> None:
    three = Resources(3.0)
    assert cpus(8, 4, 2).num_workers(three) == 3
    assert cpus(2, 2).num_workers(three) == 0
    assert Capacity((NodeCapacity(8, 1),)).num_workers(Resources(1.0, 0.25)) == 4


def test_a_worker_is_placed_on_the_fullest_node_that_takes_it() -> None:
    left = cpus(8, 2).place(Resources(2.0))
    assert left == cpus(8, 0)
    assert cpus(1, 1).place(Resources(2.0)) is None
    beside_gpus = Capacity((NodeCapacity(8, 1), NodeCapacity(16)))
    placed = beside_gpus.place(Resources(1.0))
    assert placed is not None
    assert placed.nodes[0].num_cpus == 8


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, base="another"),
        replace(JOB, resolution=128),
        replace(JOB, precision="bf16"),
        replace(JOB, targets="attention"),
        replace(JOB, pack=PackConfig(max_failures=0)),
        replace(JOB, resources=ResourcesConfig(num_cpus=2)),
    ],
)
def test_only_alike_jobs_share_a_pack(other: PlanJob) -> None:
    plan = plan_fleet([*jobs(2), *jobs(2, other, "other")], cpus(2))
    assert sorted(pack.job_ids for pack in plan.packs) == [
        ("job-000", "job-001"),
        ("other-000", "other-001"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        replace(JOB, rank=32),
        replace(JOB, batch_size=4),
        replace(JOB, num_steps_left=7),
        replace(JOB, prior=prior("dog", cached=100)),
    ],
)
def test_rank_batch_length_and_prior_may_differ_within_a_pack(other: PlanJob) -> None:
    assert sizes(plan_fleet([*jobs(1), *jobs(1, other, "other")], cpus(1))) == [2]


def test_workers_go_to_the_groups_with_the_most_to_train() -> None:
    heavy = jobs(6, replace(JOB, num_steps_left=1000), "heavy")
    light = jobs(2, replace(JOB, resolution=128, num_steps_left=10), "light")
    plan = plan_fleet([*light, *heavy], cpus(4))
    assert sorted(sizes(plan)) == [2, 2, 2, 2]
    assert sum(pack.job_ids[0].startswith("heavy") for pack in plan.packs) == 3


def test_loads_are_balanced_by_what_is_left_to_train() -> None:
    uneven = [*jobs(1, replace(JOB, num_steps_left=300), "long"), *jobs(3)]
    plan = plan_fleet(uneven, cpus(2))
    assert sorted(sizes(plan)) == [1, 3]


def test_a_pack_that_needs_no_missing_prior_starts_first_and_waits_for_nothing() -> None:
    ready = jobs(3, replace(JOB, prior=prior("cat", cached=100)), "cat")
    waiting = jobs(3, replace(JOB, prior=prior("dog", cached=40)), "dog")
    plan = plan_fleet([*waiting, *ready], cpus(2))
    assert [pack.priors for pack in plan.packs] == [(), ("digest-dog",)]
    assert plan.packs[0].job_ids == ("cat-000", "cat-001", "cat-002")


def test_subjects_of_one_class_stand_together() -> None:
    rows = [*jobs(2, replace(JOB, prior=prior("dog")), "dog"), *jobs(1, replace(JOB, batch_size=2))]
    rows += jobs(1, replace(JOB, prior=prior("cat")), "cat")
    plan = plan_fleet(rows, cpus(3))
    assert sorted(pack.priors for pack in plan.packs) == [(), ("digest-cat",), ("digest-dog",)]


def test_each_prior_is_planned_once_for_its_most_demanding_subject() -> None:
    some = replace(JOB, prior=prior("dog", cached=60, wanted=50))
    more = replace(JOB, prior=prior("dog", cached=60, wanted=200))
    plan = plan_fleet([*jobs(2, some, "some"), *jobs(1, more, "more")], cpus(1))
    assert len(plan.priors) == 1
    assert plan.priors[0].need.num_images == 200
    assert plan.priors[0].need.num_missing == 140
    assert plan.priors[0].job_ids == ("some-000", "some-001", "more-000")
    assert plan.missing_priors == plan.priors


def test_a_cached_prior_is_in_the_plan_but_not_missing() -> None:
    plan = plan_fleet(jobs(1, replace(JOB, prior=prior("dog", cached=100))), cpus(1))
    assert [p.need.num_missing for p in plan.priors] == [0]
    assert plan.missing_priors == ()


def test_priors_that_hold_up_the_most_subjects_come_first() -> None:
    one = jobs(1, replace(JOB, prior=prior("cat")), "cat")
    two = jobs(2, replace(JOB, prior=prior("dog")), "dog")
    plan = plan_fleet([*one, *two], cpus(2))
    assert [p.need.digest for p in plan.missing_priors] == ["digest-dog", "digest-cat"]


def test_prior_rows_count_as_load() -> None:
    assert replace(JOB, batch_size=3).num_rows == 3
    assert replace(JOB, batch_size=3, prior=prior("dog")).num_rows == 6
    assert replace(JOB, num_steps_left=0).load == 1


def _check(plan: FleetPlan, given: Sequence[PlanJob]) -> None:
    by_id = {job.job_id: job for job in given}
    placed = [job_id for pack in plan.packs for job_id in pack.job_ids]
    assert sorted(placed) == sorted(by_id)
    for pack in plan.packs:
        members = [by_id[job_id] for job_id in pack.job_ids]
        assert 1 <= len(members) <= members[0].pack.max_subjects
        assert len({(job.resolution, job.targets, job.pack) for job in members}) == 1
        missing = {job.prior.digest for job in members if job.prior and job.num_missing_priors}
        assert set(pack.priors) == missing
    assert len({pack.pack_id for pack in plan.packs}) == len(plan.packs)


@pytest.mark.parametrize("seed", range(40))
def test_any_fleet_is_planned_whole(seed: int) -> None:
    rng = random.Random(seed)
    needs = [None, prior("dog"), prior("cat", cached=100), prior("cup", cached=10)]
    given = [
        replace(
            JOB,
            job_id=f"job-{i}",
            resolution=rng.choice((64, 128)),
            targets=rng.choice(("all", "attention")),
            num_steps_left=rng.choice((0, 10, 400, 800)),
            batch_size=rng.choice((1, 2)),
            prior=rng.choice(needs),
            pack=PackConfig(max_subjects=rng.choice((1, 3, 8))),
        )
        for i in range(rng.randint(1, 60))
    ]
    capacity = cpus(*(rng.randint(1, 16) for _ in range(rng.randint(1, 4))))
    plan = plan_fleet(given, capacity)
    _check(plan, given)
    rng.shuffle(given)
    assert {pack.job_ids for pack in plan_fleet(given, capacity).packs} == {
        pack.job_ids for pack in plan.packs
    }


def test_planning_needs_neither_torch_nor_ray() -> None:
    modules = ("planner", "memory", "machine", "events", "progress", "ledger", "reporter", "live")
    names = ", ".join(f"raybooth.fleet.{name}" for name in modules)
    code = f"import sys, {names}; assert not {{'torch', 'ray', 'rich'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_run_has_its_workers_for_itself() -> None:
    full = replace(JOB, method="full", num_workers=2)
    plan = plan_fleet([*jobs(2, full, "full"), *jobs(2)], cpus(4))
    packs = {pack.job_ids: pack.num_workers for pack in plan.packs}
    assert packs[("full-000",)] == packs[("full-001",)] == 2
    assert all(count == 1 for ids, count in packs.items() if ids[0].startswith("job"))
    one, two = cpus(1, 1).place(Resources(1.0), 2), cpus(3).place(Resources(2.0), 2)
    assert one == cpus(0, 0)
    assert two is None
    with pytest.raises(ClusterError, match="asks 2 workers of 1 CPU: found room for 1"):
        plan_fleet(jobs(1, full), cpus(1))
    assert sizes(plan_fleet(jobs(1, full), cpus(1), can_grow=True)) == [1]


@pytest.mark.parametrize("changes", [{"text_targets": "attention"}, {"identifier_tokens": 1}])
def test_words_that_train_differently_are_in_packs_of_their_own(changes: dict[str, Any]) -> None:
    other = jobs(2, replace(JOB, **changes), "other")
    plan = plan_fleet([*jobs(2), *other], cpus(1))
    together = [{job_id.split("-")[0] for job_id in pack.job_ids} for pack in plan.packs]
    assert all(len(names) == 1 for names in together)


def test_halves_balance_rows_and_lose_nobody() -> None:
    assert halves({"a": 2, "b": 2, "c": 2, "d": 2}) == (("a", "c"), ("b", "d"))
    assert halves({"a": 2, "b": 16, "c": 2}) == (("b",), ("a", "c"))
    assert halves({"a": 2, "b": 2}) == (("a",), ("b",))
    assert halves({"a": 2}) == halves({}) == ()
