"""This machine: settings, devices, and what is remembered between runs. Knows nothing of models or networks."""
