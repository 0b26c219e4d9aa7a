#!/bin/bash
# With data_range=None torchmetrics' SSIM of one data set depends on how it is cut into batches.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
cd "$work"
venv/bin/python - <<'PYTHON'
import torch
import torchmetrics
from torchmetrics.image import StructuralSimilarityIndexMeasure

print("torchmetrics", torchmetrics.__version__)
generator = torch.Generator().manual_seed(0)
target = torch.rand(2, 1, 32, 32, generator=generator) * torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)  # one is dark
image = target + 0.02 * torch.randn(target.shape, generator=generator)


def ssim(data_range: float | None, batch_size: int) -> float:
    metric = StructuralSimilarityIndexMeasure(data_range=data_range)
    for start in range(0, 2, batch_size):
        metric.update(image[start : start + batch_size], target[start : start + batch_size])
    return metric.compute().item()


differ = {}
for data_range in (None, 1.0):
    both, each = ssim(data_range, 2), ssim(data_range, 1)
    differ[data_range] = abs(both - each) > 1e-3
    print(f"SSIM of two images with data_range={data_range}: {both:.4f} in one batch, {each:.4f} in two")
raise SystemExit(not (differ[None] and not differ[1.0]))
PYTHON
