"""LTX-2 and LTX-2.3 for the mesh. Holds no adapter yet, so it registers no plugin."""
