"""The ways to store weights that the core itself reads. Each is a plugin of `mesh_core.hookspecs`; none knows a model."""
