"""The frozen base, the adapters over it, and the sampler: what training and serving share."""
