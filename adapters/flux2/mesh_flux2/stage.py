"""The FLUX.2 transformer between two cuts: the glue between diffusers' own blocks.

Follows ``Flux2Transformer2DModel.forward`` of diffusers 0.42 operation by operation, so that stages composed over
any cuts give the same bits. B: batch, S: image tokens (reference images included), T: text tokens, D: width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mesh_core.model import Conditioning, Stage, State
from mesh_core.model.adapting import restore_strides


class Flux2Stage(Stage):
    """A span of FLUX.2 blocks. State at a cut:

    - at 0: ``hidden_states`` latents [B, S, C], ``timestep`` [B], with guidance also ``guidance`` [B];
    - before the last double block is done: ``hidden_states`` [B, S, D], ``encoder_hidden_states`` [B, T, D],
      ``temb`` [B, D];
    - after it: ``hidden_states`` [B, T + S, D], ``temb`` [B, D];
    - at N: ``sample`` [B, S, C_out].

    Constants: ``img_ids`` [S, 4], ``txt_ids`` [T, 4], and for block 0 ``encoder_hidden_states`` [B, T, J].
    """

    def block_modules(self) -> Iterator[nn.Module]:
        doubles: Any = self.model.transformer_blocks
        singles: Any = self.model.single_transformer_blocks
        for index in range(self.span.start, self.span.stop):
            yield doubles[index] if index < len(doubles) else singles[index - len(doubles)]

    def forward(self, state: State, conditioning: Conditioning) -> State:
        if not len(self.span):
            return state
        model: Any = self.model
        start, stop, doubles = self.span.start, self.span.stop, len(model.transformer_blocks)
        constants = conditioning.constants
        if start == 0:
            latents = restore_strides(state["hidden_states"], "hidden_states", conditioning.options)
            hidden, text, temb = self._enter(latents, state, constants["encoder_hidden_states"])
        else:
            hidden, text, temb = state["hidden_states"], state.get("encoder_hidden_states"), state["temb"]
        rotary = self._rotary(constants["txt_ids"], constants["img_ids"])

        if start < doubles:
            img_mod = model.double_stream_modulation_img(temb)
            txt_mod = model.double_stream_modulation_txt(temb)
            for block in model.transformer_blocks[start : min(stop, doubles)]:
                text, hidden = block(
                    hidden_states=hidden,
                    encoder_hidden_states=text,
                    temb_mod_img=img_mod,
                    temb_mod_txt=txt_mod,
                    image_rotary_emb=rotary,
                )
            if stop < doubles:
                assert text is not None
                return {"hidden_states": hidden, "encoder_hidden_states": text, "temb": temb}
        if text is not None:
            hidden = torch.cat([text, hidden], dim=1)  # [B, T + S, D]

        if stop > doubles:
            modulation = model.single_stream_modulation(temb)
            for block in model.single_transformer_blocks[max(start - doubles, 0) : stop - doubles]:
                hidden = block(
                    hidden_states=hidden, encoder_hidden_states=None, temb_mod=modulation, image_rotary_emb=rotary
                )
        if stop < self.spec.blocks:
            return {"hidden_states": hidden, "temb": temb}
        hidden = hidden[:, constants["txt_ids"].shape[0] :, ...]
        return {"sample": model.proj_out(model.norm_out(hidden, temb))}

    def _enter(self, latents: Tensor, state: State, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = self.model
        timestep = state["timestep"].to(latents.dtype) * 1000
        guidance = state.get("guidance")
        if guidance is not None:
            guidance = guidance.to(latents.dtype) * 1000
        temb = model.time_guidance_embed(timestep, guidance)
        return model.x_embedder(latents), model.context_embedder(text), temb

    def _rotary(self, txt_ids: Tensor, img_ids: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        image = model.pos_embed(img_ids)
        text = model.pos_embed(txt_ids)
        return torch.cat([text[0], image[0]], dim=0), torch.cat([text[1], image[1]], dim=0)
