"""Programs that own sampling and the first span, each in its own module."""
