"""Transports: how messages move between hosts and workers. `base` is the contract."""
