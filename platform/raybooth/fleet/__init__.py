"""The fleet: a durable queue of jobs, planned into packs, run through Ray Train."""
