"""Which processors are faster in bfloat16."""

from __future__ import annotations

import pytest
import torch

from rsae.cpu import prefers_bfloat16


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx2": True, "cpu_name": "Intel Core i7"}, False),
        ({"avx512_f": True, "avx512_bf16": False, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9B14"}, True),
        ({"neon": True, "bf16": False}, False),
        ({"neon": True, "bf16": True, "sve_bf16": True}, True),
    ],
)
def test_by_what_the_processor_has(found, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    prefers_bfloat16.cache_clear()
    try:
        assert prefers_bfloat16() is expected
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # who has the fast products
        prefers_bfloat16.cache_clear()
        assert not prefers_bfloat16()
        monkeypatch.delattr(torch.cpu, "get_capabilities")  # before torch 2.11
        prefers_bfloat16.cache_clear()
        assert prefers_bfloat16()
    finally:
        prefers_bfloat16.cache_clear()
