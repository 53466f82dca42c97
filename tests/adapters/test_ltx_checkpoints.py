"""LTX-2 checkpoints: folders and single files are the same model, slim reading, and names for what cannot be used."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from safetensors.torch import load_file, save_file

from benchmarks.quantise.gguf import write_gguf
from mesh_core.builtin import installed_plugins, load_plugins
from mesh_core.errors import CheckpointCorrupt, CheckpointUnrecognised, ConfigError
from mesh_core.loras.memory import NamedPatch, lora_from_patches
from mesh_core.loras.read import read_lora
from mesh_core.model import CheckpointHeader, Piece, TensorInfo, fingerprint, read_header
from mesh_core.model.library import recognise
from mesh_core.testing import check_every_cut, check_reads_only_its_own, check_recognises_without_data
from mesh_ltx import LtxAdapter
from mesh_ltx.config import INVISIBLE
from tests.adapters import tiny_ltx
from tests.support import loras
from tests.support.splitting import checkpoint_at

ADAPTER = LtxAdapter()
GENERATIONS = ["2.0", "2.3"]
SHOWN = {
    "in_channels", "out_channels", "attention_head_dim", "cross_attention_dim", "gated_attn", "cross_attn_mod",
    "audio_in_channels", "audio_out_channels", "audio_attention_head_dim", "audio_cross_attention_dim",
    "audio_gated_attn", "audio_cross_attn_mod", "num_layers", "norm_elementwise_affine", "caption_channels",
    "attention_bias", "attention_out_bias", "use_prompt_embeddings", "ff_bias", "audio_ff_bias",
    "use_prompt_adaln_single", "use_keyframes_abs_pos_embedding",
}  # fmt: skip
"""Arguments of LTX-2's class that the names and shapes of parameters show, once the numbers of heads are known."""

CHECKED = {"qk_norm", "perturbed_attn"}
"""Arguments that are no part of the identity: the class takes one value of the first, and without the second a stage
refuses to perturb, the only thing that it changes."""


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_single_file_is_the_same_model(generation: Any, prefix: str, tmp_path: Path) -> None:
    model = tiny_ltx.transformer(generation)
    file = tmp_path / "model.safetensors"
    tiny_ltx.save_single_file(model, file, prefix)
    model.save_pretrained(tmp_path / "folder")
    single, folder = (ADAPTER.recognise(read_header(p)) for p in (file, tmp_path / "folder"))
    assert single is not None and folder is not None
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in single.config.items()}
    assert config == dict(folder.config)
    assert fingerprint.structure(single) == fingerprint.structure(folder)
    assert fingerprint.of_checkpoint(read_header(file), single) == fingerprint.of_model(folder, model)
    check_every_cut(ADAPTER, read_header(file), model, tiny_ltx.image_to_video(tiny_ltx.inputs(generation)))


@pytest.mark.parametrize("layout", ["sharded folder", "single file"])
def test_stages_read_only_their_own_tensors(layout: str, tmp_path: Path) -> None:
    model = tiny_ltx.transformer("2.3")
    path = tmp_path / "model.safetensors"
    if layout == "single file":
        tiny_ltx.save_single_file(model, path)
    else:
        path = tmp_path / "folder"
        model.save_pretrained(path, max_shard_size="200KB")
        assert len(list(path.glob("*.safetensors"))) > 1
    check_reads_only_its_own(ADAPTER, read_header(path))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    check_recognises_without_data(ADAPTER, path, scratch)


def test_every_argument_of_the_class_is_shown_or_invisible_or_checked() -> None:
    given = set(inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters) - {"self"}
    assert given == SHOWN | set(INVISIBLE) | CHECKED
    assert len(given) == len(SHOWN) + len(INVISIBLE) + len(CHECKED)


def test_what_no_weight_shows_is_part_of_the_identity(tmp_path: Path) -> None:
    """Two copies of the same weights that would compute different videos are different models."""
    structures = []
    for number, changes in enumerate(({}, {"rope_theta": 5000.0}, {"rope_double_precision": False})):
        tiny_ltx.transformer("2.3", **changes).save_pretrained(tmp_path / str(number))
        spec = ADAPTER.recognise(read_header(tmp_path / str(number)))
        assert spec is not None
        structures.append(fingerprint.structure(spec))
    assert len(set(structures)) == 3


@pytest.mark.parametrize("generation", GENERATIONS)
def test_variants_and_defaults(generation: Any, tmp_path: Path) -> None:
    tiny_ltx.transformer(generation).save_pretrained(tmp_path)
    spec = ADAPTER.recognise(read_header(tmp_path))
    assert spec is not None
    assert spec.variant == f"custom ltx-{generation}, 3 blocks, width 32+16"
    assert spec.defaults == {"use_cross_timestep": generation == "2.3", "spatio_temporal_guidance_blocks": [2]}
    assert set(spec.parameters_of(spec.span(":"))) == set(spec.parameters)


def older_video_model(folder: Path) -> None:
    """The architecture of LTX-Video 0.9, saved by diffusers."""
    LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    ).save_pretrained(folder)


def test_ltx_video_is_named_as_what_it_is(tmp_path: Path) -> None:
    older_video_model(tmp_path / "folder")
    tensors = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    renamed = {
        "model.diffusion_model." + n.replace("proj_in.", "patchify_proj.").replace("time_embed.", "adaln_single."): t
        for n, t in tensors.items()
    }
    save_file(renamed, tmp_path / "single.safetensors")
    for path in (tmp_path / "folder", tmp_path / "single.safetensors"):
        with pytest.raises(CheckpointUnrecognised, match="video-only") as caught:
            recognise(read_header(path), installed_plugins())
        assert "no audio" in str(caught.value) and "LTX-2" in caught.value.hint


def test_the_video_half_of_an_ltx_2_is_named(tmp_path: Path) -> None:
    model = tiny_ltx.transformer("2.3")
    video = {n: t for n, t in tiny_ltx.to_original(model).items() if "audio" not in n and "av_ca" not in n}
    save_file(video, tmp_path / "video.safetensors", {"config": json.dumps({"transformer": {}})})
    with pytest.raises(CheckpointUnrecognised, match="video-only"):
        ADAPTER.recognise(read_header(tmp_path / "video.safetensors"))


@pytest.mark.parametrize(
    ("metadata", "error", "match"),
    [
        (None, CheckpointUnrecognised, "does not say its dimensions"),
        ("{", CheckpointCorrupt, "damaged"),
        ('{"transformer": 3}', CheckpointCorrupt, "describes no transformer"),
        ('{"vae": {}}', CheckpointCorrupt, "damaged"),
        ('{"transformer": {"num_layers": "many"}}', CheckpointCorrupt, "num_layers"),
        ('{"transformer": {"positional_embedding_max_pos": 20}}', CheckpointCorrupt, "positions"),
        ('{"transformer": {"use_middle_indices_grid": false}}', CheckpointUnrecognised, "use_middle_indices_grid"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(metadata: str | None, error: Any, match: str, tmp_path: Path) -> None:
    tensors = {n: t.contiguous() for n, t in tiny_ltx.to_original(tiny_ltx.transformer("2.3")).items()}
    save_file(tensors, tmp_path / "m.safetensors", {"config": metadata} if metadata else None)
    with pytest.raises(error, match=match):
        ADAPTER.recognise(read_header(tmp_path / "m.safetensors"))


def published(generation: Any, prefix: str = "", **changes: Any) -> CheckpointHeader:
    """The names and shapes of a single file in the published size, without metadata."""
    newer = generation == "2.3"
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(
            gated_attn=newer,
            audio_gated_attn=newer,
            cross_attn_mod=newer,
            audio_cross_attn_mod=newer,
            use_prompt_embeddings=not newer,
            rope_type="split",
            perturbed_attn=True,
            **changes,
        )
    tensors = {}
    for name, tensor in tiny_ltx.to_original(model).items():
        tensors[prefix + name] = TensorInfo(prefix + name, "BF16", tuple(tensor.shape), Path("x"), 0, tensor.nbytes)
    return CheckpointHeader(Path("x.gguf"), tensors)


@pytest.mark.parametrize(("generation", "prefix"), [("2.0", ""), ("2.3", "model.diffusion_model.")])
def test_a_published_model_without_its_metadata_is_known_by_its_shapes(generation: Any, prefix: str) -> None:
    spec = ADAPTER.recognise(published(generation, prefix))
    assert spec is not None and generation in spec.variant and "custom" not in spec.variant
    said = {"rope_type": "split", "rope_double_precision": True, "cross_attn_timestep_scale_multiplier": 1000}
    said |= {"num_attention_heads": 32, "timestep_scale_multiplier": 1000, "rope_theta": 10000.0, "num_layers": 48}
    assert {name: spec.config[name] for name in said} == said
    assert spec.config["gated_attn"] == (generation == "2.3") != spec.config["use_prompt_embeddings"]


@pytest.mark.parametrize(
    ("generation", "changes"),
    [
        ("2.3", {"num_layers": 47}),
        ("2.3", {"num_layers": 49}),
        ("2.3", {"ff_bias": False}),
        ("2.3", {"use_keyframes_abs_pos_embedding": True}),
        ("2.3", {"use_prompt_adaln_single": False}),
        ("2.3", {"num_attention_heads": 64, "attention_head_dim": 64}),
        ("2.0", {"caption_channels": 4096}),
        ("2.0", {"in_channels": 64}),
    ],
    ids=str,
)
def test_of_another_model_nothing_is_guessed(generation: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointUnrecognised, match="does not say its dimensions"):
        ADAPTER.recognise(published(generation, **changes))


def test_a_version_of_another_generation_is_believed() -> None:
    newer = replace(published("2.3"), metadata={"model_version": "2.5.0"})
    with pytest.raises(CheckpointUnrecognised, match="none of the published ones"):
        ADAPTER.recognise(newer)


def test_a_gguf_file_says_its_dimensions_as_the_published_files_do(tmp_path: Path) -> None:
    model = tiny_ltx.transformer("2.3")
    words = json.dumps({"transformer": tiny_ltx.original_config(model)})
    write_gguf(tmp_path / "m.gguf", tiny_ltx.to_original(model), "Q8_0", "ltxv", metadata={"config": words})
    tiny_ltx.save_single_file(model, tmp_path / "m.safetensors")
    packed, plain = (recognise(read_header(tmp_path / f"m.{x}"), installed_plugins()) for x in ("gguf", "safetensors"))
    assert packed.spec.config == plain.spec.config and packed.spec.family == "ltx"
    assert "gguf/Q8_0" in packed.spec.dtypes


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    model = tiny_ltx.transformer("2.3")
    tiny_ltx.save_single_file(model, file)
    tensors = load_file(file)
    del tensors["transformer_blocks.1.audio_attn1.q_norm.weight"]
    save_file(tensors, file, {"config": json.dumps({"transformer": tiny_ltx.original_config(model)})})
    with pytest.raises(CheckpointCorrupt, match=r"transformer_blocks\.1\.audio_attn1\.q_norm\.weight"):
        ADAPTER.recognise(read_header(file))


@pytest.mark.parametrize(
    ("call", "hint"),
    [({"num_frames": 50}, "49 or 57"), ({"num_frames": 0}, "1 or 9"), ({"width": 500}, "512"), ({"height": 16}, "32")],
)
def test_sizes_that_the_model_does_not_make_are_refused(call: dict[str, int], hint: str, tmp_path: Path) -> None:
    tiny_ltx.transformer("2.0").save_pretrained(tmp_path)
    header = read_header(tmp_path)
    spec = ADAPTER.recognise(header)
    assert spec is not None
    ADAPTER.check_call(spec, header, {"num_frames": 121, "width": 768, "height": 512, "num_inference_steps": 3})
    with pytest.raises(ConfigError) as caught:
        ADAPTER.check_call(spec, header, call)
    assert caught.value.hint == hint


def test_loras_in_the_naming_of_lightricks_find_their_parameters(tmp_path: Path) -> None:
    model = tiny_ltx.transformer("2.3")
    model.save_pretrained(tmp_path)
    spec = ADAPTER.recognise(read_header(tmp_path))
    assert spec is not None
    (layout,) = ADAPTER.layouts(spec)
    assert layout["audio_prompt_adaln.linear.weight"] == (Piece("audio_prompt_adaln_single.linear.weight"),)
    assert layout.keys() == spec.parameters.keys()
    assert {pieces[0].tensor for pieces in layout.values()} == tiny_ltx.to_original(model).keys()


def test_a_lora_is_the_same_in_every_naming_and_for_every_layout_of_the_model(tmp_path: Path) -> None:
    model = tiny_ltx.transformer("2.3")
    model.save_pretrained(tmp_path / "folder")
    tiny_ltx.save_single_file(model, tmp_path / "model.safetensors", "model.diffusion_model.")
    ours = loras.peft(loras.modules(model), prefix="")
    kohya, patches = {}, []
    for module in loras.modules(model):
        theirs = tiny_ltx.original_name(f"{module}.weight")
        down, up = (ours[f"{module}.lora_{x}.weight"] for x in "AB")
        stem = f"lora_unet_{theirs.removesuffix('.weight').replace('.', '_')}"
        kohya |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        patches.append(NamedPatch(f"diffusion_model.{theirs}", "lora", {"down": down, "up": up}))
    comfyui = {f"diffusion_model.{tiny_ltx.original_name(k)}": v for k, v in ours.items()}
    files = [{f"transformer.{k}": v for k, v in ours.items()}, comfyui, kohya]
    ids = set()
    for name in ("folder", "model.safetensors"):
        checkpoint = checkpoint_at(tmp_path / name, load_plugins())
        for number, state in enumerate(files):
            lora = read_lora(loras.save(tmp_path / f"{number}.safetensors", state), checkpoint)
            assert len(lora.patches) == len(ours) // 2 and not lora.unmatched
            ids.add(lora.id)
        ids.add(lora_from_patches(checkpoint, patches, "parsed by ComfyUI").id)
    assert len(ids) == 1


def test_quantised_weights_are_refused_by_type(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    model = tiny_ltx.transformer("2.3")
    tiny_ltx.save_single_file(model, file)
    tensors = load_file(file)
    name = "transformer_blocks.0.ff.net.2.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, {"config": json.dumps({"transformer": tiny_ltx.original_config(model)})})
    with pytest.raises(CheckpointUnrecognised, match="F8_E4M3"):
        ADAPTER.recognise(read_header(file))
