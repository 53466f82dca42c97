"""Fails when it is imported."""

raise RuntimeError("libwonder.so.3 is missing")
