"""Qualities are one table: a row more is offered and obeyed everywhere, and what pages say of them is true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_codec import CodecUnsupported, EntropyCodec, HevcCodec, LosslessCodec, RawCodec, qualities
from mesh_codec.qualities import EXACT, FINE, QUALITIES, TYPICAL, QualityLevel, find, finer_of, names, promises

ROOT = Path(__file__).parents[2]

WITH_ONE_MORE = """
import json, sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

from mesh_codec import qualities

qualities.QUALITIES += (qualities.QualityLevel("draft", "a first look", psnr=25.0, step=0.65),)

from mesh_codec import EntropyCodec, HevcCodec, LosslessCodec, RawCodec
from mesh_codec.hevc.settings import settings_for
from mesh_core.builtin.codec_choice import DefaultCodecChoice
from mesh_core.cli.generate import generate

# As much of ComfyUI as the schema of a node needs.
comfy, latest = ModuleType("comfy_api"), MagicMock()
latest.io.ComfyNode, latest.io.Schema = object, lambda **fields: fields
latest.io.Combo.Input = lambda name, **fields: {"name": name, **fields}
sys.modules |= {"comfy_api": comfy, "comfy_api.latest": latest}
from comfy_integration.nodes import MeshSplit

node = next(i for i in MeshSplit.define_schema()["inputs"] if isinstance(i, dict) and i["name"] == "quality")
entropy, raw, lossless = EntropyCodec(), RawCodec(), LosslessCodec()
codecs = [raw, lossless, entropy]
peer = {codec.name: codec.capabilities() for codec in codecs}

class Crossing:
    current = None

    def cost(self, codec, settings):
        seconds = {"raw": 3.0, "lossless": 2.0, "entropy": 1.0}[codec.name]
        return SimpleNamespace(total=seconds, exact=codec is not entropy, label=codec.name, bits=1.0)

def chosen(role, quality):
    choice = DefaultCodecChoice().mesh_choose_codec(role, None, quality, codecs, peer, Crossing())
    return choice.codec, choice.settings.get("step")

print(json.dumps({
    "cli": list(next(p for p in generate.params if p.name == "quality").type.choices),
    "node": list(node["options"]),
    "tooltip": node["tooltip"],
    "entropy": entropy.settings("draft", entropy.capabilities()),
    "hevc": settings_for(qualities.find("draft")),
    "exact": [raw.settings("draft", {}), lossless.settings("draft", lossless.capabilities())],
    "hidden": chosen("hidden", "draft"),
    "fine": chosen("fine", "draft"),
    "lossless": chosen("hidden", "lossless"),
}))
"""


def test_a_row_more_is_a_quality_more_everywhere():
    done = subprocess.run(
        [sys.executable, "-c", WITH_ONE_MORE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cli"] == found["node"] == [*names(), "draft"]
    assert found["tooltip"].endswith(f"{promises()} draft: a first look.")
    assert found["entropy"]["step"] == 0.65 and found["hevc"] == {"qp": 16, "bits": 8}
    assert found["exact"] == [{}, {}]
    assert found["hidden"] == ["entropy", 0.65]
    # What has few bytes is not coded coarser, and what has to be exact stays so.
    assert found["fine"] == ["entropy", find(FINE).step]
    assert found["lossless"] == ["lossless", None]


def test_the_table_goes_from_exact_to_coarse():
    assert QUALITIES[0].name == EXACT and QUALITIES[0].exact and not QUALITIES[0].step
    coarse = QUALITIES[1:]
    assert all(not level.exact for level in coarse)
    assert [level.psnr for level in coarse] == sorted((level.psnr or 0 for level in coarse), reverse=True)
    assert [level.step for level in coarse] == sorted(level.step for level in coarse) and coarse[0].step > 0
    assert len(set(names())) == len(QUALITIES)
    assert {FINE, TYPICAL} <= set(qualities.lossy())
    assert finer_of("fast", "transparent") == finer_of("transparent", "fast") == "transparent"


def test_settings_of_each_quality_are_those_that_both_ends_have_always_had():
    entropy, hevc = EntropyCodec(), HevcCodec()
    peer = {"formats": ["step-zstd-2"]}
    found = [entropy.settings(level.name, peer)["step"] for level in QUALITIES[1:4]]
    assert found == [0.1, 0.2, 0.36]
    agreed = [hevc.settings(level.name, hevc.capabilities()) for level in QUALITIES[1:4]]
    assert [(s["qp"], s["bits"]) for s in agreed] == [(1, 10), (6, 10), (11, 8)]


@pytest.mark.parametrize("codec", [RawCodec(), LosslessCodec(), EntropyCodec(), HevcCodec()], ids=lambda c: c.name)
def test_a_name_that_the_table_does_not_have_is_refused(codec):
    with pytest.raises(CodecUnsupported, match=r"no quality 'ultra'.*lossless, transparent, balanced, fast"):
        codec.settings("ultra", codec.capabilities())


def test_an_exact_row_more_is_for_exact_codecs_only(monkeypatch):
    monkeypatch.setattr(qualities, "QUALITIES", (*QUALITIES, QualityLevel("archive", "the same bits, for ever")))
    assert RawCodec().settings("archive", {}) == {}
    for codec in (EntropyCodec(), HevcCodec()):
        with pytest.raises(CodecUnsupported, match="archive"):
            codec.settings("archive", codec.capabilities())


def test_the_pages_name_every_quality_and_its_promise():
    page = (ROOT / "docs" / "how-to" / "choose-quality.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)`(?: \(default\))? \| [^|]* \| ([^|]*) \|$", page, re.MULTILINE))
    assert list(rows) == list(names())
    for level in QUALITIES:
        assert level.exact or f"{level.psnr:g} dB" in rows[level.name], level.name
    node = (ROOT / "comfy_integration" / "web" / "docs" / "MeshSplit.md").read_text("utf-8")
    assert ", ".join(f"`{name}`" for name in names()) in node
    numerics = (ROOT / "docs" / "explanation" / "numerics.md").read_text("utf-8")
    assert all(f"| `{level.name}`: " in numerics for level in QUALITIES if not level.exact)


def test_qualities_are_listed_without_loading_torch():
    code = "import sys, mesh_codec.qualities; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
