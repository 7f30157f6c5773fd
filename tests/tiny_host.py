"""Tiny random language models with a whitespace tokenizer, saved as transformers directories: hosts for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{i}" for i in range(58)]
VOCAB = {word: i for i, word in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", "\n", "unused", *WORDS])}
SIZES = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL = SIZES | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "gemma3": Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=64),
    "gemma3-window": Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=5),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5),
    "gpt2": GPT2Config(**SIZES, n_embd=16, n_layer=3, n_head=2, n_positions=128),
    "neox": GPTNeoXConfig(**SMALL),
    "gemma3-vision": Gemma3Config(
        text_config=Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=8, sliding_window=64).to_dict(),
        vision_config=SMALL | {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
    ),
}
WIDER = {"llama-24": LlamaConfig(**{**SMALL, "hidden_size": 24}, num_key_value_heads=1)}


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Words w0..w57 and newlines, one id each; blanks part words."""
    tokenizer = Tokenizer(WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([Split(" ", "removed"), Split("\n", "isolated")])
    names = special or {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save_text(path: Path, documents: int = 900) -> str:
    """Write random documents of 30 words as .jsonl; the path as text."""
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{i}" for i in torch.randint(0, 58, (30,), generator=generator)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def save_tiny(folder: Path, kind: str = "llama", *, tokenizer: bool = True) -> Path:
    """Write a 3-layer random model of the given architecture; weights are large enough for its logits to differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config((CONFIGS | WIDER)[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder
