"""``python -m mesh_core.cli``, for where the console script is not on the path."""

from __future__ import annotations

from mesh_core.cli import main

if __name__ == "__main__":
    main()
