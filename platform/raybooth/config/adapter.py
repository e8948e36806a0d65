"""The low-rank adapter of one subject, and the words that it learns."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, Self

from pydantic import Field, model_validator

from raybooth.reading import Strict

Targets = Literal["attention", "all"] | tuple[str, ...]


class AdapterConfig(Strict):
    """The low-rank adapter of one subject (Hu et al. 2021, LoRA)."""

    rank: int = Field(4, ge=1, le=256)
    """Rank r of every site."""

    alpha: float | None = Field(None, gt=0)
    """Scale is alpha / rank; none means alpha = rank, as in diffusers' scripts."""

    targets: Targets = "attention"
    """`attention` (to_q, to_k, to_v, to_out.0), `all` (with feed-forward, projections and
    convolutions), or a list of module-name suffixes, `*` standing for any part of a name."""

    text_targets: Targets | None = None
    """Sites in the text encoders: `attention` (q_proj, k_proj, v_proj, out_proj), `all` (with fc1
    and fc2), or a list as above. None leaves the text encoders as they are."""

    identifier_tokens: int = Field(0, ge=0, le=16)
    """Token embeddings that the subject learns as its identifier, `<subject-id>` in prompts (Gal
    et al. 2022, textual inversion); 0 uses the identifier's own tokens, which stay frozen."""

    identifier_init: str | None = Field(None, min_length=1)
    """Words whose token embeddings the learned ones start from; none: the class noun."""

    text_learning_rate: float | None = Field(None, gt=0)
    """Of text sites and learned tokens; none: the optimiser's own."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def trains_text(self) -> bool:
        """Whether prompts mean something else to each subject at each train step."""
        return self.text_targets is not None or self.identifier_tokens > 0

    @model_validator(mode="after")
    def _options_have_effect(self) -> Self:
        if self.identifier_init is not None and not self.identifier_tokens:
            raise ValueError("identifier_init has no effect; set identifier_tokens to 1 or more")
        if self.text_learning_rate is not None and not self.trains_text:
            do = "set text_targets or identifier_tokens"
            raise ValueError(f"text_learning_rate has no effect; {do}")
        return self


def matches_target(site: str, pattern: str) -> bool:
    """Whether the layer of this dotted name ends with `pattern`, at a dot."""
    return fnmatchcase(site, pattern) or fnmatchcase(site, "*." + pattern)


def countable(prompt: str, identifier: str, identifier_tokens: int) -> str:
    """`prompt` with a word of one token for each learned one, for tokenizers without them."""
    return (
        prompt.replace(identifier, " ".join("a" * identifier_tokens))
        if identifier_tokens
        else prompt
    )


def learned_identifier(subject_id: str) -> str:
    """What prompts call a subject that learns its own tokens; no base has a token of that name."""
    return f"<{subject_id}>"
