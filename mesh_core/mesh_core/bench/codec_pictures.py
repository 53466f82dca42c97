"""What a codec at a cut does to the final pictures of a trained model, and what it costs. All in this process.

The transformer runs as two stages with the codec between them, as it would between two machines, but for the socket.
Prompts run as one batch; at the cut each picture's state goes through streams of its own, as if it ran alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from mesh_codec import Codec, Encoded
from mesh_core.bench.codec_settings import CodecSetting
from mesh_core.errors import PlanError
from mesh_core.host.runner import SplitRunner
from mesh_core.model.library import recognise
from mesh_core.model.numerics import Numerics
from mesh_core.model.plan import Plan, make
from mesh_core.model.spans import BlockSpan
from mesh_core.plugins.registry import Plugins
from mesh_core.programs.pipeline_folder import pipeline_header
from mesh_core.programs.split_model import attach

STEPS = (4, 8, 28)
PROMPTS = (
    *("crying face", "robot", "clown face", "red heart", "mermaid", "fox", "panda", "octopus", "butterfly", "rose"),
    *("pizza", "castle", "volcano", "rainbow", "bicycle", "rocket", "guitar", "umbrella", "key", "snail", "cactus"),
    *("fox on a purple background", "house on a black background", "skull", "penguin", "mushroom", "banana", "sun"),
)
_CEILING = 1e-10
"""Mean squared error that counts as none: 100 dB."""


@dataclass(frozen=True)
class PictureQuality:
    """One setting at one number of steps. ``bits``: per element of the hidden state, all steps, headers included."""

    family: str
    label: str
    steps: int
    bits: float
    psnr_min: float
    psnr_mean: float


@dataclass
class _Cut:
    """Takes the place of a `SplitRunner`: two stages of one model, and what ``cross`` does between them."""

    checkpoint: Any
    plan: Plan
    first: Any
    second: Any
    hidden: list[str]
    session: None = None
    cross: Callable[[int, str, Tensor], Tensor] | None = None

    def __call__(self, inputs: dict[str, Any], sequence: str = "", options: object = None) -> Any:
        adapter, spec = self.checkpoint.adapter, self.checkpoint.spec
        state, conditioning = adapter.begin(spec, inputs)
        state = self.first(state, conditioning)
        if self.cross is not None:
            state = {n: self._crossed(n, t) if n in self.hidden else t for n, t in state.items()}
        return adapter.finish(spec, self.second(state, conditioning))

    def _crossed(self, name: str, batch: Tensor) -> Tensor:
        assert self.cross is not None
        return torch.stack([self.cross(i, name, tensor) for i, tensor in enumerate(batch)])


@dataclass
class _Streams:
    """The two ends of every picture's streams for one setting."""

    codec: Codec
    setting: CodecSetting
    ends: dict[tuple[int, str], Any] = field(default_factory=dict)
    sent: int = 0
    elements: int = 0

    def __call__(self, picture: int, name: str, tensor: Tensor) -> Tensor:
        key = picture, name
        if key not in self.ends:
            self.ends[key] = self.codec.encoder(self.setting.settings), self.codec.decoder(self.setting.settings)
        encoder, decoder = self.ends[key]
        # A state crosses in bfloat16, whatever the model computes in here.
        coded = encoder.encode(tensor[None].bfloat16())
        header = msgspec.msgpack.decode(packed := msgspec.msgpack.encode(coded.header))
        self.sent += len(packed) + coded.nbytes
        self.elements += tensor.numel()
        back: Tensor = decoder.decode(Encoded(header, [memoryview(bytes(b)) for b in coded.buffers]))
        return back[0].to(tensor.dtype)


class Pictures:
    """A pipeline and some prompts for it.

    Args:
        model: a pipeline's folder.
        cut: block before which the state crosses; None for the middle.
        text_tokens: that a prompt is padded to. Few, so that the picture's tokens have a say in the bits.
        size: height and width in pixels.
    """

    def __init__(
        self, model: Path, plugins: Plugins, prompts: int, cut: int | None, text_tokens: int, size: int
    ) -> None:
        from diffusers import DiffusionPipeline

        checkpoint = recognise(pipeline_header(model), plugins)
        spec = checkpoint.spec
        at = cut if cut is not None else spec.blocks // 2
        if not 0 < at < spec.blocks:
            raise PlanError(f"There is no cut before block {at} of {spec.blocks}.", hint=f"--cut {spec.blocks // 2}")
        self.pipeline = DiffusionPipeline.from_pretrained(str(model))
        self.pipeline.set_progress_bar_config(disable=True)
        transformer = self.pipeline.transformer
        hidden = [name for name, role in spec.states[at].items() if role == "hidden"]
        before, after = (
            checkpoint.adapter.stage(spec, span, transformer) for span in (BlockSpan(0, at), BlockSpan(at, spec.blocks))
        )
        self.cut = _Cut(checkpoint, make(spec, ":", []), before, after, hidden)
        attach(transformer, cast(SplitRunner, self.cut), torch.device("cpu"), Numerics(transformer.dtype))
        self.size, self.prompts = size, PROMPTS[:prompts]
        with torch.no_grad():
            self.text, *_ = self.pipeline.encode_prompt(prompt=list(self.prompts), max_sequence_length=text_tokens)
        self.expected: dict[int, Tensor] = {}

    def measure(self, setting: CodecSetting, steps: int) -> PictureQuality:
        """The pictures of so many ``steps`` with the state coded, beside those without.

        Raises:
            ImportError: the codec needs a package that is not installed.
        """
        if steps not in self.expected:
            self.expected[steps] = self.draw(steps, None)
        streams = _Streams(setting.codec(), setting)
        errors = (self.draw(steps, streams) - self.expected[steps]).square().mean(dim=(1, 2, 3)).clamp_min(_CEILING)
        psnr = -10 * torch.log10(errors)
        bits = streams.sent * 8 / streams.elements
        return PictureQuality(setting.family, setting.label, steps, bits, float(psnr.min()), float(psnr.mean()))

    def measure_all(self, settings: Sequence[CodecSetting], all_steps: Sequence[int]) -> Iterator[PictureQuality]:
        """Each setting at each number of steps, as they are measured."""
        for setting in settings:
            for steps in all_steps:
                yield self.measure(setting, steps)

    def draw(self, steps: int, cross: Callable[[int, str, Tensor], Tensor] | None) -> Tensor:
        """Pictures [prompts, 3, height, width] in [0, 1], of 8 bits; ``cross`` is given each picture's state."""
        self.cut.cross = cross
        noise = [torch.Generator().manual_seed(i) for i in range(len(self.prompts))]
        with torch.no_grad():
            made: Tensor = self.pipeline(
                prompt_embeds=self.text,
                height=self.size,
                width=self.size,
                num_inference_steps=steps,
                guidance_scale=1.0,
                generator=noise,
                output_type="pt",
            ).images
        return (made.clamp(0, 1) * 255).round() / 255
