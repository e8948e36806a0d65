"""Which generator draws images (no torch)."""

GENERATOR_VERSION = 2
"""Raised when the same request would give another image; part of the prior cache's key."""
