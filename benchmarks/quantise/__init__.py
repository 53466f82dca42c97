"""Writes checkpoints in the formats that people have, from a model in bfloat16: for tests and tables of pictures."""
