"""What `record.json` says of a published model, and the files that lie beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from raybooth.config import Strict
from raybooth.errors import StoreError
from raybooth.validation_record import ValidationRecord

SCHEMA_VERSION = 1
WEIGHTS = "pytorch_lora_weights.safetensors"
LEARNED = "learned_embeds.safetensors"
"""Token embeddings that a subject learned, where it did; diffusers' own name."""

SAMPLES = "samples.png"
RECORD = "record.json"


class FileRecord(Strict):
    """One file of a published version."""

    sha256: str
    size_bytes: int


class BaseRecord(Strict):
    """The base that an adapter was trained on."""

    name: str
    fingerprint: str
    revision: str | None = None


class PhotoRecord(Strict):
    """One instance image, by content."""

    name: str
    sha256: str


class PriorRecord(Strict):
    """The prior images that took part."""

    key: str
    num_images: int
    sha256: str
    """Of the image digests, in order."""


KeyForm = Literal["diffusers", "peft", "kohya"]
"""How an adapter's file calls its layers."""


class ImportRecord(Strict):
    """The file of an adapter that was trained elsewhere."""

    file: str
    sha256: str
    key_form: KeyForm


class OutputLoss(Strict):
    """How far the denoiser's output is from that of the model it was extracted from."""

    timestep: int
    of_output: float
    """|| extract - full || / || full ||"""

    of_move: float
    """|| extract - full || / || full - base ||: 0 is all of what was learned, 1 none of it."""


class ExtractRecord(Strict):
    """The full fine-tune that an adapter was extracted from, and what was lost on the way.

    Errors are relative Frobenius norms, || W_full - W_base - B A || / || W_full - W_base ||.
    """

    source: str
    """`subject@version`."""

    files: dict[str, str]
    """sha256 of its weights, by file."""

    sites: dict[str, float]
    """Error of each layer that the adapter moves."""

    sites_error: float
    """Over all these layers."""

    total_error: float
    """Over every parameter of the trained parts."""

    outside_energy: float
    """Share of the squared change that lies outside these layers (norms, biases, others)."""

    outputs: tuple[OutputLoss, ...]
    """At fixed noise, over the instance and the class prompt."""

    fidelity: dict[str, dict[str, float | None]] | None
    """Scores of `full` and `extract`, drawn with the same seeds; None where nobody judged."""

    encoders: dict[str, str] = Field(default_factory=dict)
    """sha256 of those who judged."""


class ModelRecord(Strict):
    """What `record.json` says of every published model."""

    schema_version: Literal[1] = 1
    subject_id: str
    version: int = 0
    """Given by the store at publication; 0 for a preview."""

    preview: str | None = None
    """Given by the store to the checkpoint of a job that still runs: its label there."""

    created: str = ""
    """UTC, ISO 8601; given by the store at publication."""

    job_id: str
    class_noun: str
    identifier: str
    instance_prompt: str
    class_prompt: str
    base: BaseRecord
    num_parameters: int
    train: dict[str, Any]
    """The train config as resolved; empty where a model was imported."""

    photos: tuple[PhotoRecord, ...]
    prior: PriorRecord | None
    loss_curve: tuple[tuple[int, float], ...]
    """(train step, loss), thinned."""

    num_train_steps: int | None
    """None where a model was imported: nobody here counted them."""

    validation: ValidationRecord | None = None
    """What was measured between train steps; None where nothing was."""

    seconds: dict[str, float]
    versions: dict[str, str]
    files: dict[str, FileRecord] = Field(default_factory=dict)
    """Given by the store at publication."""

    @property
    def reference(self) -> str:
        """`subject@version`, or `subject@preview-...`: always this very model."""
        return f"{self.subject_id}@{self.preview or self.version}"

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it was trained, and must be sampled, on the base's schedule rescaled so."""
        return bool(self.train.get("objective", {}).get("zero_terminal_snr", False))


class AdapterRecord(ModelRecord):
    """`record.json`: everything needed to know, serve and reproduce a published adapter."""

    kind: Literal["adapter"] = "adapter"
    rank: int
    targets: str | tuple[str, ...]
    text_targets: str | tuple[str, ...] | None = None
    """Sites in the text encoders; None where it leaves them as they are."""

    identifier_tokens: int = 0
    """Learned tokens that `identifier` names, in LEARNED; 0 where it is a word of the base."""

    imported: ImportRecord | None = None
    """Where the adapter came from; None when RayBooth trained it."""

    extracted: ExtractRecord | None = None
    """The full fine-tune that it came from; None where there is none."""


class FullRecord(ModelRecord):
    """`record.json` of a full fine-tune: every weight of some parts of the base, in float32."""

    kind: Literal["full"] = "full"
    parts: tuple[str, ...]
    """Folders of the base whose weights were trained; each is a file `<part>.safetensors`."""


Record = AdapterRecord | FullRecord
AnyRecord = TypeVar("AnyRecord", bound=ModelRecord)


_RECORDS: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def read_record(path: Path) -> Record:
    """The record at `path`.

    Raises StoreError when it is damaged or of a schema that this version does not know.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        schema = values.get("schema_version")
        if schema != SCHEMA_VERSION:
            raise StoreError(
                f"{path} has another schema",
                f"schema_version {schema!r}, this RayBooth knows {SCHEMA_VERSION}",
                "use the RayBooth that wrote it, or publish the subject again",
            )
        return _RECORDS.validate_python(values)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        found = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} is not readable", found, "publish the subject again") from error


def describe_file(path: Path) -> FileRecord:
    """Checksum and size of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
