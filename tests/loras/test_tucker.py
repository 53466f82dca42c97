"""LoRAs with a core between their factors, as they are made for convolutions, on linear layers.

tests/comfy/test_loras.py checks the same against ComfyUI, where ComfyUI applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraError
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied
from mesh_core.loras.read import read_lora
from mesh_core.model.library import Checkpoint
from tests.adapters import tiny
from tests.support import loras
from tests.support.loras import randn
from tests.support.splitting import checkpoint_at

State = dict[str, Tensor]
BLOCK = "transformer_blocks.1.attn"
STRENGTH = 0.7


@dataclass
class Rig:
    checkpoint: Checkpoint
    model: torch.nn.Module
    folder: Path

    def weight(self, layers: str) -> Tensor:
        return torch.cat([self.model.get_parameter(f"{BLOCK}.{x}.weight").detach() for x in layers.split()]).clone()

    def with_lora(self, state: State, layers: str) -> Tensor:
        lora = read_lora(loras.save(self.folder / "lora.safetensors", state), self.checkpoint)
        patched = PatchedModel(self.model, self.checkpoint.spec.parameters)
        patched.apply([Applied(lora, STRENGTH)])
        found = self.weight(layers)
        patched.apply(())
        return found


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("tucker")
    model = tiny.transformer(guidance=False)
    model.save_pretrained(folder / "klein")
    yield Rig(checkpoint_at(folder / "klein", load_plugins()), model, folder)


def mid(rows: int, columns: int, one: tuple[int, ...]) -> tuple[State, Tensor]:
    up, middle, down = randn(rows, 4, seed=1), randn(4, 5, seed=2), randn(5, columns, seed=3)
    state = {"lora_up.weight": up.view(rows, 4, *one), "lora_mid.weight": middle.view(4, 5, *one)}
    state |= {"lora_down.weight": down.view(5, columns, *one), "alpha": torch.tensor(2.0)}
    return state, 2.0 / 5 * up @ middle @ down


def loha(rows: int, columns: int, one: tuple[int, ...]) -> tuple[State, Tensor]:
    state, halves = {"alpha": torch.tensor(2.0)}, []
    for i in (1, 2):
        a, core, b = randn(3, rows, seed=i), randn(3, 4, seed=10 + i, scale=1.0), randn(4, columns, seed=20 + i)
        state |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": core.view(3, 4, *one)}
        halves.append(a.T @ core @ b)
    return state, 2.0 / 4 * halves[0] * halves[1]


def lokr(rows: int, columns: int, one: tuple[int, ...]) -> tuple[State, Tensor]:
    first, core = randn(4, 2, seed=1), randn(3, 5, seed=2, scale=1.0)
    a, b = randn(3, rows // 4, seed=3), randn(5, columns // 2, seed=4)
    state = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core.view(3, 5, *one)}
    return state | {"alpha": torch.tensor(2.0)}, 2.0 / 5 * torch.kron(first, a.T @ core @ b)


Case = Callable[[int, int, tuple[int, ...]], tuple[State, Tensor]]


@pytest.mark.parametrize("one", [(1, 1), ()], ids=["as a convolution of one pixel", "as matrices"])
@pytest.mark.parametrize("stem", ["lora_unet_double_blocks_1_img_attn_qkv", f"transformer.{BLOCK}.to_out.0"])
@pytest.mark.parametrize("case", [mid, loha, lokr])
def test_the_change_is_the_product_of_the_factors(rig: Rig, case: Case, stem: str, one: tuple[int, ...]) -> None:
    layers = "to_q to_k to_v" if stem.endswith("qkv") else "to_out.0"
    base = rig.weight(layers)
    state, delta = case(*base.shape, one)
    found = rig.with_lora({f"{stem}.{k}": v for k, v in state.items()}, layers)
    assert (found - base).abs().max() > 1e-3
    torch.testing.assert_close(found, base + STRENGTH * delta, rtol=1e-5, atol=2e-6)


def change(state: State, role: str, tensor: Tensor | None) -> State:
    return {k: v for k, v in {**state, role: tensor}.items() if v is not None}


BROKEN: dict[str, tuple[Case, str, Tensor | None]] = {
    "a kernel that no linear layer has": (mid, "lora_mid.weight", torch.ones(4, 5, 3, 3)),
    "a middle of another rank": (mid, "lora_mid.weight", torch.ones(5, 4, 1, 1)),
    "one core of two": (loha, "hada_t2", None),
    "a core of another rank": (loha, "hada_t1", torch.ones(4, 3, 1, 1)),
    "a core without ranks": (lokr, "lokr_t2", torch.ones(15)),
    "a core with a kernel": (lokr, "lokr_t2", torch.ones(3, 5, 3, 3)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_cores_that_do_not_fit_are_refused_with_their_shapes(rig: Rig, name: str) -> None:
    case, role, tensor = BROKEN[name]
    state, _ = case(*rig.weight("to_out.0").shape, (1, 1))
    with pytest.raises(LoraError, match=r"does not fit .*to_out\.0\.weight.*rank or shape differ \("):
        rig.with_lora(
            {f"transformer.{BLOCK}.to_out.0.{k}": v for k, v in change(state, role, tensor).items()}, "to_out.0"
        )
