"""The ways to store weights that the core itself reads. Each is a plugin; none knows a model."""
