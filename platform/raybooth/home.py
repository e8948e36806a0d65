"""The one folder that holds all state: `RAYBOOTH_HOME`, by default `./.raybooth`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from raybooth.errors import InputError


def home() -> Path:
    """The state folder, absolute, made if it is not there; raises InputError if not writable."""
    folder = Path(os.environ.get("RAYBOOTH_HOME") or ".raybooth").absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = error.strerror or str(error)
        do = "make it writable, or set RAYBOOTH_HOME to a folder that is"
        raise InputError(f"the state folder {folder} cannot be written", found, do) from error
    return folder


def store_folder() -> Path:
    """Published models."""
    return home() / "models"


def priors_folder() -> Path:
    """The prior cache."""
    return home() / "priors"
