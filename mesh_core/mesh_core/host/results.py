"""What a worker may answer: the tensors that exist at the cut, of the form that the model gives them there.

Checked by what a result announces, before any of it is decoded. Knows no sockets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh_codec.dtypes import from_torch
from mesh_core.errors import WireMalformed
from mesh_core.model.adapter import ModelAdapter
from mesh_core.model.shapes import foretell
from mesh_core.model.spec import Conditioning, ModelSpec, State

_HINT = "the same versions of comfyui-mesh and of the model's adapter on both machines, or another worker"


@dataclass(frozen=True)
class Expected:
    """One tensor of a result. None where anything is right.

    Attributes:
        needed: it must be there.
    """

    needed: bool
    dtype: str | None
    shape: list[int] | None


def expected_at(
    cut: int, start: int, sent: State, conditioning: Conditioning, spec: ModelSpec, adapter: ModelAdapter
) -> dict[str, Expected]:
    """What ``sent``, the state at the cut ``start``, becomes at ``cut``: a model computes in the type that it is
    given."""
    given = {name: tuple(t.shape) for name, t in (*conditioning.constants.items(), *sent.items())}
    shapes = foretell(adapter.shapes(spec, start), given, adapter.shapes(spec, cut))
    computed = next((t.dtype for t in sorted(sent.values(), key=lambda t: -t.numel()) if t.is_floating_point()), None)
    expected: dict[str, Expected] = {}
    for name, role in spec.states[cut].items():
        # Whatever is exact may have a type of its own, but keeps it.
        dtype = sent[name].dtype if name in sent else computed if role != "exact" else None
        expected[name] = Expected(
            name not in spec.optional or name in sent,
            from_torch(dtype).name if dtype is not None else None,
            list(shapes[name]) if name in shapes else None,
        )
    return expected


def check_result(worker: str, entries: Sequence[Mapping[str, Any]], expected: Mapping[str, Expected]) -> None:
    """Whether the tensors of a result are those that were expected of ``worker``.

    Raises:
        WireMalformed: names the worker and the tensor.
    """
    if missing := sorted({n for n, e in expected.items() if e.needed} - {item["n"] for item in entries}):
        raise WireMalformed(f"{worker} answered without the tensor {missing[0]!r}.", hint=_HINT)
    for item in entries:
        name, form = item["n"], item["h"]
        wanted = expected.get(name)
        if wanted is None:
            raise WireMalformed(
                f"{worker} answered with a tensor {str(name)[:80]!r} that nobody asked for.", hint=_HINT
            )
        for key, right in (("dtype", wanted.dtype), ("shape", wanted.shape)):
            if right is not None and form.get(key) != right:
                said = str(form.get(key))[:80]
                raise WireMalformed(
                    f"{worker} answered with a tensor {name!r} of {key} {said} where {right} belongs.", hint=_HINT
                )
