"""The endpoint; the files of configs/serve."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raybooth.config.safety import AuthConfig, SafetyConfig
from raybooth.config.words import Precision, Solver
from raybooth.reading import Strict


class EngineConfig(Strict):
    """The denoising loop of one serving replica."""

    num_slots: int = Field(16, ge=1, le=4096)
    """Adapters resident in the bank at once, the null adapter not counted."""

    max_rank: int = Field(16, ge=1, le=256)
    targets: Literal["attention", "all"] | tuple[str, ...] = "all"
    row_buckets: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8, 16, 32)
    """Rows denoised together, padded up to the next of these; an image with guidance takes two,
    one without takes one."""

    max_step_s: float = Field(1.0, gt=0)
    """Seconds that a denoise step may take: by the step times that the engine measures, it does not
    take more rows than fit in them (at least one image)."""

    calibrate: bool = False
    """Measure the step time of every bucket before the first request, at the base's own size."""

    max_queued_images: int = Field(256, ge=1)
    """Images that may wait; a request beyond them is refused (429). Those in the batch beyond the
    largest bucket, and those denoised but not yet decoded, count as waiting."""

    max_backlog_s: float = Field(300.0, gt=0)
    """Seconds of denoise steps that may be to do, by the measured step times, when a request comes;
    beyond them it is refused (429)."""

    max_prompt_cache: int = Field(4096, ge=1)
    """Prompt embeddings kept in host memory."""

    max_prompt_bytes: int = Field(2**30, ge=1)
    """Host memory for them."""

    max_host_adapters: int = Field(1024, ge=1)
    """Adapters kept in host memory, ready to be written to a slot."""

    max_host_bytes: int = Field(4 * 2**30, ge=1)
    """Host memory for them; those in slots are not counted."""

    @model_validator(mode="after")
    def _buckets_ascend(self) -> Self:
        if not self.row_buckets or list(self.row_buckets) != sorted(set(self.row_buckets)):
            raise ValueError(f"row_buckets is {list(self.row_buckets)}; list them ascending")
        if self.row_buckets[-1] < 2:
            raise ValueError("row_buckets ends at 1; an image with guidance takes 2 rows")
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
    store_timeout_s: float = Field(5.0, gt=0)
    """Seconds to wait for the store to say what a name means; a silent one counts as away."""
    """A request that says no time of its own, or a longer one, gets this."""

    max_kept_answers: int = Field(256, ge=0)
    """Answers to requests with an Idempotency-Key, kept at one gateway to be given again."""

    max_kept_bytes: int = Field(256 * 2**20, ge=0)
    keep_answers_s: float = Field(600.0, ge=0)

    replica_wait_s: float = Field(15.0, gt=0)
    """How long a request waits where no engine replica runs, before it is refused (503)."""

    drain_s: float = Field(120.0, ge=0)
    """How long a replica that has to stop goes on with its requests."""


class PicturesConfig(Strict):
    """What a picture file tells of its making."""

    keep_prompt: bool = True
    """Both prompts, so that the file alone can be drawn again (`raybooth replay`); without them
    it keeps their SHA-256."""


class SamplingDefaults(Strict):
    """What a request that does not say gets."""

    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(7.5, ge=1)
    solver: Solver = "dpmpp2m"


class ReplicasConfig(Strict):
    """Replicas that come and go with the backlog of denoise steps."""

    min: int = Field(1, ge=1)
    max: int = Field(ge=1)
    target_backlog_s: float = Field(10.0, gt=0)
    """Seconds of denoise steps ahead of each replica; a longer backlog brings another."""

    upscale_delay_s: float = Field(10.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)
    """Both: how long the wish must last before a replica comes or goes."""

    @model_validator(mode="after")
    def _min_fits_max(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}; raise max")
        return self


Replicas = Annotated[int, Field(ge=1)] | ReplicasConfig
"""A number, or bounds between which the backlog decides."""


class ServedBase(Strict):
    """One base of the endpoint, and the replicas that hold it."""

    base: str = "pocket"
    revision: str | None = None
    precision: Precision = "fp32"
    replicas: Replicas = 1
    num_cpus: float = Field(1, gt=0)
    num_gpus: float | None = Field(None, ge=0)
    """None: one GPU where the cluster has any, otherwise none."""

    engine: EngineConfig = EngineConfig()
    defaults: SamplingDefaults = SamplingDefaults()

    @property
    def slug(self) -> str:
        """The last part of the base's name as a DNS label: what its deployment is called."""
        return re.sub("[^a-z0-9]+", "-", self.base.rstrip("/").rpartition("/")[2].lower())


class ServedFull(Strict):
    """Replicas for full fine-tunes, which have weights of their own, loaded when asked for.

    Precision, engine and defaults are those of the model's base, which must be served as well.
    """

    replicas: Replicas = 1
    max_models: int = Field(1, ge=1)
    """In the memory of a replica at once; the least recently used one leaves for another."""

    num_cpus: float = Field(1, gt=0)
    num_gpus: float | None = Field(None, ge=0)
    """None: one GPU where the cluster has any, otherwise none."""


class ServeConfig(Strict):
    """The endpoint; the files of configs/serve."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    bases: tuple[ServedBase, ...] = Field((ServedBase(),), min_length=1)
    full: ServedFull | None = None
    """None: full fine-tunes are refused."""

    limits: LimitsConfig = LimitsConfig()
    auth: AuthConfig = AuthConfig()
    safety: SafetyConfig = SafetyConfig()
    pictures: PicturesConfig = PicturesConfig()

    @model_validator(mode="after")
    def _bases_differ(self) -> Self:
        slugs = [served.slug for served in self.bases]
        for slug in slugs:
            if slugs.count(slug) > 1:
                raise ValueError(f"two bases are called {slug!r}; serve them apart")
        return self
