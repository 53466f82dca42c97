"""What ComfyUI is given: the nodes, and the routes of the settings page."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .hub import current
from .nodes import NODES
from .routes import add_routes

log = logging.getLogger(__name__)


class MeshExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        hub = current()
        add_routes(PromptServer.instance.routes, hub)
        if hub.message:
            log.error("%s", hub.message)
        return NODES
