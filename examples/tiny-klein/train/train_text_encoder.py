"""Make the tokenizer and train the small Qwen3 text encoder.

The tokenizer is byte-level BPE, so any text has tokens. The encoder is a causal language model
over rendered chat prompts; a second loss keeps its hidden states at padding constant, whatever
the prompt and the position, so that a prompt padded to 512 tokens means what it means at 40.
Writes `text_encoder/` and `tokenizer/` under the work folder.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from common import (
    BACKGROUNDS,
    DEFAULT_WORK,
    FULL_TEXT,
    SHORT_TEXT,
    TEXT_LAYERS,
    DataSet,
    Ema,
    Stopwatch,
    device_for,
    learning_rate,
    load_data,
    load_state,
    log_line,
    save_state,
    seed_everything,
    variants,
    with_background,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def prompts_of(data: DataSet) -> list[str]:
    """Every text that training uses, plus keywords, as the tokenizer's and encoder's corpus."""
    texts = [""]
    for emoji in data.emoji:
        texts += [emoji.name, *variants(emoji), *emoji.keywords]
        texts += [with_background(emoji.name, b) for b in BACKGROUNDS if b != "white"]
    return texts


def make_tokenizer(texts: list[str]) -> Qwen2TokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens and chat template."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*texts, *["user\nassistant\n\n"] * 50], trainer)
    core.add_special_tokens(list(SPECIAL))
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        model_max_length=FULL_TEXT,
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(tokenizer: Qwen2TokenizerFast, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[n, length]` of prompts, rendered as `Flux2KleinPipeline` renders them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for p in prompts
    ]
    tokens = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=length)
    return tokens["input_ids"], tokens["attention_mask"]


def make_encoder(vocabulary: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 28 thin layers, 1.3 M parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=28,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
    )


def losses(encoder: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token loss on real tokens; spread of the hidden states at padding, relative to real tokens'."""
    length = mask.sum(1, keepdim=True)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    stretch = 1 + (FULL_TEXT - ids.shape[1]) * torch.rand(ids.shape, device=ids.device)
    positions = torch.where(mask.bool(), places, (places + stretch).long().clamp(max=FULL_TEXT - 1))
    out = encoder(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
    )
    real = (places[:, 1:] < length).flatten()
    text = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1)[real], ids[:, 1:].flatten()[real])
    constancy = torch.zeros((), device=ids.device)
    for layer in TEXT_LAYERS:
        hidden = out.hidden_states[layer]
        padding, words = hidden[~mask.bool()], hidden[mask.bool()]
        constancy = constancy + padding.var(0).mean() / words.var(0).mean().detach().clamp(min=1e-4)
    return text, constancy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=540, help="stop after this long; run again to go on")
    parser.add_argument("--device")
    arguments = parser.parse_args()

    seed_everything(1)
    device, clock = device_for(arguments.device), Stopwatch(arguments.seconds)
    texts = prompts_of(load_data(arguments.work))
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(arguments.work / "tokenizer")
    ids, mask = render(tokenizer, texts, SHORT_TEXT)
    print(f"{len(texts)} prompts, {len(tokenizer)} tokens in the vocabulary, longest prompt {int(mask.sum(1).max())}")

    encoder = make_encoder(len(tokenizer)).to(device)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    ema = Ema(encoder, 0.99)
    state = arguments.work / "state" / "text_encoder.safetensors"
    step = load_state(state, encoder, ema, [optimiser])
    while step < arguments.steps and not clock.over:
        rows = torch.tensor(random.Random(step).choices(range(len(texts)), k=arguments.batch))
        optimiser.param_groups[0]["lr"] = 1.5e-3 * learning_rate(step, arguments.steps, warm_up=100)
        text, constancy = losses(encoder, ids[rows].to(device), mask[rows].to(device))
        (text + 0.3 * constancy).backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        ema.update(step)
        step += 1
        if step % 25 == 0:
            log_line(
                arguments.work / "logs" / "text_encoder.jsonl", step=step, text=text.item(), padding=constancy.item()
            )
            print(f"step {step} text {text:.3f} padding {constancy:.4f} {clock.elapsed:.0f} s", flush=True)
    save_state(state, encoder, ema, [optimiser], step)
    if step >= arguments.steps:
        ema.copy_to(encoder)
        encoder.to(torch.bfloat16).save_pretrained(arguments.work / "text_encoder")


if __name__ == "__main__":
    main()
