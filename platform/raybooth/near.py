"""Names that look like a mistyped one, quickly also among thousands."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable

NUM_COMPARED = 40


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """At most ten of `known`, nearest first, as `difflib.get_close_matches` finds them.

    Of all, only letters are counted; the letters' order is compared for those that share most.
    """
    matcher = difflib.SequenceMatcher(b=name)

    def common_letters(other: str) -> float:
        matcher.set_seq1(other)
        return matcher.quick_ratio()

    likely = heapq.nlargest(NUM_COMPARED, known, key=common_letters)
    return difflib.get_close_matches(name, likely, n=10, cutoff=0.5)
