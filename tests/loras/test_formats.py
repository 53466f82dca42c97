"""Every naming and algorithm changes the weights as the program that defines it does: diffusers with PEFT, LyCORIS."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn

from mesh_core.builtin import load_plugins
from mesh_core.errors import LoraError, LoraUnmatched, UnsupportedInput
from mesh_core.loras.apply import PatchedModel
from mesh_core.loras.lora import Applied, Lora
from mesh_core.loras.memory import NamedPatch, from_comfy_weights, lora_from_patches
from mesh_core.loras.read import lora_of_state, read_lora
from mesh_core.model.library import Checkpoint
from tests.adapters import tiny
from tests.support import loras
from tests.support.splitting import checkpoint_at

State = dict[str, Tensor]
BLOCK, SINGLE = "transformer_blocks.1", "single_transformer_blocks.2"
BFL_NAMES = {
    f"{BLOCK}.attn.to_out.0": "double_blocks.1.img_attn.proj",
    f"{BLOCK}.ff_context.linear_in": "double_blocks.1.txt_mlp.0",
    f"{SINGLE}.attn.to_qkv_mlp_proj": "single_blocks.2.linear1",
    f"{SINGLE}.attn.to_out": "single_blocks.2.linear2",
}


@dataclass
class Rig:
    checkpoint: Checkpoint
    model: Flux2Transformer2DModel
    folder: Path

    def merged(self, state: State, strength: float = 1.0, **metadata: str) -> State:
        """The weights with the LoRA in a file of that content."""
        lora = self.read(state, **metadata)
        return self.with_lora(lora, strength)

    def read(self, state: State, **metadata: str) -> Lora:
        name = f"lora-{len(list(self.folder.iterdir()))}.safetensors"
        return read_lora(loras.save(self.folder / name, state, **metadata), self.checkpoint)

    def with_lora(self, lora: Lora, strength: float = 1.0) -> State:
        patched = PatchedModel(self.model, self.checkpoint.spec.parameters)
        patched.apply([Applied(lora, strength)])
        found = weights(self.model)
        patched.apply(())
        return found

    def by_diffusers(self, state: State, strength: float = 1.0, **metadata: Any) -> State:
        """The weights after diffusers loaded the same file and fused it."""
        path = loras.save(self.folder / "diffusers.safetensors", state, **metadata)
        converted, stored = Flux2KleinPipeline.lora_state_dict(str(path), return_lora_metadata=True)
        model = tiny.transformer(guidance=False)
        model.load_lora_adapter(converted, adapter_name="a", metadata=stored)
        model.set_adapters("a", strength)
        model.fuse_lora()
        return {
            name.replace(".base_layer", ""): w
            for name, w in weights(model).items()
            if "lora_" not in name and "lokr_" not in name
        }


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("formats")
    model = tiny.transformer(guidance=False)
    model.save_pretrained(folder / "klein")
    yield Rig(checkpoint_at(folder / "klein", load_plugins()), model, folder)


def weights(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def changed(found: State, rig: Rig) -> set[str]:
    return {name for name, p in rig.model.named_parameters() if not torch.equal(p, found[name])}


def fused_qkv(rig: Rig, down: str, up: str, stem: str, alpha: float | None = None, **made: Any) -> State:
    """A LoRA of one block's fused image query, key and value, and of the layers of BFL_NAMES, with those endings."""
    width = rig.checkpoint.spec.parameters[f"{BLOCK}.attn.to_q.weight"].shape
    state = {
        f"{stem}double_blocks.1.img_attn.qkv{down}": loras.randn(4, width[1], seed=1),
        f"{stem}double_blocks.1.img_attn.qkv{up}": loras.randn(3 * width[0], 4, seed=2),
    }
    for i, (ours, theirs) in enumerate(BFL_NAMES.items()):
        rows, columns = rig.checkpoint.spec.parameters[f"{ours}.weight"].shape
        state[f"{stem}{theirs}{down}"] = loras.randn(4, columns, seed=10 + i)
        state[f"{stem}{theirs}{up}"] = loras.randn(rows, 4, seed=20 + i)
    if alpha is not None:
        state |= {k.removesuffix(down) + ".alpha": torch.tensor(alpha) for k in list(state) if k.endswith(down)}
    return state


def joined(state: State) -> State:
    """The same keys as kohya writes them."""
    made = {}
    for key, value in state.items():
        stem, _, rest = key.partition(".lora_") if ".lora_" in key else (*key.rsplit(".", 1)[:1], "", "alpha")
        made["lora_unet_" + stem.replace(".", "_") + (f".lora_{rest}" if rest != "alpha" else ".alpha")] = value
    return made


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_peft_files_of_all_layers_give_the_very_weights_that_diffusers_fuses(rig: Rig, strength: float) -> None:
    state = loras.peft(loras.modules(rig.model))
    found, expected = rig.merged(state, strength), rig.by_diffusers(state, strength)
    assert len(changed(found, rig)) == len(state) // 2
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")
def test_a_peft_file_whose_configuration_has_another_alpha(rig: Rig) -> None:
    state = loras.peft(loras.modules(rig.model, "attn.to_q", "attn.to_out"))
    config = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"attn.to_q": 1.5}}
    config |= {"transformer.target_modules": ["to_q", "to_out"], "transformer.rank_pattern": {}}
    note = json.dumps(config)
    assert_close(rig.merged(state, lora_adapter_metadata=note), rig.by_diffusers(state, lora_adapter_metadata=note))


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_kohya_files(rig: Rig, alpha: float | None) -> None:
    state = joined(fused_qkv(rig, ".lora_down.weight", ".lora_up.weight", "", alpha))
    found = rig.merged(state, 0.8)
    assert len(changed(found, rig)) == 7
    assert_close(found, rig.by_diffusers(state, 0.8))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_comfyui_and_black_forest_labs_files(rig: Rig, prefix: str) -> None:
    state = fused_qkv(rig, ".lora_A.weight", ".lora_B.weight", prefix)
    assert_close(rig.merged(state), rig.by_diffusers(state))


def test_black_forest_labs_files_without_a_prefix_are_the_same_lora(rig: Rig) -> None:
    bare = rig.read(fused_qkv(rig, ".lora_A.weight", ".lora_B.weight", ""))
    assert bare.id == rig.read(fused_qkv(rig, ".lora_A.weight", ".lora_B.weight", "diffusion_model.")).id
    assert bare.id == rig.read(joined(fused_qkv(rig, ".lora_down.weight", ".lora_up.weight", "", 4.0))).id


def test_dora_files_of_peft(rig: Rig) -> None:
    shapes = loras.modules(rig.model, "attn.to_q", "attn.to_qkv_mlp_proj")
    state = loras.peft(shapes)
    for module, (rows, _) in shapes.items():
        state[f"transformer.{module}.lora_magnitude_vector"] = loras.randn(rows, seed=7).abs() + 0.5
    assert_close(rig.merged(state), rig.by_diffusers(state))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_lokr_files_that_diffusers_reads(rig: Rig, prefix: str) -> None:
    rows, columns = rig.checkpoint.spec.parameters[f"{SINGLE}.attn.to_out.weight"].shape
    stem = prefix + (f"{SINGLE}.attn.to_out" if prefix == "transformer." else "single_blocks.2.linear2")
    state = {
        f"{stem}.lokr_w1": loras.randn(4, 4, seed=1),
        f"{stem}.lokr_w2_a": loras.randn(rows // 4, 2, seed=2),
        f"{stem}.lokr_w2_b": loras.randn(2, columns // 4, seed=3),
    }
    if prefix == "diffusion_model.":
        state[f"{stem}.alpha"] = torch.tensor(3.0)
    assert_close(rig.merged(state), rig.by_diffusers(state))


def lycoris_cases(rows: int, columns: int) -> dict[str, tuple[State, float]]:
    """Name -> (tensors by ending, alpha). LyCORIS applies alpha / rank of loha and lokr twice: theirs is 1 here."""
    r = loras.randn
    loha = {f"hada_w{i}_{x}": r(*s, seed=3 * i) for i in (1, 2) for x, s in (("a", (rows, 4)), ("b", (4, columns)))}
    low = {"lokr_w1": r(4, 4, seed=1), "lokr_w2_a": r(rows // 4, 2, seed=2), "lokr_w2_b": r(2, columns // 4, seed=3)}
    return {
        "lora": ({"lora_up.weight": r(rows, 4, seed=1), "lora_down.weight": r(4, columns, seed=2)}, 2.0),
        "loha": (loha, 4.0),
        "lokr": ({"lokr_w1": r(2, 2, seed=1), "lokr_w2": r(rows // 2, columns // 2, seed=2)}, 1.0),
        "lokr of low rank": (low, 2.0),
        "oft": ({"oft_blocks": r(rows // 4, 4, 4, seed=1)}, 0.0),
        "boft": ({"oft_blocks": r(6, rows // 6, 6, 6, seed=1)}, 0.0),
        "full": ({"diff": r(rows, columns, seed=1)}, 1.0),
    }


@pytest.mark.parametrize("case", lycoris_cases(32, 32))
@pytest.mark.filterwarnings("ignore")
def test_lycoris_algorithms_on_a_fused_weight(rig: Rig, case: str) -> None:
    """The weight is query, key and value in one, as Black Forest Labs and ComfyUI name it: three of our parameters."""
    from lycoris.modules import get_module, make_module

    names = [f"{BLOCK}.attn.to_{x}.weight" for x in "qkv"]
    rows, columns = rig.checkpoint.spec.parameters[names[0]].shape
    tensors, alpha = lycoris_cases(3 * rows, columns)[case]
    own = weights(rig.model)
    layer = nn.Linear(columns, 3 * rows, bias=False)
    layer.weight.data = torch.cat([own[name] for name in names])
    file = {f"x.{k}": v for k, v in tensors.items()} | {"x.alpha": torch.tensor(alpha)}
    module = make_module(*get_module(file, "x"), "x", layer)
    assert module is not None
    module.eval()
    with torch.no_grad():
        module.merge_to(1.0)
    found = rig.merged({k.replace("x.", "lora_unet_double_blocks_1_img_attn_qkv.", 1): v for k, v in file.items()})
    assert changed(found, rig) == set(names)
    torch.testing.assert_close(torch.cat([found[n] for n in names]), layer.weight.data, rtol=1e-5, atol=2e-6)


def test_loha_with_an_alpha(rig: Rig) -> None:
    name = f"{BLOCK}.attn.to_out.0"
    base = weights(rig.model)[f"{name}.weight"]
    a = [loras.randn(len(base), 4, seed=i) for i in (1, 2)]
    b = [loras.randn(4, base.shape[1], seed=i) for i in (3, 4)]
    state = {f"transformer.{name}.hada_w{i + 1}_{x}": t[i] for i in (0, 1) for x, t in (("a", a), ("b", b))}
    found = rig.merged(state | {f"transformer.{name}.alpha": torch.tensor(1.0)}, 0.7)[f"{name}.weight"]
    torch.testing.assert_close(found, base + 0.7 / 4 * (a[0] @ b[0]) * (a[1] @ b[1]), rtol=1e-5, atol=2e-6)


def test_oft_with_a_bound_and_a_strength_as_comfyui_computes_them(rig: Rig) -> None:
    name = f"{BLOCK}.attn.to_out.0"
    base = weights(rig.model)[f"{name}.weight"]
    blocks = loras.randn(len(base) // 4, 4, 4, seed=1)
    q = blocks - blocks.mT
    q = q * 0.3 / q.norm()
    rotation = (torch.eye(4) + q) @ torch.linalg.inv(torch.eye(4) - q)
    turned = torch.einsum("k n m, k n c -> k m c", rotation, base.reshape(-1, 4, base.shape[1])).reshape(base.shape)
    state = {f"transformer.{name}.oft_blocks": blocks, f"transformer.{name}.alpha": torch.tensor(0.3)}
    found = rig.merged(state, 0.5)[f"{name}.weight"]
    torch.testing.assert_close(found, base + 0.25 * (turned - base), rtol=1e-4, atol=1e-5)


def test_glora_with_a_small_matrix_product(rig: Rig) -> None:
    name = f"{BLOCK}.attn.to_out.0"
    rows, columns = rig.checkpoint.spec.parameters[f"{name}.weight"].shape
    a1, a2 = loras.randn(columns, 3, seed=1), loras.randn(3, columns, seed=2)
    b1, b2 = loras.randn(rows, 3, seed=3), loras.randn(3, columns, seed=4)
    state = {f"transformer.{name}.{k}.weight": v for k, v in {"a1": a1, "a2": a2, "b1": b1, "b2": b2}.items()}
    base = weights(rig.model)[f"{name}.weight"]
    found = rig.merged(state | {f"transformer.{name}.alpha": torch.tensor(1.5)}, 0.7)[f"{name}.weight"]
    torch.testing.assert_close(found, base + 0.7 * 0.5 * (base @ a1 @ a2 + b1 @ b2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_dora_scale_as_comfyui_computes_it(rig: Rig, along: str) -> None:
    name = f"{BLOCK}.attn.to_out.0"
    base = weights(rig.model)[f"{name}.weight"]
    state = loras.peft({name: tuple(base.shape)}, prefix="diffusion_model.")
    up, down = state[f"diffusion_model.{name}.lora_B.weight"], state[f"diffusion_model.{name}.lora_A.weight"]
    changed_weight = base + up @ down
    if along == "rows":
        scale, norm = loras.randn(len(base), 1, seed=5).abs(), base.norm(dim=1, keepdim=True)
    else:
        scale, norm = loras.randn(1, base.shape[1], seed=5).abs(), changed_weight.norm(dim=0, keepdim=True)
    found = rig.merged(state | {f"diffusion_model.{name}.dora_scale": scale}, 0.5)[f"{name}.weight"]
    expected = base + 0.5 * (changed_weight * scale / norm - base)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_diff_and_set_patches_and_halves_that_lie_the_other_way_round(rig: Rig) -> None:
    """The output modulation is (shift, scale) in Black Forest Labs' naming and (scale, shift) in ours."""
    own = weights(rig.model)
    modulation, norm = own["norm_out.linear.weight"], own[f"{BLOCK}.attn.norm_q.weight"]
    diff = loras.randn(*modulation.shape, seed=1)
    state = {
        "diffusion_model.final_layer.adaLN_modulation.1.diff": diff,
        "diffusion_model.double_blocks.1.img_attn.norm.query_norm.scale.set_weight": torch.full_like(norm, 0.25),
    }
    found = rig.merged(state, 0.5)
    shift, scale = (0.5 * diff).chunk(2)
    assert torch.equal(found["norm_out.linear.weight"], modulation + torch.cat([scale, shift]))
    assert torch.equal(found[f"{BLOCK}.attn.norm_q.weight"], torch.full_like(norm, 0.25))
    assert len(changed(found, rig)) == 2


def test_patches_that_comfyui_parsed_are_the_same_lora_as_the_file(rig: Rig) -> None:
    state = fused_qkv(rig, ".lora_A.weight", ".lora_B.weight", "diffusion_model.")
    patches = []
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            tensors, alpha = from_comfy_weights("lora", (state[f"{stem}.lora_B.weight"], down, None, None, None, None))
            patches.append(NamedPatch(f"{stem}.weight", "lora", tensors, alpha))
    assert lora_from_patches(rig.checkpoint, patches, "x").id == rig.read(state).id


def test_a_part_of_a_fused_weight_is_the_parameter_that_it_is(rig: Rig) -> None:
    rows, columns = rig.checkpoint.spec.parameters[f"{BLOCK}.attn.to_k.weight"].shape
    up, down = loras.randn(rows, 4, seed=1), loras.randn(4, columns, seed=2)
    patch = NamedPatch(
        "diffusion_model.double_blocks.1.img_attn.qkv.weight", "lora", {"up": up, "down": down}, None, (0, rows, rows)
    )
    file = {f"transformer.{BLOCK}.attn.to_k.lora_B.weight": up, f"transformer.{BLOCK}.attn.to_k.lora_A.weight": down}
    assert lora_from_patches(rig.checkpoint, [patch], "x").id == rig.read(file).id


def test_a_part_of_the_columns(rig: Rig) -> None:
    own = weights(rig.model)[f"{SINGLE}.attn.to_out.weight"]
    diff = loras.randn(len(own), 5, seed=1)
    patch = NamedPatch("single_blocks.2.linear2.weight", "diff", {"diff": diff}, None, (1, 3, 5))
    expected = own.clone()
    expected[:, 3:8] += diff
    found = rig.with_lora(lora_from_patches(rig.checkpoint, [patch], "x"))
    assert torch.equal(found[f"{SINGLE}.attn.to_out.weight"], expected)


def test_what_matches_nothing_is_named(rig: Rig) -> None:
    state = loras.peft(loras.modules(rig.model, "attn.to_q"))
    extra = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2),
        "transformer.transformer_blocks.99.attn.to_q.lora_A.weight": torch.ones(2, 2),
        "something else": torch.ones(1),
    }
    assert rig.read(state | extra).unmatched == tuple(sorted(extra))


def test_a_lora_of_another_family_is_refused_with_its_keys(rig: Rig) -> None:
    state = {f"lora_unet_input_blocks_{i}_1_proj_in.lora_up.weight": torch.ones(2, 2) for i in range(7)}
    with pytest.raises(LoraUnmatched, match=r"None of the 7 keys .* klein model, for example lora_unet_input_blocks_0"):
        rig.read(state)


BROKEN: dict[str, tuple[Callable[[State], None], str]] = {
    "ranks that differ": (lambda s: s.update({_first(s, "lora_A"): torch.ones(2, 32)}), "rank or shape"),
    "a wrong width": (lambda s: s.update({_first(s, "lora_A"): torch.ones(3, 31)}), "rank or shape"),
    "one dimension": (lambda s: s.update({_first(s, "lora_A"): torch.ones(3)}), "rank or shape"),
    "half of a pair": (lambda s: s.__delitem__(_first(s, "lora_B")), "lacks up"),
    "an alpha that is no number": (
        lambda s: s.update({_first(s, "lora_A").replace("lora_A.weight", "alpha"): torch.tensor(float("nan"))}),
        "is nan",
    ),
}


def _first(state: State, part: str) -> str:
    return min(key for key in state if part in key)


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_named(rig: Rig, case: str) -> None:
    state = loras.peft(loras.modules(rig.model, "attn.to_q"))
    change, message = BROKEN[case]
    change(state)
    with pytest.raises(LoraError, match=message):
        rig.read(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_before_they_reach_the_model(rig: Rig, value: float) -> None:
    state = loras.peft(loras.modules(rig.model, "attn.to_q"))
    state[_first(state, "lora_A")][1, 2] = value
    lora, before = rig.read(state), weights(rig.model)
    patched = PatchedModel(rig.model, rig.checkpoint.spec.parameters)
    with pytest.raises(LoraError, match="not finite"):
        patched.apply([Applied(lora)])
    patched.apply(())
    assert all(torch.equal(p, before[n]) for n, p in rig.model.named_parameters())


def test_two_epochs_of_one_lora_are_two_loras_and_copies_are_one(rig: Rig) -> None:
    state = loras.peft(loras.modules(rig.model, "attn.to_q"))
    one = rig.read(state)
    assert rig.read(dict(reversed(state.items())), note="another file").id == one.id
    assert lora_of_state(state, rig.checkpoint, "memory", {}).id == one.id
    state[_first(state, "lora_B")].view(torch.int32)[0, 0] ^= 1
    other = rig.read(state)
    assert other.id != one.id and other.outline == one.outline


def test_comfyui_patches_of_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedInput, match="model_as_lora"):
        from_comfy_weights("model_as_lora", (torch.ones(1),))
    with pytest.raises(UnsupportedInput, match="shape"):
        from_comfy_weights("lora", (torch.ones(1), torch.ones(1), None, None, None, [1, 2]))
