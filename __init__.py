"""ComfyUI imports this folder when it lies in ``custom_nodes``; everything is in `comfy_integration`.

Nothing else imports it, and outside of ComfyUI it does nothing.
"""

from importlib.util import find_spec

if find_spec("comfy_api") is not None or find_spec("folder_paths") is not None:
    from .comfy_integration import *  # noqa: F403
