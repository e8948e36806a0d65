"""Which subjects an image shows, and how strongly: `model` and `adapters` of a request."""

from __future__ import annotations

from raybooth.store import AdapterRecord
from raybooth_serving.engine.orders import Part
from raybooth_serving.names.catalog import Catalog
from raybooth_serving.wire.api import ImagesRequest, ParameterError


def resolve_parts(catalog: Catalog, request: ImagesRequest) -> tuple[Part, ...]:
    """The subjects of every image of `request`; none for the plain base.

    Raises ParameterError where `model` and `adapters` contradict each other, and whatever
    `Catalog.resolve` raises.
    """
    named = catalog.resolve(request.model)
    if not request.adapters:
        return () if named is None else (Part(named),)
    parts = tuple(Part(_adapter(catalog, each.subject), each.scale) for each in request.adapters)
    references = [part.record.reference for part in parts]
    if named is not None and named.reference != references[0]:
        first = request.adapters[0].subject
        found = f"model {request.model}, and {first} first in adapters"
        do = f"send model {catalog.base_name} or {first}"
        raise ParameterError("model", "model and adapters contradict each other", found, do)
    for reference in references:
        if references.count(reference) > 1:
            do = "give it once, with the sum of its scales"
            raise ParameterError("adapters", "adapters has a subject twice", reference, do)
    return parts


def _adapter(catalog: Catalog, name: str) -> AdapterRecord:
    record = catalog.resolve(name)
    if record is None:
        do = "leave it out of adapters, and send it as model"
        raise ParameterError("adapters", "the base is not an adapter", name, do)
    return record
