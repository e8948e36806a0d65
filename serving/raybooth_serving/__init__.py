"""The endpoint: requests of many subjects, one batch, one store; sees the contract and the model."""
