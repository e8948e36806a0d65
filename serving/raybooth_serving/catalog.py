"""What can be asked for: the base by its name, and every published subject, read anew each time."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from datetime import datetime

from raybooth.errors import BaseModelError, NotPublishedError, StoreError
from raybooth.previews import PREVIEW
from raybooth.store import AdapterRecord, Store
from raybooth_serving.api import ModelCard

logger = logging.getLogger(__name__)


class Catalog:
    """Names to records; a subject published a moment ago is found, `latest` is never cached."""

    def __init__(self, store: Store, base_name: str, base_fingerprint: str) -> None:
        self.store = store
        self.base_name = base_name
        self.base_fingerprint = base_fingerprint

    def seen_by(self, subjects: Sequence[str]) -> Catalog:
        """This catalog to one who may see the globs `subjects`; others are not there."""
        store = Store(self.store.root, subjects)
        return Catalog(store, self.base_name, self.base_fingerprint)

    def resolve(self, model: str) -> AdapterRecord | None:
        """The record that `model` means, or None for the plain base.

        Raises NotPublishedError listing near names, BaseModelError for an adapter of another
        base and for a full fine-tune, StoreError for a damaged record.
        """
        if model == self.base_name:
            return None
        try:
            record = self.store.fetch(model)
        except NotPublishedError as error:
            raise self._with_base(model, error) from error
        if record.base.fingerprint != self.base_fingerprint:
            found = f"{record.base.name} {record.base.fingerprint[:12]}"
            serving = f"{self.base_name} {self.base_fingerprint[:12]}"
            raise BaseModelError(
                f"{record.reference} was trained on another base",
                found,
                f"this endpoint serves {serving}; ask an endpoint of its own base",
            )
        if not isinstance(record, AdapterRecord):
            raise BaseModelError(
                f"{record.reference} is a full fine-tune, not an adapter",
                f"weights of its own for {', '.join(record.parts)}",
                "sample it with `raybooth generate`; an endpoint serves adapters of one base",
            )
        return record

    def cards(self, *, with_versions: bool = False) -> list[ModelCard]:
        """The base, then every adapter of this base (if asked, its versions and previews too)."""
        cards = [ModelCard(id=self.base_name, created=0, owned_by="base")]
        for subject_id in self.store.subjects():
            record = self._readable(subject_id)
            if record is not None:
                cards.append(_card(subject_id, record))
            if with_versions:
                for version in self.store.versions(subject_id):
                    record = self._readable(f"{subject_id}@{version}")
                    if record is not None:
                        cards.append(_card(record.reference, record))
        for subject_id in self.store.previewed() if with_versions else ():
            record = self._readable(f"{subject_id}@{PREVIEW}")
            if record is not None:
                cards.append(_card(f"{subject_id}@{PREVIEW}", record))
        return cards

    def count_subjects(self) -> int:
        """Subjects that this base can serve."""
        return len(self.cards()) - 1

    def _readable(self, reference: str) -> AdapterRecord | None:
        try:
            record = self.store.fetch(reference)
        except (NotPublishedError, StoreError) as error:
            logger.warning("%s is left out of the list of models: %s", reference, error)
            return None
        if not isinstance(record, AdapterRecord):
            return None
        return record if record.base.fingerprint == self.base_fingerprint else None

    def _with_base(self, model: str, error: NotPublishedError) -> NotPublishedError:
        if difflib.SequenceMatcher(None, model, self.base_name).ratio() < 0.5:
            return error
        do = error.do.removesuffix("?")
        known = f"{do}, {self.base_name}?" if error.do.startswith("did you mean") else error.do
        if known == error.do:
            known = f"did you mean {self.base_name}?"
        return NotPublishedError(error.what, error.found, known)


def _card(name: str, record: AdapterRecord) -> ModelCard:
    created = int(datetime.fromisoformat(record.created).timestamp())
    return ModelCard(id=name, created=created, owned_by="raybooth")
