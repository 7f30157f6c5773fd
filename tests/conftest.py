"""Random teachers in SAELens' own classes, shared by the tests that read, copy or run them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is first imported, which SAELens does
    os.environ["TRITON_INTERPRET"] = "1"

D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture
def make_teacher() -> Callable[..., Any]:
    """make_teacher("standard" | "jumprelu" | "topk" | "gated", **config): every weight random, decoder rows of norm 0.3 to 3.

    A JumpReLU's thresholds lie between 0.05 and 1.5, but for six of 0 and one of -1 (the mark of one never calibrated).
    """
    from sae_lens import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    classes = {
        "standard": (StandardSAE, StandardSAEConfig),
        "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
        "topk": (TopKSAE, TopKSAEConfig),
        "gated": (GatedSAE, GatedSAEConfig),
    }

    def make(family: str, *, seed: int = 0, **config: Any) -> Any:
        sae_class, config_class = classes[family]
        if family == "topk":
            config = {"k": K} | config
        metadata = SAEMetadata(
            hook_name="blocks.1.hook_resid_post", model_name="tiny", prepend_bos=True, context_size=16
        )
        sae = sae_class(config_class(**{"d_in": D_IN, "d_sae": D_SAE, "metadata": metadata} | config))
        g = torch.Generator().manual_seed(seed)
        d_in, d_sae = sae.W_enc.shape
        with torch.no_grad():
            sae.W_enc.copy_(torch.randn(d_in, d_sae, generator=g) / d_in**0.5)
            biases = ("b_gate", "b_mag", "r_mag") if family == "gated" else ("b_enc",)
            for name in biases:
                sae.get_parameter(name).copy_(0.3 * torch.randn(d_sae, generator=g))
            sae.b_dec.copy_(0.5 * torch.randn(d_in, generator=g))
            rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
            sae.W_dec.copy_(rows * torch.empty(d_sae, 1).uniform_(0.3, 3.0, generator=g))
            if family == "jumprelu":
                sae.threshold.uniform_(0.05, 1.5, generator=g)
                sae.threshold[::7] = 0.0
                sae.threshold[3] = -1.0
        return sae

    return make


@pytest.fixture
def x() -> torch.Tensor:
    """(300, D_IN) activations."""
    return 2 * torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1))
