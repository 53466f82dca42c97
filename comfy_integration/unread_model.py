"""A diffusion model in ComfyUI of which nothing was read yet: its class, its names, its sizes; weights on demand.

Follows ``comfy.sd.load_diffusion_model_state_dict``, except that the model is made without memory. What loading makes
of a file's names is asked of ComfyUI: tensors without data go through its own loading, and are known again behind it.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy import model_detection
from comfy.patcher_extension import WrappersMP

from mesh_codec.dtypes import from_safetensors
from mesh_core.errors import CheckpointUnrecognised, PlanError
from mesh_core.model.checkpoint import CheckpointHeader, read_header
from mesh_core.model.library import recognise
from mesh_core.programs.comfy_recognition import side_of

from .pack_state import PackState
from .partial_model import partial_copy
from .patching import new_patcher
from .weight_source import UNREAD, ModelFile

_HINT = "ComfyUI's own loader, with Mesh Split behind it"


def load_unread(path: str, pack: PackState) -> Any:
    """A patcher of the model in the file ``path``; `cut_model` reads what it needs.

    Raises:
        CheckpointError: no adapter or not this ComfyUI can use the file.
    """
    header = read_header(path)
    checkpoint = recognise(header, pack.plugins)
    stored = sorted({t.dtype for t in checkpoint.header.tensors.values() if t.stored is not None})
    if stored:
        raise CheckpointUnrecognised(
            f"{header.path.name} is quantised ({', '.join(stored)}): it cannot be read in parts.", hint=_HINT
        )
    model, names = _without_weights(header)
    held = model.diffusion_model.state_dict()
    changed = [n for n, t in held.items() if _shape(header, names.get(n)) != t.shape]
    if changed or any(b.is_meta for b in model.buffers()):
        raise CheckpointUnrecognised(
            f"{header.path.name} does not hold {(changed or ['buffers'])[0]} as ComfyUI does: it cannot be read in "
            "parts.",
            hint=_HINT,
        )
    file = ModelFile(checkpoint, side_of(checkpoint.adapter), names, {names[n]: t.dtype for n, t in held.items()})
    patcher = new_patcher(
        partial_copy(model, lambda name: None),
        comfy.model_management.get_torch_device(),
        comfy.model_management.unet_offload_device(),
    )
    patcher.set_attachments(UNREAD, file)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, UNREAD, _uncut)
    return patcher


def _uncut(executor: Any, *args: Any, **kwargs: Any) -> Any:
    raise PlanError("Nothing of this model was read: it is not cut.", hint=f"Mesh Split behind its loader, or {_HINT}")


def _shape(header: CheckpointHeader, name: str | None) -> tuple[int, ...] | None:
    return None if name is None else header.tensors[name].shape


def _without_weights(header: CheckpointHeader) -> tuple[Any, dict[str, str]]:
    """ComfyUI's model on the meta device, and the file's name of each weight by ComfyUI's name of it."""
    in_file = {
        name: torch.empty(t.shape, dtype=from_safetensors(t.dtype).torch, device="meta")
        for name, t in header.tensors.items()
    }
    prefix = model_detection.unet_prefix_from_state_dict(in_file)
    inner = comfy.utils.state_dict_prefix_replace(dict(in_file), {prefix: ""}, filter_keys=True)
    named = inner or dict(in_file)
    config = model_detection.model_config_from_unet(named, "", metadata=dict(header.metadata) or None)
    if config is None:
        raise CheckpointUnrecognised(
            f"This ComfyUI does not know the model in {header.path.name}.", hint="update ComfyUI"
        )
    types = list(config.supported_inference_dtypes)
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(named),
        supported_dtypes=types,
        weight_dtype=comfy.utils.weight_dtype(named),
    )
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, types))
    model = config.get_model(named, "", device=torch.device("meta"))
    # Loading renames tensors and may compute new ones, which are in no file.
    names = {id(tensor): name for name, tensor in in_file.items()}
    loaded = config.process_unet_state_dict(dict(named))
    return model, {name: names[id(tensor)] for name, tensor in loaded.items() if id(tensor) in names}
