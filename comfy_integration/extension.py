"""What ComfyUI is given: the nodes, and the routes of the settings page."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from mesh_core.system.logs import logger

from .nodes import NODES
from .pack_state import pack_state
from .routes import add_routes

log = logger(__name__)


class MeshExtension(ComfyExtension):
    """What ComfyUI asks when it has imported the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        pack = pack_state()
        add_routes(PromptServer.instance.routes, pack)
        if pack.message:
            log.error("%s", pack.message)
        return NODES
