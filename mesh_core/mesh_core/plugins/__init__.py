"""Finding, loading and reporting plugins. Knows none of them, not even the built-in ones: it is handed those."""
