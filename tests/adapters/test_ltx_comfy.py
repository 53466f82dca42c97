"""LTX-2's side in ComfyUI, against a stand-in of its model: every cut gives what the whole forward pass gives."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mesh_core.builtin import load_plugins
from mesh_core.errors import CheckpointUnrecognised, UnsupportedInput
from mesh_core.model import BlockSpan, Conditioning, ModelSpec, State, fingerprint, read_header
from mesh_core.programs.comfy import ComfySide
from mesh_core.programs.comfy_recognition import recognise_module, side_of
from mesh_ltx import LtxAdapter
from tests.adapters import comfy_ltx, tiny_ltx

ADAPTER = LtxAdapter()
BLOCKS = 3
SIDE: ComfySide = side_of(ADAPTER)


class Rig:
    """A model, ComfyUI's view of it, and the same with all weights on the meta device, as where nothing is local."""

    def __init__(self, generation: Any) -> None:
        self.model = tiny_ltx.transformer(generation)
        self.generation = generation
        self.comfy = comfy_ltx.LTXAVModel(self.model)
        self.slim = comfy_ltx.LTXAVModel(copy.deepcopy(self.model).to("meta"))
        spec = ADAPTER.recognise(SIDE.header(self.comfy))
        assert spec is not None
        self.spec: ModelSpec = spec

    def call(self, **changes: Any) -> dict[str, Any]:
        torch.manual_seed(4)
        width = 24 if self.generation == "2.0" else 48
        return {
            "x": [torch.randn(2, 8, 2, 2, 3), torch.randn(2, 3, 5, 2)],
            "timestep": (torch.tensor([0.7, 0.6]), torch.tensor([0.7, 0.6])),
            "context": torch.randn(2, tiny_ltx.TEXT, width),
            "frame_rate": 24.0,
            **changes,
        }

    def whole(self, call: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return listed(self.comfy(**copy.deepcopy(call)))

    def cut(self, call: dict[str, Any], cut: int) -> list[Tensor]:
        model = self.comfy if cut else self.slim
        with torch.no_grad():
            return listed(SIDE.run(model, model.forward, (), copy.deepcopy(call), cut, self.remote(cut)))

    def remote(self, cut: int) -> Any:
        def run(state: State, conditioning: Conditioning) -> State:
            assert state.keys() == self.spec.states[cut].keys()
            assert conditioning.constants.keys() <= self.spec.constants.keys()
            stage: nn.Module = ADAPTER.stage(self.spec, BlockSpan(cut, BLOCKS), self.model)
            result: State = stage({n: t.contiguous().clone() for n, t in state.items()}, conditioning)
            return result

        return run


def listed(output: Any) -> list[Tensor]:
    return output if isinstance(output, list) else [output]


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def calls(rig: Rig) -> dict[str, dict[str, Any]]:
    """What ComfyUI's nodes make of a sampling step."""
    tokens = 12
    masked = torch.rand(2, tokens, 1) * 0.7
    per_frame = torch.tensor([0.0, 0.7]).repeat_interleave(6).expand(2, -1).unsqueeze(-1)
    kept = torch.ones(tokens, dtype=torch.bool)
    kept[7] = False
    sound = torch.tensor([0.7, 0.5])
    return {
        "text to video": rig.call(),
        "first frame given": rig.call(timestep=(per_frame, sound)),
        "inpainting": rig.call(timestep=(masked, torch.rand(2, 5, 1))),
        "guides with dropped tokens": rig.call(
            timestep=(masked, sound), keyframe_idxs=torch.zeros(2, 3, 6, 2), denoise_mask=kept
        ),
        "no audio": {**rig.call(), "x": rig.call()["x"][:1], "timestep": torch.tensor([0.7, 0.6])},
        "text mask": rig.call(attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])),
        "perturbed blocks": rig.call(transformer_options={"stg_self_attn_blocks": {0, 2}}),
        "isolated streams": rig.call(transformer_options={"a2v_cross_attn": False, "v2a_cross_attn": False}),
    }


@pytest.mark.parametrize("cut", range(BLOCKS))
def test_every_cut_gives_what_the_whole_forward_pass_gives(rig: Rig, cut: int) -> None:
    plain = rig.whole(rig.call())
    for name, call in calls(rig).items():
        expected, found = rig.whole(call), rig.cut(call, cut)
        assert len(expected) == len(found) == (1 if name == "no audio" else 2), name
        for e, f in zip(expected, found, strict=True):
            torch.testing.assert_close(f, e, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert name == "text to video" or not torch.allclose(expected[0], plain[0], atol=1e-4), (
            f"{name} changes nothing"
        )


def test_comfyui_is_left_as_it_was(rig: Rig) -> None:
    before = {name: dict(module.__dict__) for name, module in rig.comfy.named_modules()}
    rig.cut(rig.call(), 1)
    with pytest.raises(UnsupportedInput):
        rig.cut(rig.call(transformer_options={"run_ax": False}), 1)
    assert {name: dict(module.__dict__) for name, module in rig.comfy.named_modules()} == before


def test_comfyuis_model_is_the_same_model_as_the_folder(rig: Rig, tmp_path: Path) -> None:
    rig.model.save_pretrained(tmp_path)
    folder = ADAPTER.recognise(read_header(tmp_path))
    assert folder is not None
    assert fingerprint.structure(rig.spec) == fingerprint.structure(folder)


def test_the_model_is_recognised_among_all_families(rig: Rig) -> None:
    checkpoint, side = recognise_module(rig.comfy, load_plugins())
    assert checkpoint.spec == rig.spec and type(side) is type(SIDE)
    with pytest.raises(CheckpointUnrecognised):
        recognise_module(nn.Linear(2, 2), load_plugins())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"transformer_options": {"run_vx": False}}, "run_vx"),
        ({"transformer_options": {"a2v_cross_attn": False}}, "not the other way"),
        ({"transformer_options": {"stg_skip_self_attn": True}}, "self-attention"),
        ({"guide_mask": object()}, "strength"),
        ({"ref_audio_seq_len": 3}, "Reference audio"),
        ({"attention_mask": torch.zeros(2, 1, 12, tiny_ltx.TEXT)}, "text mask"),
    ],
    ids=str,
)
def test_what_cannot_cross_is_refused_by_name(rig: Rig, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedInput, match=named):
        rig.cut(rig.call(**changes), 0)


def test_what_is_relied_on_is_looked_at_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(expected.problem() for expected in SIDE.expects), "there is no such ComfyUI here"
    name = "comfy.ldm.lightricks.av_model"
    for depth in range(1, name.count(".") + 2):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:depth]), types.ModuleType("stand-in"))
    sys.modules[name].LTXAVModel = comfy_ltx.LTXAVModel  # type: ignore[attr-defined]
    assert [expected.problem() for expected in SIDE.expects] == [None] * len(SIDE.expects)
    assert SIDE.block_key(Rig("2.3").spec, 2) == ("double_block", 2)
