"""Training: the DreamBooth objective, the per-slot optimiser, packs, checkpoints."""
