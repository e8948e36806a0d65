from __future__ import annotations

import random

from raybooth_serving.engine.shares import Shares


def test_who_waits_has_had_as_much_as_the_others_but_for_one_claim_of_each() -> None:
    """The bound of start-time fair queueing, for claims of any cost in any mix."""
    chance = random.Random(0)
    largest = {"a": 1.0, "b": 7.0, "c": 40.0}
    shares, served = Shares(), dict.fromkeys(largest, 0.0)
    for _ in range(3000):
        shares = shares.among(largest)
        claimant = min(largest, key=shares.of)
        cost = chance.uniform(0.1, 1) * largest[claimant]
        shares = shares.grant(claimant, cost)
        served[claimant] += cost
        for one in largest:
            for other in largest:
                assert abs(served[one] - served[other]) <= largest[one] + largest[other]


def test_idling_earns_nothing() -> None:
    shares = Shares()
    for _ in range(10):
        shares = shares.among(["busy"]).grant("busy", 5.0)
    shares = shares.among(["busy", "idle"])
    assert shares.of("idle") == shares.level == 45.0
    assert shares.of("busy") == 50.0


def test_what_one_had_beyond_its_share_is_remembered_while_it_idles() -> None:
    shares = Shares().among(["a", "b"]).grant("a", 100.0).grant("b", 1.0)
    shares = shares.among(["b"])
    assert shares.among(["a", "b"]).of("a") == 100.0
    assert shares.of("b") == 1.0


def test_who_is_forgotten_takes_no_room() -> None:
    shares = Shares()
    for tenant in range(1000):
        shares = shares.among([f"t{tenant}"]).grant(f"t{tenant}", 1.0)
    assert len(shares.among([]).had) <= 1000
    shares = shares.among(["z"]).grant("z", 9.0).grant("z", 1.0)
    assert set(shares.among([]).had) == {"z"}


def test_what_was_not_used_comes_back() -> None:
    shares = Shares().among(["a"]).grant("a", 10.0).refund("a", 4.0)
    assert shares.of("a") == 6.0
    assert shares.level == 0.0
