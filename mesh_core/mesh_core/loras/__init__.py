"""LoRAs: what one is, reading it, applying it to stages, carrying it to workers and keeping it there.

Nothing is imported here: each part is imported where it is used.
"""
