#!/bin/bash
# FlopCounterMode counts no operation of scaled_dot_product_attention on a CPU, unless it is made of plain products.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)
q = torch.randn(1, 2, 64, 32)


def counted():
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(q, q, q)
    return counter.get_total_flops()


usual = counted()
with sdpa_kernel(SDPBackend.MATH):
    plain = counted()
expected = 2 * (2 * 2 * 64 * 64 * 32)
print(f"by default {usual}, of plain products {plain}; two products of 2 heads, 64 × 64 × 32, are {expected}")
raise SystemExit(not (usual == 0 and plain == expected))
PYTHON
