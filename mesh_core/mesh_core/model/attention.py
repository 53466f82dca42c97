"""Which of diffusers' attention backends a model computes with: the host says, and workers do the same.

Backends differ in the last bits, so all machines that run one model must use one. Diffusers keeps the choice in each
attention layer and, for layers without one, in a global of the process. A worker puts it into the layers of the stage,
since the global is everybody's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mesh_core.errors import UnsupportedInput, WireMalformed

OPTION = "attention_backend"
"""Under which a step's options name the backend. A step without it: as the worker's own environment says."""


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that may have a backend of their own."""
    return [m for m in model.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")]


def backend_in_use(layers: Iterable[Any]) -> str:
    """What layers that `attention_layers` found compute with now; takes microseconds.

    Raises:
        UnsupportedInput: not all with the same.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    process = _AttentionBackendRegistry._active_backend
    found = {getattr(layer.processor, "_attention_backend", None) or process for layer in layers} or {process}
    if len(found) > 1:
        names = ", ".join(sorted(AttentionBackendName(backend).value for backend in found))
        raise UnsupportedInput(
            f"Some layers compute attention with one backend and some with another ({names}); workers use one for all.",
            hint="pipe.transformer.set_attention_backend(NAME)",
        )
    return str(AttentionBackendName(found.pop()).value)


def use_backend(model: nn.Module, name: object) -> None:
    """Have all layers of ``model`` compute attention with this backend; None: with that of this process.

    Raises:
        WireMalformed: no name.
        UnsupportedInput: it cannot be used on this machine.
    """
    if name is not None and not isinstance(name, str):
        raise WireMalformed(f"The {OPTION} of a step is a name.")
    backend = None if name is None else _checked(name)
    for layer in attention_layers(model):
        layer.processor._attention_backend = backend  # type: ignore[union-attr]


def _checked(name: str) -> Any:
    from diffusers.models import attention_dispatch as dispatch
    from diffusers.utils import constants

    try:
        backend = dispatch.AttentionBackendName(name)
        if backend in dispatch._HUB_KERNELS_REGISTRY and name != constants.DIFFUSERS_ATTN_BACKEND:
            # Code from elsewhere, at another machine's word: only if whoever runs this worker wants it too.
            raise RuntimeError("its code would have to be downloaded; DIFFUSERS_ATTN_BACKEND names it where it may be")
        dispatch._check_attention_backend_requirements(backend)
        dispatch._maybe_download_kernel_for_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UnsupportedInput(
            f"The attention backend {name[:60]!r} cannot be used on this machine: {error}",
            hint="pipe.transformer.reset_attention_backend(), or what it needs installed on all machines",
        ) from error
    return backend
