"""From photos to train rows: checked photos, the prior cache, latents, the rows of a train step."""
