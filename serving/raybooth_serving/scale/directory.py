"""Which engine answers a request: the catalog of all bases in, a place and pinned versions out.

The gateway looks here and knows nothing of weights. Versions are pinned once for each request, so
that whoever draws it, even a second time elsewhere, draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from raybooth.store import FullRecord
from raybooth_serving.names.catalog import Catalog
from raybooth_serving.wire.api import ImagesRequest, ParameterError


@dataclass(frozen=True, slots=True)
class Found:
    """Who answers a request, and what they are asked."""

    base: int
    """Place of its base in the catalog."""

    request: ImagesRequest
    """Its names pinned: `subject@version`, or the base's name."""

    session: str
    """Requests of one subject have the same, and so the same replica; empty: any replica."""

    is_full: bool
    """Whether the model has weights of its own, and so an engine of its own."""


def find_engine(catalog: Catalog, request: ImagesRequest) -> Found:
    """Who answers `request`; raises as Catalog.find, or for adapters on a full model."""
    record = catalog.find(request.model)
    pinned = {"model": request.model if record is None else record.reference}
    is_full = isinstance(record, FullRecord)
    if is_full and request.adapters:
        do = "leave adapters out, or name their base as model"
        raise ParameterError("adapters", "a full fine-tune takes no adapters", request.model, do)
    ids = [] if record is None else [record.subject_id]
    adapters = []
    for choice in request.adapters:
        part = catalog.find(choice.subject)
        if part is not None:
            ids.append(part.subject_id)
            choice = choice.model_copy(update={"subject": part.reference})
        adapters.append(choice)
    return Found(
        base=catalog.place(request.model, record),
        request=request.model_copy(update={**pinned, "adapters": adapters}),
        session="+".join(sorted(set(ids))),
        is_full=is_full,
    )
