"""What each claimant has had of the engine; who has had least goes next: start-time fair queueing.

Goyal, Vin and Cheng (SIGCOMM 1996), with a counter a claimant as in VTC (Sheng et al., OSDI 2024).
While two claimants both wait, what they have had differs by at most one claim of each. One that
comes back after idling starts at `level`, so that idling earns nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shares:
    """A counter for each claimant that waits, or has had more than `level`."""

    had: Mapping[Hashable, float] = field(default_factory=dict)
    level: float = 0.0
    """The highest count at which a claim was ever granted: the virtual time."""

    def of(self, claimant: Hashable) -> float:
        """What `claimant` has had; one that is not known has had `level`."""
        return self.had.get(claimant, self.level)

    def among(self, claimants: Iterable[Hashable]) -> Shares:
        """Those who wait now; of the others, who has had more than `level` is remembered."""
        waiting = {claimant: self.of(claimant) for claimant in claimants}
        ahead = {claimant: had for claimant, had in self.had.items() if had > self.level}
        return Shares({**ahead, **waiting}, self.level)

    def grant(self, claimant: Hashable, cost: float) -> Shares:
        """A claim of `cost` begins."""
        start = self.of(claimant)
        return Shares({**self.had, claimant: start + cost}, max(self.level, start))

    def refund(self, claimant: Hashable, cost: float) -> Shares:
        """A claim ends with `cost` of it not used."""
        return Shares({**self.had, claimant: self.of(claimant) - cost}, self.level)
