"""What ``forward`` of the LTX-2 transformer is called with, as the state at cut 0 and the conditioning.

An argument is carried, or has no effect on this model, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_core.errors import UnsupportedInput
from mesh_core.model import Conditioning, ModelSpec, State
from mesh_core.model.adapting import refuse_attention_arguments, unusual_strides
from mesh_ltx.times import SUFFIX, compact

CONSTANTS: Mapping[str, bool] = {
    "encoder_hidden_states": True,
    "audio_encoder_hidden_states": True,
    f"timestep{SUFFIX}": True,
    f"audio_timestep{SUFFIX}": False,
    f"sigma{SUFFIX}": False,
    f"audio_sigma{SUFFIX}": False,
    f"video_gate{SUFFIX}": False,
    f"audio_gate{SUFFIX}": False,
    "encoder_attention_mask": False,
    "audio_encoder_attention_mask": False,
    "video_coords": False,
    "audio_coords": False,
    "video_self_attention_mask": False,
    "video_keyframes_mask": False,
    "perturbation_mask": False,
}
"""Constants of a generation, and whether each must be there. The gates' times are other hosts': diffusers takes those
of the scales and shifts."""

_AS_THEY_ARE = tuple(name for name in CONSTANTS if not name.endswith(SUFFIX))
_TIMES = ("timestep", "audio_timestep", "sigma", "audio_sigma")
_GRID = {"video_coords": ("num_frames", "height", "width", "fps"), "audio_coords": ("audio_num_frames",)}
_SWITCHES = ("isolate_modalities", "use_cross_timestep")
_KNOWN = {
    "hidden_states",
    "audio_hidden_states",
    "spatio_temporal_guidance_blocks",
    "attention_kwargs",
    *_AS_THEY_ARE,
    *_TIMES,
    *_SWITCHES,
    *(name for names in _GRID.values() for name in names),
}


def begin(spec: ModelSpec, inputs: Mapping[str, Any]) -> tuple[State, Conditioning]:
    """See `ModelAdapter.begin`."""
    given = {name: value for name, value in inputs.items() if value is not None}
    _refuse_what_cannot_cross(spec, given)
    wanted = {n: given[n] for n in _TIMES if n in given and (n in _TIMES[:2] or _needs_sigma(spec, given))}
    values, indices, types = compact(wanted)
    state: State = {
        "hidden_states": given["hidden_states"],
        "audio_hidden_states": given["audio_hidden_states"],
        "times": values,
    }
    without = _without_effect(spec, given)
    constants = {n: given[n] for n in _AS_THEY_ARE if n in given and n not in without}
    options: dict[str, Any] = {name: True for name in _SWITCHES if given.get(name)}
    blocks = given.get("spatio_temporal_guidance_blocks")
    if blocks and spec.config["perturbed_attn"]:
        options["spatio_temporal_guidance_blocks"] = [int(block) for block in blocks]
    for coordinates, names in _GRID.items():
        if coordinates not in given:
            options |= {"fps": 24.0} if "fps" in names else {}
            options |= {name: given[name] for name in names if name in given}
    options |= unusual_strides({name: state[name] for name in ("hidden_states", "audio_hidden_states")})
    options |= {f"{name}_dtype": dtype for name, dtype in types.items()}
    return state, Conditioning({**constants, **indices}, options)


def _needs_sigma(spec: ModelSpec, given: Mapping[str, Any]) -> bool:
    config = spec.config
    modulated = (config["cross_attn_mod"] or config["audio_cross_attn_mod"]) and config["use_prompt_adaln_single"]
    return bool(modulated or given.get("use_cross_timestep"))


def _without_effect(spec: ModelSpec, given: Mapping[str, Any]) -> set[str]:
    found = set()
    if not spec.config["use_keyframes_abs_pos_embedding"]:
        found.add("video_keyframes_mask")
    if not given.get("spatio_temporal_guidance_blocks") or not spec.config["perturbed_attn"]:
        found.add("perturbation_mask")
    return found


def _refuse_what_cannot_cross(spec: ModelSpec, given: Mapping[str, Any]) -> None:
    if unknown := sorted(given.keys() - _KNOWN):
        raise UnsupportedInput(
            f"{unknown[0]} is an argument that this version does not carry across a cut.", hint="unsplit()"
        )
    refuse_attention_arguments(given, "attention_kwargs")
    needed = [
        "hidden_states",
        "audio_hidden_states",
        "encoder_hidden_states",
        "audio_encoder_hidden_states",
        "timestep",
    ]
    if _needs_sigma(spec, given):
        needed.append("sigma")
    for coordinates, names in _GRID.items():
        if coordinates not in given:
            needed += [name for name in names if name != "fps"]
    if missing := [name for name in needed if name not in given]:
        raise UnsupportedInput(f"{spec.variant} needs {missing[0]}, which is missing.", hint=f"{missing[0]}=...")
    if spec.config["rope_type"] == "split" and not given["audio_hidden_states"].shape[1]:
        raise UnsupportedInput(
            "diffusers computes no LTX-2 with split rotary tables over zero audio tokens.",
            hint="one audio token of zeros with isolate_modalities=True, which changes no video",
        )
