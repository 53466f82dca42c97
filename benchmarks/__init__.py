"""Measurements for those who make the product; not in the wheel. Run each from the repository's root, see README.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""Of the repository."""
