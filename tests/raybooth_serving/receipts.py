"""A receipt of nothing in particular."""

from __future__ import annotations

from typing import Any

from raybooth_serving.pictures.receipt import (
    EngineFingerprint,
    Receipt,
    UsedAdapter,
    UsedBase,
    hash_prompts,
)

PROMPT, NEGATIVE = 'a "photo" <of> sks dog & 小さな犬\n\x1b', "red 🐕"


def a_receipt(**changes: Any) -> Receipt:
    """A receipt with words that files find hard."""
    values: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "prompts_sha256": hash_prompts(PROMPT, NEGATIVE),
        "seed": 2**63 - 1,
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "solver": "euler",
        "width": 32,
        "height": 24,
        "adapter_scale": -0.5,
        "zero_terminal_snr": True,
        "adapters": (UsedAdapter(reference="dog-a@1", sha256={"w": "f" * 64}, scale=1.0),),
        "base": UsedBase(name="tiny", fingerprint="e" * 64),
        "buckets": ((4, 2), (1, 1)),
        "output_format": "png",
        "output_compression": 100,
        "pixels_sha256": "d" * 64,
        "engine": EngineFingerprint(
            raybooth="0.1.0",
            torch="2",
            diffusers="0",
            transformers="5",
            device="cpu AVX2",
            dtype="fp32",
            threads=1,
            rank=4,
            targets=("to_q", "to_k"),
            generator=1,
        ),
    }
    return Receipt(**{**values, **changes})
