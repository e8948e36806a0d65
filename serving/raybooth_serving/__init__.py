"""The endpoint: requests of many subjects, one batch, one store. Sees the contract and `raybooth.model`."""
