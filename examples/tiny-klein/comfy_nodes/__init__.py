"""Two ComfyUI nodes for tiny-klein: its text encoder and its autoencoder.

ComfyUI's own loaders expect Klein's full-size parts. The transformer needs no node: UNETLoader
takes the file that `train/single_file.py` writes. Copy or link this folder into `custom_nodes`;
it needs the diffusers package beside ComfyUI's own requirements. It must not import ComfyUI.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

MODEL = Path(__file__).resolve().parent.parent / "model"
TEXT_TOKENS = 512  # what Flux2KleinPipeline pads to


@lru_cache(maxsize=2)
def text_parts(folder: str) -> tuple[Any, Any]:
    """The text encoder and tokenizer of a pipeline directory."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    place = Path(folder or MODEL)
    encoder = Qwen3ForCausalLM.from_pretrained(place / "text_encoder").float().eval()
    return encoder, AutoTokenizer.from_pretrained(place / "tokenizer")


@lru_cache(maxsize=2)
def autoencoder(folder: str) -> Any:
    """The autoencoder of a pipeline directory, in float32."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2.from_pretrained(Path(folder or MODEL) / "vae").float().eval()


class TinyKleinTextEncode:
    """A prompt to CONDITIONING, `[1, 512, 192]`."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "tiny-klein"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text": ("STRING", {"multiline": True, "tooltip": "The name of an emoji, for instance: crying face"}),
                "model_folder": ("STRING", {"default": "", "tooltip": "Empty: the model beside this folder"}),
            }
        }

    @torch.inference_mode()
    def encode(self, text: str, model_folder: str) -> tuple[list[Any]]:
        from diffusers import Flux2KleinPipeline

        encoder, tokenizer = text_parts(model_folder)
        embedding = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            encoder, tokenizer, text, max_sequence_length=TEXT_TOKENS
        )
        return ([[embedding.cpu(), {"pooled_output": None}]],)


class TinyKleinDecode:
    """LATENT `[b, 128, h/16, w/16]` to IMAGE `[b, h, w, 3]` in [0, 1]."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "tiny-klein"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "From a sampler that ran the tiny-klein transformer"}),
                "model_folder": ("STRING", {"default": "", "tooltip": "Empty: the model beside this folder"}),
            }
        }

    @torch.inference_mode()
    def decode(self, samples: dict[str, torch.Tensor], model_folder: str) -> tuple[torch.Tensor]:
        from diffusers import Flux2KleinPipeline

        vae = autoencoder(model_folder)
        latents = samples["samples"].float().cpu()
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        pictures = vae.decode(Flux2KleinPipeline._unpatchify_latents(latents * std + mean)).sample
        return (((pictures + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).contiguous(),)


NODE_CLASS_MAPPINGS = {"TinyKleinTextEncode": TinyKleinTextEncode, "TinyKleinDecode": TinyKleinDecode}
NODE_DISPLAY_NAME_MAPPINGS = {"TinyKleinTextEncode": "tiny-klein text encode", "TinyKleinDecode": "tiny-klein decode"}
