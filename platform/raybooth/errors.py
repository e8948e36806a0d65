"""The error tree: each error says what is wrong, what was found and what to do.

Every class is picklable (positional arguments reach ``super().__init__``), because Ray moves
exceptions between processes, and carries a stable ``code`` for scripts and HTTP answers.
"""

from __future__ import annotations

from collections.abc import Sequence


class RayBoothError(Exception):
    """Something failed; ``what`` is wrong, ``found`` is the evidence, ``do`` is the way out."""

    code = "error"
    exit_code = 1

    def __init__(self, what: str, found: str = "", do: str = "") -> None:
        super().__init__(what, found, do)
        self.what, self.found, self.do = what, found, do

    def __str__(self) -> str:
        text = self.what
        if self.found:
            text += f": found {self.found}"
        if self.do:
            text += f"; {self.do}"
        return text


class InputError(RayBoothError):
    """What a person wrote or pointed at cannot be used (exit code 2)."""

    code = "invalid_input"
    exit_code = 2


class ConfigError(InputError):
    """A configuration file or value is wrong."""

    code = "invalid_config"


class SubjectError(InputError):
    """A subject's id, words or photos cannot be trained on."""

    code = "invalid_subject"


class BaseModelError(InputError):
    """A base is unknown, incomplete, pickled, or does not match an adapter."""

    code = "invalid_base"


class RequestError(InputError):
    """A sampling request is out of range for this base."""

    code = "invalid_request"


class EncoderError(InputError):
    """An encoder that judges pictures is unknown, incomplete, pickled, or of another kind."""

    code = "invalid_encoder"


class NotPublishedError(InputError):
    """The store holds no such subject, version or alias."""

    code = "not_found"


class InputProblems(InputError):
    """All problems of one file at once, each with what, found and do."""

    code = "invalid_input"

    def __init__(self, source: str, problems: Sequence[InputError]) -> None:
        Exception.__init__(self, source, tuple(problems))
        self.what = f"{source} has {len(problems)} problem{'s' if len(problems) != 1 else ''}"
        self.found = "; ".join(str(problem) for problem in problems)
        self.do = "mend them and run the same command again"
        self.source, self.problems = source, tuple(problems)

    def __str__(self) -> str:
        return "\n".join([self.what + ":", *(f"  - {problem}" for problem in self.problems)])


class StoreError(RayBoothError):
    """The store cannot be read or written, or holds something this version does not know."""

    code = "store_error"


class PriorError(RayBoothError):
    """The prior cache cannot give the prior images that were asked for."""

    code = "prior_error"


class CheckpointError(RayBoothError):
    """A checkpoint is damaged or belongs to another configuration."""

    code = "checkpoint_error"


class TrainingError(RayBoothError):
    """A subject's training failed (its pack goes on without it)."""

    code = "training_failed"


class PeerLostError(TrainingError):
    """Another worker of a full run is gone; the run goes on from its checkpoint when restarted."""

    code = "peer_lost"


class ClusterError(RayBoothError):
    """Ray cannot be reached, or has not the resources that were asked for."""

    code = "cluster_error"


class ServingError(RayBoothError):
    """The endpoint cannot start or answer."""

    code = "serving_error"
