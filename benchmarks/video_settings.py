"""What settings of the hevc codec cost in bits and in the picture, beside the entropy codec and the common min/max way.

    python -m benchmarks.video_settings --save benchmarks/results

tiny-klein draws each prompt uncoded, then with its hidden state coded and decoded at one cut, at 4, 8 and 28 steps.
The cut is late, before the last single block but one, where an error shows most. Bits are of all payload bytes, per
element; PSNR is of the final picture against the uncoded one, minimum and mean over the prompts. ``minmax`` is
per-channel min/max uint8 in mosaics of 8 x 8, an IDR picture and predicted ones for each tensor: see
`benchmarks.minmax_codec`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.minmax_codec import QPS, MinMaxCodec
from mesh_codec import Codec, EntropyCodec, HevcCodec
from mesh_codec.entropy import FORMAT
from mesh_codec.hevc.settings import DEFAULTS
from mesh_codec.qualities import lossy
from mesh_core.bench.report import save

MODEL = Path(__file__).parents[1] / "examples" / "tiny-klein" / "model"
PROMPTS = ("crying face", "fox on a purple background", "flag: japan", "woman cook", "rocket", "red heart")
SIZE, TEXT_TOKENS = 128, 64
CUT = 6
"""Of the eight single blocks, the first one that is coded for."""


@dataclass(frozen=True)
class Row:
    codec: str
    settings: Mapping[str, Any]
    steps: int
    bits: float
    psnr_min: float
    psnr_mean: float


class Studio:
    """Draws prompts with tiny-klein, its state as ``coding`` leaves it."""

    def __init__(self, prompts: int, cut: int = CUT) -> None:
        from diffusers import Flux2KleinPipeline

        self._pipeline = Flux2KleinPipeline.from_pretrained(MODEL, is_distilled=True)
        self._pipeline.set_progress_bar_config(disable=True)
        self.prompts = PROMPTS[:prompts]
        self._texts = {p: self._pipeline.encode_prompt(p, max_sequence_length=TEXT_TOKENS)[0] for p in self.prompts}
        self._uncoded: dict[tuple[str, int], Tensor] = {}
        self._stream: Any = None
        block = self._pipeline.transformer.single_transformer_blocks[cut]
        block.register_forward_pre_hook(self._hook, with_kwargs=True)

    def measure(self, codec: Codec, settings: Mapping[str, Any], steps: int) -> Row:
        found = []
        bits = elements = 0
        for prompt in self.prompts:
            if (prompt, steps) not in self._uncoded:
                self._uncoded[prompt, steps] = self._draw(prompt, steps)
            encoder, decoder = codec.encoder(settings), codec.decoder(settings)

            def through(state: Tensor, encoder: Any = encoder, decoder: Any = decoder) -> Tensor:
                nonlocal bits, elements
                coded = encoder.encode(state.bfloat16())
                bits, elements = bits + 8 * coded.nbytes, elements + state.numel()
                return decoder.decode(coded).to(state.dtype)

            self._stream = through
            error = (self._draw(prompt, steps) - self._uncoded[prompt, steps]).square().mean()
            self._stream = None
            found.append(float(-10 * torch.log10(error.clamp(min=1e-10))))
        return Row(codec.name, dict(settings), steps, bits / elements, min(found), sum(found) / len(found))

    def _draw(self, prompt: str, steps: int) -> Tensor:
        image = self._pipeline(
            prompt_embeds=self._texts[prompt], generator=torch.Generator().manual_seed(0), height=SIZE, width=SIZE,
            num_inference_steps=steps, guidance_scale=1.0, output_type="np",
        ).images[0]  # fmt: skip
        return torch.from_numpy(image)

    def _hook(self, block: Any, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._stream is None:
            return None
        return positional, {**named, "hidden_states": self._stream(named["hidden_states"])}


def cases() -> Iterator[tuple[Codec, dict[str, Any]]]:
    hevc, entropy = HevcCodec(), EntropyCodec()
    for quality in lossy():
        yield hevc, hevc.settings(quality, hevc.capabilities())
    for qp in QPS:
        yield MinMaxCodec(), {"qp": qp}
    for quality in ("transparent", "balanced"):
        chosen = hevc.settings(quality, hevc.capabilities())
        yield hevc, {**chosen, "temporal": False}
        yield hevc, {**chosen, "bits": 8}
    for quality in lossy():
        yield entropy, entropy.settings(quality, {"formats": [FORMAT]})
    yield hevc, {"lossless": True, "bits": 8}


def table(rows: list[Row], steps: list[int]) -> str:
    head = "| codec | settings | " + " | ".join(f"{n} steps: bits | dB min | dB mean" for n in steps) + " |"
    lines = [head, "|" + "---|" * (2 + 3 * len(steps))]
    for start in range(0, len(rows), len(steps)):
        group = rows[start : start + len(steps)]
        cells = [f"{row.bits:.2f} | {row.psnr_min:.1f} | {row.psnr_mean:.1f}" for row in group]
        told = {
            key: value
            for key, value in group[0].settings.items()
            if key in ("qp", "step") or value != DEFAULTS.get(key)
        }
        settings = ", ".join(f"{key} {value}" for key, value in told.items())
        lines.append(f"| {group[0].codec} | {settings} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="4,8,28", help="numbers of steps, with commas")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many")
    parser.add_argument("--cut", type=int, default=CUT, help="the single block before which the state is coded")
    parser.add_argument("--label", default="", help="what the saved results call this machine")
    parser.add_argument("--save", type=Path, default=None, help="folder for a .md and a .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = [int(n) for n in options.steps.split(",")]
    studio, rows = Studio(options.prompts, options.cut), []
    for codec, settings in cases():
        for number in steps:
            rows.append(studio.measure(codec, settings, number))
            print(rows[-1], file=sys.stderr, flush=True)
    text = table(rows, steps)
    print(text)
    if options.save:
        facts = {"prompts": studio.prompts, "cut": options.cut, "results": [asdict(row) for row in rows]}
        for path in save(options.save, "video-settings", options.label, facts, text):
            print(f"saved {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
