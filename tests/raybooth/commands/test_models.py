"""`raybooth models` promotes, rolls back, refuses, and says what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.raybooth.test_store import a_record

from raybooth.cli import main
from raybooth.home import store_folder
from raybooth.store import WEIGHTS, Store


@pytest.fixture
def store(raybooth_home: Path, tmp_path: Path) -> Store:
    """Two versions of `rex`, and a preview of `tom` that was never published."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    store = Store(store_folder())
    store.publish(a_record(), {WEIGHTS: weights})
    store.publish(a_record(), {WEIGHTS: weights})
    store.publish_preview(a_record("tom", "tom-1"), {WEIGHTS: weights})
    return store


def test_promote_rollback_and_history(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "promote", "rex@1"]) == 0
    assert main(["models", "promote", "rex"]) == 0
    assert main(["models", "rollback", "rex"]) == 0
    assert main(["models", "promote", "rex@1", "latest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "rex@production is rex@1 (new)",
        "rex@production is rex@2 (was rex@1)",
        "rex@production is rex@1 (was rex@2)",
        "rex@latest is rex@1 (was rex@2)",
    ]
    assert main(["models", "history", "rex"]) == 0
    moves = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert moves == [
        "latest  set to version 1",
        "production  set to version 1",
        "production  set to version 2",
        "production  rollback to version 1",
    ]
    assert main(["models", "delete", "rex@1"]) == 2
    assert "an alias points at rex@1" in capsys.readouterr().err
    assert main(["models", "delete", "rex@1", "--with-aliases"]) == 0
    assert store.aliases("rex") == {"latest": 2}


def test_a_preview_is_listed_and_marked(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    (preview,) = (row for row in rows.values() if row["is_preview"])
    assert preview["id"].startswith("tom@preview-2-")
    assert preview["aliases"] == ["preview"]
    assert set(rows) == {"rex@1", "rex@2", preview["id"]}
    assert main(["models"]) == 0
    assert "tom@preview " in capsys.readouterr().out
    assert main(["models", "verify", "tom@preview"]) == 0
    assert main(["models", "show", "tom"]) == 2
    assert "tom@preview is there" in capsys.readouterr().err
    assert main(["models", "delete", "tom@preview"]) == 0
    assert main(["models", "show", "tom@preview"]) == 2
