"""How a subject is trained; the files of configs/train."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raybooth.config.adapter import AdapterConfig
from raybooth.config.full import FullConfig
from raybooth.config.objective import ObjectiveConfig, PriorConfig
from raybooth.config.optimizer import OptimizerConfig
from raybooth.config.photos import PhotosConfig
from raybooth.config.validation import ValidationConfig
from raybooth.config.words import Precision, Solver, check_template
from raybooth.reading import Strict


class CheckpointConfig(Strict):
    """When a slot's whole training state is written."""

    every_steps: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    preview: bool | None = None
    """Publish each checkpoint's adapter as `subject@preview` until the job ends. None: yes for
    adapters (a third of the checkpoint's bytes once more, written beside training); a full
    fine-tune has no previews."""


class SamplesConfig(Strict):
    """The pictures published beside the weights."""

    prompts: tuple[str, ...] = (
        "a photo of {identifier} {class_noun}",
        "a photo of {identifier} {class_noun} on the beach",
        "a photo of {identifier} {class_noun} in the snow",
        "a photo of {identifier} {class_noun} in the jungle",
    )
    solver: Solver = "dpmpp2m"
    num_inference_steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1, le=50)


class ResourcesConfig(Strict):
    """What one pack's worker asks of the Ray cluster."""

    num_cpus: float = Field(1, gt=0)
    num_gpus: float | None = Field(None, ge=0)
    """None: one GPU where the cluster has any, otherwise none."""


class PackConfig(Strict):
    """How subjects are trained together."""

    max_subjects: int = Field(8, ge=1, le=256)
    """Most slots in one pack."""

    max_failures: int = Field(2, ge=0)
    """Times that a pack's worker may die and resume before its subjects are failed."""


class TrainConfig(Strict):
    """How a subject is trained; the files of configs/train."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains an adapter, `full` every weight of the denoiser (see `full`)."""

    resolution: int = Field(512, ge=8, le=4096, multiple_of=8)
    """Pixels of a side; photos are resized by their shorter side, then cropped."""

    crop: Literal["center", "random"] = "center"
    crops_per_image: int = Field(1, ge=1, le=64)
    """Seeded crops cached of each photo; more than one needs `crop: random`."""

    photos: PhotosConfig = PhotosConfig()
    min_images: int = Field(3, ge=1)
    num_train_steps: int = Field(800, ge=1)
    batch_size: int = Field(1, ge=1, le=64)
    """Instance rows of a slot in a train step; as many prior rows join them."""

    precision: Precision = "fp32"
    """Autocast of the denoiser; masters and optimiser stay fp32."""

    gradient_checkpointing: bool = False
    """Keep each block's input only and run the block again in backward: less memory, a third
    more compute, the same bits."""

    seed: int = Field(0, ge=0, lt=2**63)
    instance_prompt: str = "a photo of {identifier} {class_noun}"
    class_prompt: str = "a photo of a {class_noun}"
    adapter: AdapterConfig = AdapterConfig()
    full: FullConfig = FullConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    prior: PriorConfig = PriorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    pack: PackConfig = PackConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _fits_its_method(self) -> Self:
        if self.method == "lora":
            if self.full != FullConfig():
                raise ValueError("full has no effect with method: lora; remove it")
            return self
        if self.adapter != AdapterConfig():
            raise ValueError("adapter has no effect with method: full; remove it")
        if self.pack.max_subjects != PackConfig().max_subjects:
            raise ValueError("pack.max_subjects has no effect with method: full: one subject a run")
        if "learning_rate" not in self.optimizer.model_fields_set:
            raise ValueError(
                "method: full needs optimizer.learning_rate (the default suits adapters; 5e-6 is "
                "usual for every weight)"
            )
        if self.prior.kind == "base_prediction":
            raise ValueError(
                "prior.kind: base_prediction needs method: lora: full training changes the base "
                "that would be the teacher; use images"
            )
        if self.checkpoint.preview:
            raise ValueError("checkpoint.preview needs method: lora; remove it")
        if self.precision == "fp16":
            raise ValueError("method: full trains in fp32 or bf16, not fp16; set precision")
        rows, shares = self.num_rows, self.full.num_workers * self.full.gradient_accumulation
        if rows < shares:
            raise ValueError(
                f"a train step has {rows} rows, too few for full.num_workers "
                f"{self.full.num_workers} x gradient_accumulation "
                f"{self.full.gradient_accumulation}; raise batch_size"
            )
        return self

    @model_validator(mode="after")
    def _options_have_effect(self) -> Self:
        if self.crops_per_image > 1 and self.crop == "center":
            raise ValueError("crops_per_image has no effect with crop: center; use crop: random")
        if self.optimizer.warmup_steps >= self.num_train_steps:
            raise ValueError(
                f"warmup_steps is {self.optimizer.warmup_steps} but num_train_steps is "
                f"{self.num_train_steps}; warm up for fewer steps"
            )
        for name in ("instance_prompt", "class_prompt"):
            check_template(name, getattr(self, name))
        for prompt in self.samples.prompts:
            check_template("samples.prompts", prompt)
        return self

    @property
    def previews(self) -> bool:
        """Whether the store gets the newest checkpoint while the job runs."""
        return self.method == "lora" and self.checkpoint.preview is not False

    @property
    def num_rows(self) -> int:
        """Rows of one train step: instance rows, and as many prior rows."""
        return self.batch_size * (2 if self.prior.num_images else 1)
