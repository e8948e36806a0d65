"""schemathesis over the OpenAPI document, against a real service: no 5xx, nothing undocumented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from raybooth.config import EngineConfig, LimitsConfig, SamplingDefaults, ServeConfig, ServedBase
from raybooth.model.base import Base
from raybooth.store import Store
from raybooth_serving.service import Service
from raybooth_serving.wire.routes import make_app
from tests.raybooth_serving.listening import listening
from tests.raybooth_serving.published import publish

SERVED = ServedBase(
    engine=EngineConfig(num_slots=1, max_rank=4, row_buckets=(1, 2)),
    defaults=SamplingDefaults(num_inference_steps=1),
)
CONFIG = ServeConfig(
    bases=(SERVED,),
    limits=LimitsConfig(max_images=1, max_inference_steps=2, max_prompt_characters=100),
)
SETTINGS = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
EXCLUDED = [positive_data_acceptance]
"""A size that the base cannot make, a prompt of too many tokens: 400, and no schema can say so."""


@pytest.fixture(scope="module")
def api(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = Store(tmp_path_factory.mktemp("home") / "models")
    publish(store, base, "dog-a", 0)
    service = Service(base, store, CONFIG, SERVED)
    with listening(make_app(service, CONFIG.limits), service) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_unexpected(api: Any, mode: GenerationMode) -> None:
    """What fits the document and what does not: the statuses, headers and bodies that it names."""
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) == 5
    strategies = [operation.as_strategy(generation_mode=mode) for operation in operations]

    statuses: set[int] = set()

    @given(case=one_of(strategies))
    @SETTINGS
    def call(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "dog-a"  # else all would end at a name that nobody has
            case.headers["x-request-timeout-seconds"] = "60"  # 1e-300 would rightly be a 504
        statuses.add(case.call_and_validate(excluded_checks=EXCLUDED).status_code)

    call()
    assert {200, 400} <= statuses
    assert max(statuses) < 500
