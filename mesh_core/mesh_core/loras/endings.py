"""The endings that trainers give the tensors of a LoRA: PEFT and diffusers, kohya, LyCORIS, ComfyUI. Knows no model."""

from __future__ import annotations

import re

# Ending -> (algorithm, role). `lora_A` may carry the name of a PEFT adapter.
_ENDINGS: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_up\.weight", "lora", "up"),
    (r"\.lora_down\.weight", "lora", "down"),
    (r"\.lora_mid\.weight", "lora", "mid"),
    (r"[._]lora\.up\.weight", "lora", "up"),
    (r"[._]lora\.down\.weight", "lora", "down"),
    (r"\.lora_linear_layer\.up\.weight", "lora", "up"),
    (r"\.lora_linear_layer\.down\.weight", "lora", "down"),
    (r"\.lora_B(?:\.[^.]+)?\.bias", "bias", "up"),
    (r"\.lora_B(?:(?:\.[^.]+)?\.weight)?", "lora", "up"),
    (r"\.lora_A(?:(?:\.[^.]+)?\.weight)?", "lora", "down"),
    (r"\.lora_magnitude_vector(?:(?:\.[^.]+)?\.weight)?", "lora", "magnitude"),
    (r"\.hada_(w[12]_[ab]|t[12])", "loha", ""),
    (r"\.lokr_(w[12]|w[12]_[ab]|t2)", "lokr", ""),
    (r"\.([ab][12])\.weight", "glora", ""),
    (r"\.oft_blocks", "oft", "blocks"),
    (r"\.rescale", "oft", "rescale"),
    (r"\.(?:diff|w_norm)", "diff", "diff"),
    (r"\.(?:diff_b|b_norm)", "bias", "diff"),
    (r"\.set_weight", "set", "value"),
    (r"\.dora_scale", "any", "dora_scale"),
    (r"\.alpha", "any", "alpha"),
)
_KEY = re.compile(f"(?P<stem>.+?)(?:{'|'.join(f'(?P<k{i}>{e})' for i, (e, _, _) in enumerate(_ENDINGS))})")


def split_key(key: str) -> tuple[str, str, str] | None:
    """Stem, algorithm and role of a key; None for an ending that nobody knows.

    The stem is what stands before the ending: a module's name. The algorithm is one of `ALGORITHMS`, or ``bias`` for
    what is added to the module's bias, scaled like the LoRA's weight (``up``) or as it is (``diff``), or ``any`` for
    what belongs to whichever algorithm the stem's other keys have.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    index = next(i for i in range(len(_ENDINGS)) if match[f"k{i}"] is not None)
    _, algorithm, role = _ENDINGS[index]
    if not role:
        inner = re.fullmatch(_ENDINGS[index][0], match[f"k{index}"])
        assert inner is not None
        role = inner[1]
    return match["stem"], algorithm, role
