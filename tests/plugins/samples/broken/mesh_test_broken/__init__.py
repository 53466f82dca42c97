"""Two plugins that fail: one when it is imported, one when it registers."""
