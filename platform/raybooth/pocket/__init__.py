"""The embedded base: a tiny latent-diffusion model, trained by us on a drawn world."""

from pathlib import Path


def path() -> Path:
    """The folder of the shipped base, in Stable Diffusion's own layout."""
    return Path(__file__).resolve().parent / "weights"
