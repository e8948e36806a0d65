"""The endpoint: requests of many subjects, one batch, one store; over contract and model only."""
