"""Which engine answers for which model, on a real store; no base is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from raybooth.errors import BaseModelError, NotPublishedError
from raybooth.store import WEIGHTS, AdapterRecord, BaseRecord, FullRecord, Store
from raybooth_serving.names.catalog import Catalog, KnownBase
from raybooth_serving.scale.directory import find_engine
from raybooth_serving.wire.api import AdapterChoice, ImagesRequest, ParameterError
from tests.raybooth_serving.published import COMMON

ONE, TWO, OTHER = "1" * 64, "2" * 64, "3" * 64


def publish(store: Store, subject_id: str, fingerprint: str, *, is_full: bool = False) -> None:
    """A record with a file of one byte: nobody looks inside."""
    path = store.root.parent / "weights"
    path.write_bytes(b"x")
    common = {**COMMON, "subject_id": subject_id}
    base = BaseRecord(name="some", fingerprint=fingerprint)
    if is_full:
        store.publish(FullRecord(**common, base=base, parts=("unet",)), {"unet.safetensors": path})
    else:
        store.publish(AdapterRecord(**common, base=base, rank=4, targets="all"), {WEIGHTS: path})


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    store = Store(tmp_path / "models")
    for subject_id, fingerprint in (("dog-a", ONE), ("dog-b", TWO), ("dog-b", ONE), ("cat", OTHER)):
        publish(store, subject_id, fingerprint)
    publish(store, "rex", TWO, is_full=True)
    return Catalog(store, [KnownBase("tiny", ONE), KnownBase("org/small", TWO)])


def find(catalog: Catalog, model: str, *adapters: str) -> tuple[int, str, str]:
    """(place, pinned model, session)."""
    choices = [{"subject": subject} for subject in adapters]
    request = ImagesRequest.model_validate({"model": model, "prompt": "p", "adapters": choices})
    found = find_engine(catalog, request)
    assert not found.is_full
    return found.base, found.request.model, found.session


def test_a_model_is_found_at_its_base_and_pinned(catalog: Catalog) -> None:
    assert find(catalog, "tiny") == (0, "tiny", "")
    assert find(catalog, "org/small") == (1, "org/small", "")
    assert find(catalog, "dog-a") == (0, "dog-a@1", "dog-a")
    assert find(catalog, "dog-b") == (0, "dog-b@2", "dog-b")
    assert find(catalog, "dog-b@1") == (1, "dog-b@1", "dog-b")
    catalog.store.set_alias("dog-b", "production", 1)
    assert find(catalog, "dog-b@production") == (1, "dog-b@1", "dog-b")
    publish(catalog.store, "dog-a", TWO)
    assert find(catalog, "dog-a") == (1, "dog-a@2", "dog-a"), "a new version counts at once"


def test_several_subjects_are_pinned_and_share_a_session(catalog: Catalog) -> None:
    choices = [{"subject": "dog-b", "scale": 0.5}, {"subject": "dog-a"}]
    values = {"model": "tiny", "prompt": "p", "adapters": choices}
    found = find_engine(catalog, ImagesRequest.model_validate(values))
    pinned = [(choice.subject, choice.scale) for choice in found.request.adapters]
    assert pinned == [("dog-b@2", 0.5), ("dog-a@1", 1.0)]
    assert (found.base, found.session) == (0, "dog-a+dog-b")


def test_a_base_that_is_not_served_is_named(catalog: Catalog) -> None:
    with pytest.raises(BaseModelError, match=r"cat@1 was trained on another base") as error:
        find(catalog, "cat")
    assert "tiny 111111111111, org/small 222222222222" in error.value.do


def test_a_full_fine_tune_needs_engines_of_its_own(catalog: Catalog) -> None:
    request = ImagesRequest(model="rex", prompt="p")
    with pytest.raises(BaseModelError, match="raybooth extract rex@1"):
        find_engine(catalog, request)
    full = Catalog(catalog.store, catalog.bases, serves_full=True)
    found = find_engine(full, request)
    assert (found.base, found.request.model, found.is_full) == (1, "rex@1", True)
    both = request.model_copy(update={"adapters": [AdapterChoice(subject="dog-a")]})
    with pytest.raises(ParameterError, match="takes no adapters"):
        find_engine(full, both)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("dog-c", "dog-b"), ("tinny", "tiny"), ("org/smal", "org/small"), ("zzz", "models")],
)
def test_near_names_of_subjects_and_bases(catalog: Catalog, asked: str, near: str) -> None:
    with pytest.raises(NotPublishedError) as error:
        find(catalog, asked)
    assert near in error.value.do


def test_what_is_listed_can_be_found(catalog: Catalog) -> None:
    names = [card.id for card in catalog.cards()]
    assert names == ["tiny", "org/small", "dog-a", "dog-b"]
    assert catalog.count_subjects() == 2
    full = Catalog(catalog.store, catalog.bases, serves_full=True)
    everything = [card.id for card in full.cards(with_versions=True)]
    assert [name for name in everything if "@" in name] == [
        *("dog-a@1", "dog-b@1", "dog-b@2", "rex@1"),
    ]
    assert all(find_engine(full, ImagesRequest(model=m, prompt="p")) for m in everything)
