"""The DreamBench protocol (Ruiz et al. 2023, section 4): 30 subjects x 25 prompts x 4 images.

The folder is that of the public dataset (google/dreambooth): a folder of photos for each subject,
and prompts_and_classes.txt with a line `subject_name,class` for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raybooth.errors import InputError

CLASSES_FILE = "prompts_and_classes.txt"
LIVE = ("dog", "cat")
"""Class nouns of living subjects, which get prompts of their own."""

_PLACES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
)
_OBJECT_ENDINGS = (
    *_PLACES,
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
_LIVE_ENDINGS = (
    *_PLACES,
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
)
_SAID = "{identifier} {class_noun}"
_LOOKS = tuple(f"a {look} {_SAID}" for look in ("red", "purple", "shiny", "wet", "cube shaped"))
OBJECT_PROMPTS = (*(f"a {_SAID} {ending}" for ending in _OBJECT_ENDINGS), *_LOOKS)
LIVE_PROMPTS = (*(f"a {_SAID} {ending}" for ending in _LIVE_ENDINGS), *_LOOKS)


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of the paper's table 1; DINO is ViT-S/16."""

    method: str
    dino: float
    clip_i: float
    clip_t: float | None


PUBLISHED = (
    PublishedRow("Real images", 0.774, 0.885, None),
    PublishedRow("DreamBooth (Imagen)", 0.696, 0.812, 0.306),
    PublishedRow("DreamBooth (Stable Diffusion)", 0.668, 0.803, 0.305),
    PublishedRow("Textual Inversion (Stable Diffusion)", 0.569, 0.780, 0.255),
)


@dataclass(frozen=True, slots=True)
class BenchSubject:
    """One folder of the dataset."""

    subject_id: str
    class_noun: str
    folder: Path

    @property
    def prompts(self) -> tuple[str, ...]:
        """The paper's 25 prompts for this kind of subject."""
        return LIVE_PROMPTS if self.class_noun in LIVE else OBJECT_PROMPTS


def read_subjects(folder: Path, names: Sequence[str] = ()) -> tuple[BenchSubject, ...]:
    """The dataset's subjects, or those of `names`; raises InputError for what is not there."""
    classes = _classes(folder)
    found = names or sorted(path.name for path in folder.iterdir() if path.is_dir())
    subjects = []
    for name in found:
        if not (folder / name).is_dir():
            raise InputError(f"DreamBench has no subject {name!r}", str(folder), "check its name")
        if name not in classes:
            do = f"add a line `{name},<class noun>`"
            raise InputError(f"{CLASSES_FILE} names no class of {name!r}", str(folder), do)
        subject_id = name.lower().replace("_", "-")
        subjects.append(BenchSubject(subject_id, classes[name], (folder / name).absolute()))
    if not subjects:
        do = "give a folder with one folder of photos a subject"
        raise InputError("there is no subject to evaluate", str(folder), do)
    return tuple(subjects)


def fleet_text(
    subjects: Sequence[BenchSubject], base: str, revision: str | None, train: str
) -> str:
    """A fleet file (JSON is YAML) that trains them all."""
    values: dict[str, Any] = {"base": base, "train": train}
    if revision is not None:
        values["revision"] = revision
    values["subjects"] = [
        {"id": one.subject_id, "class_noun": one.class_noun, "images": str(one.folder)}
        for one in subjects
    ]
    return json.dumps(values, indent=2) + "\n"


def _classes(folder: Path) -> Mapping[str, str]:
    path = folder / CLASSES_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        do = "give the folder of the DreamBench dataset"
        raise InputError(f"{path} cannot be read", str(error), do) from error
    pairs = [line.strip().split(",") for line in lines if line.count(",") == 1]
    return {name: noun.strip() for name, noun in pairs if noun.strip() and " " not in name}
