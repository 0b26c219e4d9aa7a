#!/bin/bash
# x-transformers' generate draws from the likeliest tenth of the vocabulary unless told otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 x-transformers==2.31.10
cd "$work"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

print("x-transformers", version("x-transformers"))
torch.manual_seed(0)
layers = Decoder(dim=32, depth=1, heads=2)
model = AutoregressiveWrapper(TransformerWrapper(num_tokens=20, max_seq_len=8, attn_layers=layers)).eval()
prompts = torch.zeros(4000, 1, dtype=torch.long)
probabilities = model.net(prompts[:1])[0, -1].softmax(-1)
print(f"20 tokens; the model gives the least likely one {probabilities.min():.3f}, the two likeliest "
      f"{probabilities.topk(2).values.sum():.3f} together")
drawn = model.generate(prompts, 1, temperature=1.0).unique().numel()
unfiltered = model.generate(prompts, 1, temperature=1.0, filter_logits_fn=lambda logits: logits).unique().numel()
print(f"different tokens in 4,000 draws at temperature 1: {drawn}; with a filter that keeps all: {unfiltered}")
raise SystemExit(not (drawn == 2 and unfiltered == 20))
PYTHON
