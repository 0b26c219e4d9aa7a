#!/bin/bash
# torch.optim.Muon orthogonalizes in bfloat16, also for parameters in float64.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import torch

print("torch", torch.__version__)
gradient = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
weight = torch.nn.Parameter(torch.zeros_like(gradient))
weight.grad = gradient.clone()
muon = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
muon.step()
update = -weight.detach()

a, b, c = muon.defaults["ns_coefficients"]
expected = gradient / gradient.norm()
for _ in range(muon.defaults["ns_steps"]):
    gram = expected @ expected.T
    expected = a * expected + (b * gram + c * gram @ gram) @ expected
rounded = torch.equal(update, update.bfloat16().double())
error = ((update - expected).norm() / expected.norm()).item()
print(f"an update of {update.dtype}: every value is a number of bfloat16: {rounded}")
print(f"its relative error against the same five iterations in float64: {error:.4f}")
raise SystemExit(not (rounded and error > 1e-3))
PYTHON
