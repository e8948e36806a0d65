"""Where a base is: the package, a folder, a file of configs/base, the Hub (no torch)."""

from __future__ import annotations

import re
from pathlib import Path

from raybooth.config import BaseConfig, configs_folder, load_config
from raybooth.errors import BaseModelError
from raybooth.model.files import WEIGHTS

_SHORT_NAME = re.compile(r"[\w-]+")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILES = ("*.json", "tokenizer*/*.txt", *(f"{p}/{s}*.safetensors" for p, s in WEIGHTS.items()))
_HUB_VARIANTS = ("*.fp16.*", "*.non_ema.*", "safety_checker/*", "feature_extractor/*")


def resolve_base(source: str, revision: str | None = None) -> Path:
    """The folder that `source` means: `pocket`, a folder, a file of configs/base, or a Hub id.

    Raises BaseModelError when there is no such folder, the revision is not a 40-digit commit, or
    the Hub cannot give it. Never fetches pickles.
    """
    if source == "pocket":
        from raybooth import pocket

        folder = pocket.path()
    else:
        folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            do = "remove it; a folder is known by its fingerprint"
            raise BaseModelError("a revision has no effect on a folder", revision, do)
        return folder.resolve()
    named = configs_folder() / "base" / f"{source}.yaml"
    if _SHORT_NAME.fullmatch(source) and source != "pocket" and named.is_file():
        config = load_config(BaseConfig, named)
        if revision is not None:
            do = f"remove it; {named.name} pins one"
            raise BaseModelError(f"a revision has no effect on {source!r}", revision, do)
        return resolve_base(config.base, config.revision)
    if source == "pocket" or not _HUB_ID.fullmatch(source):
        do = "give `pocket`, a name of configs/base, a folder in diffusers' layout, or a Hub id"
        raise BaseModelError(f"no base is called {source!r}", f"no folder {folder}", do)
    if revision is None or not _COMMIT.fullmatch(revision):
        raise BaseModelError(
            f"the Hub id {source} must be pinned to a commit",
            f"revision {revision!r}",
            "give the 40 hexadecimal digits of a commit as `revision`",
        )
    return _fetch(source, revision)


def _fetch(source: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_VARIANTS),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        found = " ".join(str(error).split())[:300]
        do = "check the id, the commit, your token and the network, or give a local folder"
        raise BaseModelError(f"the Hub did not give {source}@{revision}", found, do) from error
