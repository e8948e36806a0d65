"""Everything a person writes: frozen, unknown keys refused, one default beside each field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raybooth.reading import Model as Model
from raybooth.reading import Strict as Strict
from raybooth.reading import configs_folder as configs_folder
from raybooth.reading import find_config as find_config
from raybooth.reading import load_config as load_config
from raybooth.reading import load_yaml as load_yaml
from raybooth.reading import merge as merge
from raybooth.reading import parse_config as parse_config
from raybooth.reading import problems_of as problems_of

Solver = Literal["ddim", "euler", "dpmpp2m"]
Precision = Literal["fp32", "bf16", "fp16"]
SubjectId = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class AdapterConfig(Strict):
    """The low-rank adapter of one subject (Hu et al. 2021, LoRA)."""

    rank: int = Field(4, ge=1, le=256)
    """Rank r of every site."""

    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; none means alpha = rank, as in diffusers' scripts."""

    targets: Literal["attention", "all"] | tuple[str, ...] = "attention"
    """`attention` (to_q, to_k, to_v, to_out.0), `all` (with feed-forward, projections and
    convolutions), or a list of module-name suffixes."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class OptimizerConfig(Strict):
    """AdamW of one slot (Loshchilov and Hutter 2019); 8-bit states by bitsandbytes."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = Field(5e-4, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient norm at which each slot is clipped on its own."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate curve after warm-up, over the slot's own train steps."""

    warmup_steps: int = Field(0, ge=0)


class PriorConfig(Strict):
    """Prior preservation (Ruiz et al. 2023, DreamBooth, section 3.3)."""

    num_images: int = Field(100, ge=0)
    """Prior images of the class; 0 trains without a prior."""

    loss_weight: float = Field(1.0, ge=0)
    """Lambda of the prior term."""

    negative_prompt: str = ""
    solver: Solver = "ddim"
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1, le=50)

    @model_validator(mode="after")
    def _weight_needs_images(self) -> Self:
        if (self.loss_weight > 0) != (self.num_images > 0):
            raise ValueError(
                f"loss_weight is {self.loss_weight} but num_images is {self.num_images}; "
                "set both to 0 to train without a prior, or both above 0"
            )
        return self


class ObjectiveConfig(Strict):
    """What the denoiser is asked to predict, and how timesteps are weighted."""

    snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR gamma (Hang et al. 2023); weights instance rows only, never prior rows."""


class CheckpointConfig(Strict):
    """When a slot's whole training state is written."""

    every_steps: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)


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

    method: Literal["lora"] = "lora"
    resolution: int = Field(512, ge=8, le=4096, multiple_of=8)
    """Pixels of a side; photos are resized by their shorter side, then cropped."""

    crop: Literal["center", "random"] = "center"
    crops_per_image: int = Field(1, ge=1, le=64)
    """Seeded crops cached of each photo; more than one needs `crop: random`."""

    min_images: int = Field(3, ge=1)
    num_train_steps: int = Field(800, ge=1)
    batch_size: int = Field(1, ge=1, le=64)
    """Instance rows of a slot in a train step; as many prior rows join them."""

    precision: Precision = "fp32"
    """Autocast of the denoiser; masters and optimiser stay fp32."""

    seed: int = Field(0, ge=0, lt=2**63)
    instance_prompt: str = "a photo of {identifier} {class_noun}"
    class_prompt: str = "a photo of a {class_noun}"
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    prior: PriorConfig = PriorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    pack: PackConfig = PackConfig()
    resources: ResourcesConfig = ResourcesConfig()

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
            _check_template(name, getattr(self, name))
        for prompt in self.samples.prompts:
            _check_template("samples.prompts", prompt)
        return self


class PromptsConfig(Strict):
    """Words of one subject that differ from the train config's."""

    instance: str | None = None
    prior: str | None = None
    samples: tuple[str, ...] | None = None


class SubjectDefaults(Strict):
    """Values of every subject of a fleet that does not say otherwise."""

    class_noun: str | None = None
    identifier: str = "sks"
    prompts: PromptsConfig = PromptsConfig()
    seed: int | None = Field(None, ge=0, lt=2**63)
    overrides: dict[str, Any] = Field(default_factory=dict)


class SubjectConfig(Strict):
    """One subject of a fleet file."""

    id: SubjectId
    """A DNS label: lower-case letters, digits and inner hyphens, at most 63."""

    class_noun: str | None = Field(None, min_length=1)
    images: str | tuple[str, ...]
    """A folder, or a list of files; relative to the fleet file."""

    identifier: str | None = Field(None, min_length=1)
    prompts: PromptsConfig = PromptsConfig()
    seed: int | None = Field(None, ge=0, lt=2**63)
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Train config values of this subject alone, nested as in configs/train."""


class FleetConfig(Strict):
    """A fleet file: one base, one way of training, many subjects."""

    base: str = "pocket"
    """`pocket`, a name of configs/base, a folder in diffusers' layout, or a Hub id."""

    revision: str | None = None
    """Commit of a Hub id; required for one."""

    train: str | dict[str, Any] = "pocket-lora"
    """A file of configs/train (its name or path), or its contents inline."""

    defaults: SubjectDefaults = SubjectDefaults()
    subjects: tuple[SubjectConfig, ...] = Field(min_length=1)


class BaseConfig(Strict):
    """A base by a short name; the files of configs/base. `base: sd15` means configs/base/sd15."""

    base: str
    """`pocket`, a name of configs/base, a folder in diffusers' layout, or a Hub id."""

    revision: str | None = None
    """Commit of a Hub id; required for one."""


class EngineConfig(Strict):
    """The denoising loop of one serving replica."""

    num_slots: int = Field(16, ge=1, le=4096)
    """Adapters resident in the bank at once, the null adapter not counted."""

    max_rank: int = Field(16, ge=1, le=256)
    targets: Literal["attention", "all"] | tuple[str, ...] = "all"
    row_buckets: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8, 16)
    """Images denoised together, padded up to the next of these."""

    max_queued_images: int = Field(256, ge=1)
    """Images that may wait; a request beyond them is refused (429)."""

    max_prompt_cache: int = Field(4096, ge=1)
    """Prompt embeddings kept in memory."""

    max_host_adapters: int = Field(1024, ge=1)
    """Adapters kept in host memory, ready to be written to a slot."""

    @model_validator(mode="after")
    def _buckets_ascend(self) -> Self:
        if not self.row_buckets or list(self.row_buckets) != sorted(set(self.row_buckets)):
            raise ValueError(f"row_buckets is {list(self.row_buckets)}; list them ascending")
        return self


class LimitsConfig(Strict):
    """What one HTTP request may ask for."""

    max_images: int = Field(10, ge=1)
    max_inference_steps: int = Field(150, ge=1)
    max_guidance_scale: float = Field(30.0, ge=1)
    max_prompt_characters: int = Field(2000, ge=1)
    max_pixels: int | None = Field(None, ge=64)
    """Width times height; none means four times the base's native size."""

    max_body_bytes: int = Field(1024 * 1024, ge=1024)
    max_requests: int = Field(1024, ge=1)
    """HTTP requests in progress at one gateway."""

    timeout_s: float = Field(600.0, gt=0)


class SamplingDefaults(Strict):
    """What a request that does not say gets."""

    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(7.5, ge=1)
    solver: Solver = "dpmpp2m"


class ServeConfig(Strict):
    """The endpoint; the files of configs/serve."""

    base: str = "pocket"
    revision: str | None = None
    precision: Precision = "fp32"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, gt=0)
    num_gpus: float | None = Field(None, ge=0)
    """None: one GPU where the cluster has any, otherwise none."""

    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    defaults: SamplingDefaults = SamplingDefaults()


def _check_template(name: str, text: str) -> None:
    try:
        text.format(identifier="sks", class_noun="dog")
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name} is {text!r}; it may hold {{identifier}} and {{class_noun}} only"
        ) from error
