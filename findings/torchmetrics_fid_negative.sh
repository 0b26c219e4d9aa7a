#!/bin/bash
# FID of a set of pictures with itself, in another order: 0, but less than 0 with fewer pictures than features.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$work"
venv/bin/python - <<'PYTHON'
import torch
import torchmetrics
from torchmetrics.image.fid import FrechetInceptionDistance

print("torchmetrics", torchmetrics.__version__)


class Pixels(torch.nn.Module):
    num_features = 64

    def forward(self, x):
        return x.flatten(1)[:, :64].float()


found = {}
for num in (500, 20):
    x = torch.rand(num, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 100
    fid = FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    fid.update(x, real=True)
    fid.update(x.flip(0), real=False)
    found[num] = float(fid.compute())
    print(f"{num} pictures, 64 features in 0 to 100, float64: {found[num]:.2e}")
raise SystemExit(not (abs(found[500]) < 1e-6 and found[20] < -1e-4))
PYTHON
