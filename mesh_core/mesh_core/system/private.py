"""Files that decide whom this user trusts: used only where other users of the machine cannot have written them."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from mesh_core.errors import ConfigError


def check_private(path: Path) -> None:
    """Look at who may write a file and its folder, as far as they exist. On Windows, the permissions of the user's
    profile hold.

    Raises:
        ConfigError: other users may; says what to do.
    """
    if sys.platform == "win32":
        return
    for place in (path.parent, path):
        try:
            state = place.stat()
        except OSError:
            continue  # whoever reads it says what is wrong
        others = state.st_mode & stat.S_IWOTH
        if others or (state.st_mode & stat.S_IWGRP and not _own_group(state.st_gid)):
            raise ConfigError(
                f"Other users of this machine can change {place}, and so whom this user trusts.",
                hint=f"chmod {'700' if place.is_dir() else '600'} {place}, once you know that what it holds is yours; "
                "or MESH_HOME on a disk that keeps permissions",
            )


def _own_group(group: int) -> bool:
    """Whether only this user is in a group: some systems give every user one, and make it the group of all files."""
    if sys.platform == "win32":
        return False
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}
