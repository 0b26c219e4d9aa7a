"""What GPUs can do, from their makers' data sheets, and how much of it trainings reach."""

from dataclasses import dataclass

from smalti.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One accelerator and what ties it to others. Rates are the data sheet's, dense, in units a second."""

    name: str
    bfloat16_flops: float
    """Products in bfloat16 with sums in float32, without sparsity."""
    float32_flops: float
    """Outside the tensor cores, as torch multiplies float32 by default."""
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the others of its machine, in one direction."""
    network_bytes_per_s: float
    """To other machines, in one direction: what clouds usually give each GPU of this kind."""
    per_machine: int
    source: str


GIGA, TERA, GIB = 1e9, 1e12, 2**30
NETWORK = "network: 400 Gbit/s a GPU, as in NVIDIA's DGX H100; A100: 200; PCIe cards: 100 Gbit/s for four"

GPUS: dict[str, GPU] = {
    "a100": GPU(
        name="NVIDIA A100 SXM 80GB",
        bfloat16_flops=312 * TERA,
        float32_flops=19.5 * TERA,
        memory_bytes=79.2 * GIB,  # what torch can allocate of the 80
        memory_bytes_per_s=2039 * GIGA,
        link_bytes_per_s=300 * GIGA,
        network_bytes_per_s=25 * GIGA,
        per_machine=8,
        source="NVIDIA A100 Tensor Core GPU data sheet (June 2021): NVLink 600 GB/s both ways",
    ),
    "h100": GPU(
        name="NVIDIA H100 SXM 80GB",
        bfloat16_flops=989 * TERA,
        float32_flops=67 * TERA,
        memory_bytes=79.1 * GIB,
        memory_bytes_per_s=3350 * GIGA,
        link_bytes_per_s=450 * GIGA,
        network_bytes_per_s=50 * GIGA,
        per_machine=8,
        source="NVIDIA H100 Tensor Core GPU data sheet: 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both ways",
    ),
    "h200": GPU(
        name="NVIDIA H200 SXM 141GB",
        bfloat16_flops=989 * TERA,
        float32_flops=67 * TERA,
        memory_bytes=139.8 * GIB,
        memory_bytes_per_s=4800 * GIGA,
        link_bytes_per_s=450 * GIGA,
        network_bytes_per_s=50 * GIGA,
        per_machine=8,
        source="NVIDIA H200 Tensor Core GPU data sheet: 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both ways",
    ),
    "l40s": GPU(
        name="NVIDIA L40S 48GB",
        bfloat16_flops=362 * TERA,
        float32_flops=91.6 * TERA,
        memory_bytes=44.4 * GIB,
        memory_bytes_per_s=864 * GIGA,
        link_bytes_per_s=32 * GIGA,
        network_bytes_per_s=3 * GIGA,
        per_machine=4,
        source="NVIDIA L40S data sheet: 733 TFLOP/s with sparsity, PCIe Gen4 ×16, 64 GB/s both ways",
    ),
    "rtx4090": GPU(
        name="NVIDIA GeForce RTX 4090 24GB",
        bfloat16_flops=165.2 * TERA,
        float32_flops=82.6 * TERA,
        memory_bytes=23.5 * GIB,
        memory_bytes_per_s=1008 * GIGA,
        link_bytes_per_s=32 * GIGA,
        network_bytes_per_s=3 * GIGA,
        per_machine=4,
        source="NVIDIA Ada GPU architecture whitepaper, appendix A: sums in float32, without sparsity",
    ),
}  # fmt: skip

TRAINING_EFFICIENCY = 0.35
"""Of the data sheet's products a second that a training reaches. torchtitan's Llama 3.1 8B with FSDP2 in bfloat16 on 8
H100 (arXiv:2410.06511, table 1: 5,645 tokens/s a GPU, compiled 6,482, sequences of 8,192) has 31 and 36 % of it, causal
attention counted."""
BANDWIDTH_EFFICIENCY = 0.7
"""Of the data sheet's bytes a second that weights are read with, or a collective operation moves. An H200 copied 4.2
TB/s of 4.8 (docs/gpu.md); collectives reach less."""
STEP_S = 2.3e-3
"""What a decode step takes at least, however small the model: the host's part. LlamaGen-B by `cuda_graph` on an H200
took 2.4, 2.3 and 3.2 ms a step at 1, 8 and 64 guided pictures (docs/gpu.md), when it drew outside of its graph and the
host read every token: it should be less now, which has not been measured."""
LAYER_S = 0.7e-3
"""What a layer of a training step takes at least, forward and backward, however small it is. LlamaGen-B's decode steps,
operator by operator, took 8.5 ms on an H200 (docs/gpu.md): 12 layers forward, driven from Python."""
KEPT_FREE = 0.08
"""Of a device's memory, for what libraries and the allocator take."""


def find_gpu(name: str) -> GPU:
    """Raises InputError for a name that is not in the table."""
    if name not in GPUS:
        raise InputError(f"GPU {name!r} is not in the table; choose one of {', '.join(GPUS)}.")
    return GPUS[name]
