"""What can be asked for: bases by their names, and every published subject, read anew each time."""

from __future__ import annotations

import difflib
import errno
import logging
import time
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime

from raybooth.errors import BaseModelError, NotPublishedError, StoreError
from raybooth.previews import PREVIEW, has_preview
from raybooth.store import AdapterRecord, FullRecord, Record, Store, is_seen
from raybooth_serving.errors import StoreAwayError
from raybooth_serving.metrics import EngineMetrics
from raybooth_serving.names.recall import Recall, is_away, unreadable
from raybooth_serving.wire.api import ModelCard

SETTLED_NS = 2 * 10**9
"""A folder that changed more recently may change again under the same stamp: it is read anew."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base that is served: what requests call it, and which it is."""

    name: str
    fingerprint: str


class Catalog:
    """Names to records; a subject published a moment ago is found, `latest` is never cached.

    While the store is away, names mean what it last said. `on_deleted` is told the id of each
    subject that was asked for before and then has lost what was asked for.
    """

    def __init__(
        self,
        store: Store,
        bases: Sequence[KnownBase],
        on_deleted: Callable[[str], None] | None = None,
        *,
        serves_full: bool = False,
        metrics: EngineMetrics | None = None,
    ) -> None:
        self.store = store
        self.bases = tuple(bases)
        self.on_deleted = on_deleted
        self.serves_full = serves_full
        self.recall = Recall(EngineMetrics() if metrics is None else metrics)
        self._silence: OSError | None = None
        self._listings: dict[tuple[str, bool], _Listing] = {}

    def seen_by(self, subjects: Sequence[str]) -> Catalog:
        """This catalog to one who may see the globs `subjects`; others are not there."""
        view = copy(self)
        view.store = Store(self.store.root, subjects)
        return view

    def unheard(self) -> Catalog:
        """This catalog while the store gives no answer: it is not asked."""
        view = copy(self)
        view._silence = TimeoutError(errno.ETIMEDOUT, "no answer in time")
        return view

    def resolve(self, model: str) -> AdapterRecord | None:
        """As `find`, in a catalog that knows adapters only."""
        record = self.find(model)
        assert not isinstance(record, FullRecord)
        return record

    def find(self, model: str) -> Record | None:
        """The record that `model` means, or None for a plain base.

        Raises NotPublishedError listing near names, BaseModelError for an adapter of another
        base and for a full fine-tune where none are served, StoreError for a damaged record,
        StoreAwayError where the store is away and has not said what `model` means.
        """
        if any(model == base.name for base in self.bases):
            return None
        record = self._fetch(model)
        self._check(record)
        self.recall.note(model, record)
        return record

    def place(self, model: str, record: Record | None) -> int:
        """Which of the bases answers for what `find` found."""
        if record is None:
            return [base.name for base in self.bases].index(model)
        return [base.fingerprint for base in self.bases].index(record.base.fingerprint)

    def cards(self, *, with_versions: bool = False) -> list[ModelCard]:
        """The bases, then every model of theirs (if asked, its versions and previews too).

        Raises StoreAwayError where the store is away.
        """
        plain = [ModelCard(id=base.name, created=0, owned_by="base") for base in self.bases]
        if self._silence is not None:
            raise self._away("the list of models", self._silence)
        if is_away(self.store.root) and not self.recall.has_read:
            return plain  # nothing was ever published
        try:
            stamps = self.store.stamps()
            listings = [self._listing(id_, stamp, with_versions) for id_, stamp in stamps.items()]
        except OSError as error:
            raise self._away("the list of models", error) from error
        self.recall.store_answers()
        self._notice_all(stamps.keys())
        adapters = [card for listing in listings for card in listing.adapters]
        return [*plain, *adapters, *(card for listing in listings for card in listing.previews)]

    @property
    def base_name(self) -> str:
        """What requests call the first base."""
        return self.bases[0].name

    def count_subjects(self) -> int:
        """Subjects that can be asked for."""
        return len(self.cards()) - len(self.bases)

    def _is_served(self, record: Record) -> bool:
        is_known = record.base.fingerprint in [base.fingerprint for base in self.bases]
        return is_known and (self.serves_full or isinstance(record, AdapterRecord))

    def _check(self, record: Record) -> None:
        """Raises BaseModelError for what cannot be served here."""
        if record.base.fingerprint not in [base.fingerprint for base in self.bases]:
            serving = ", ".join(f"{base.name} {base.fingerprint[:12]}" for base in self.bases)
            raise BaseModelError(
                f"{record.reference} was trained on another base",
                f"{record.base.name} {record.base.fingerprint[:12]}",
                f"this endpoint serves {serving}; ask an endpoint of its own base",
            )
        if isinstance(record, FullRecord) and not self.serves_full:
            raise BaseModelError(
                f"{record.reference} is a full fine-tune, not an adapter",
                f"weights of its own for {', '.join(record.parts)}",
                f"make an adapter of it with `raybooth extract {record.reference}`, "
                "or set `full` in the endpoint's config",
            )

    def _fetch(self, model: str) -> Record:
        """What the store says, or said last where it is away."""
        try:
            record = self._read(model)
        except NotPublishedError as error:
            if not is_away(self.store.root) or not self.recall.has_read:
                self._notice(model)
                raise self._with_base(model, error) from error
            unread: Exception = error
        except (OSError, StoreError) as error:
            if unreadable(error) is None and not is_away(self.store.root):
                raise
            unread = error
        else:
            self.recall.store_answers()
            return record
        away, last = self._away(model, unread), self._last(model)
        if last is None:
            raise away from unread
        return last

    def _read(self, model: str) -> Record:
        """From the store; once more where a version goes between its name and its record."""
        if self._silence is not None:
            raise self._silence
        try:
            return self.store.fetch(model)
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        return self.store.fetch(model)

    def _last(self, model: str) -> Record | None:
        """What `model` meant when the store last said so, to those who may see it."""
        is_ours = is_seen(self.store.seen, model.partition("@")[0])
        return self.recall.last(model) if is_ours else None

    def _notice(self, model: str) -> None:
        """A store that can be read does not have `model`: if it ever had, it is deleted."""
        last = self._last(model)
        if last is not None:
            self._forget(last.subject_id)

    def _notice_all(self, there: Collection[str]) -> None:
        """Of the subjects that may be seen, a store that can be read has these alone."""
        listed = {subject_id for subject_id, _ in list(self._listings)}
        for subject_id in (listed | self.recall.subjects()) - set(there):
            if is_seen(self.store.seen, subject_id):
                self._forget(subject_id)

    def _forget(self, subject_id: str) -> None:
        self.recall.forget(subject_id)
        for with_versions in (False, True):
            self._listings.pop((subject_id, with_versions), None)
        if self.on_deleted is not None:
            self.on_deleted(subject_id)

    def _away(self, what: str, error: Exception) -> StoreAwayError:
        self.recall.store_is_away(error)
        cause = unreadable(error)
        found = "no folder" if cause is None or cause.strerror is None else cause.strerror
        do = "try again when the store is back"
        return StoreAwayError(f"{what} is not in memory, and the store is away", found, do)

    def _listing(self, subject_id: str, stamp: tuple[int, int], with_versions: bool) -> _Listing:
        """The cards of one subject, read again when its folder has changed."""
        key = subject_id, with_versions
        found = self._listings.get(key)
        if found is not None and found.stamp == stamp:
            return found
        before_ns = time.time_ns()
        try:
            versions = self.store.versions(subject_id)
        except NotPublishedError:
            versions = []
        names, previews = [subject_id] if versions else [], []
        if with_versions:
            names += [f"{subject_id}@{version}" for version in versions]
            if has_preview(self.store.root / subject_id):
                previews = [f"{subject_id}@{PREVIEW}"]
        listing = _Listing(stamp, self._cards(names), self._cards(previews))
        if before_ns - stamp[1] > SETTLED_NS:
            self._listings[key] = listing
        return listing

    def _cards(self, names: Sequence[str]) -> tuple[ModelCard, ...]:
        """Of the models among `names` that can be served here."""
        cards = []
        for name in names:
            try:
                record = self.store.fetch(name)
            except (NotPublishedError, StoreError) as error:
                logger.warning("%s is left out of the list of models: %s", name, error)
                continue
            if self._is_served(record):
                created = int(datetime.fromisoformat(record.created).timestamp())
                cards.append(ModelCard(id=name, created=created, owned_by="raybooth"))
        return tuple(cards)

    def _with_base(self, model: str, error: NotPublishedError) -> NotPublishedError:
        near = difflib.get_close_matches(model, [base.name for base in self.bases], cutoff=0.5)
        if not near:
            return error
        said = [error.do.removesuffix("?")] if error.do.startswith("did you mean") else []
        names = ", ".join([*said, *near])
        do = f"{names}?" if said else f"did you mean {names}?"
        return NotPublishedError(error.what, error.found, do)


@dataclass(frozen=True)
class _Listing:
    """The cards of one subject while its folder has this stamp."""

    stamp: tuple[int, int]
    adapters: tuple[ModelCard, ...]
    previews: tuple[ModelCard, ...]
