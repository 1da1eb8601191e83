"""One small run of every kernel, for a memory checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/ops/memcheck.py [PART PARTS]

Kernels are compiled first, for minutes: PART of PARTS (0 of 8, say) runs every eighth, so that eight may run at once.
"""

import sys

import torch

from hgrn2.ops import hgrn2_scan, hgrn2_scan_2d, hgrn2_step

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda"
if not torch.cuda.is_available():  # Triton's interpreter, which knows fp32 only
    DEVICE, BF16, FP16 = "cpu", FP32, FP32


def draw(size: tuple, dtype: torch.dtype, mean: float) -> list:
    q, f, v = torch.randn(3, *size, device=DEVICE)
    lower_bound = 0.5 * torch.rand(size[-2:], device=DEVICE)
    return [q.to(dtype), (f + mean).to(dtype), v.to(dtype), lower_bound]


def scan(
    dim: int, dtype: torch.dtype, direction: str = "forward", mean: float = 0.0, lengths=None, carried: bool = True
) -> None:
    leaves = [x.requires_grad_() for x in draw((2, 70, 3, dim), dtype, mean)]
    carried = carried and direction != "both"
    state = torch.randn(2, 3, dim, dim, device=DEVICE).requires_grad_() if carried else None
    o, final = hgrn2_scan(
        *leaves, initial_state=state, direction=direction, lengths=lengths, q_act="silu", v_act="silu", impl="triton",
        output_final_state=state is not None,
    )  # fmt: skip
    torch.autograd.backward([o.float().sum()] + ([] if final is None else [final.sum()]))


def documents(dim: int, dtype: torch.dtype, direction: str) -> None:
    leaves = [x.requires_grad_() for x in draw((1, 150, 3, dim), dtype, 0.0)]
    bounds = torch.tensor([0, 0, 1, 65, 150], device=DEVICE, dtype=torch.int32)
    o, _ = hgrn2_scan(*leaves, cu_seqlens=bounds, direction=direction, impl="triton")
    o.float().sum().backward()


def grid(dim: int, dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in draw((2, 5, 9, 3, dim), dtype, 0.0)]
    hgrn2_scan_2d(*leaves, impl="triton").float().sum().backward()


def step(dim: int, dtype: torch.dtype) -> None:
    q, f, v, lower_bound = draw((2, 3, dim), dtype, 0.0)
    hgrn2_step(q, f, v, torch.zeros(2, 3, dim, dim, device=DEVICE), lower_bound)


def main(part: int, parts: int) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([70, 13], device=DEVICE)
    runs = []
    for dim, dtype in ((16, BF16), (64, BF16), (128, BF16), (64, FP16), (128, FP32)):
        for mean in (0.0, -8.0):  # fast chunks and safe ones
            runs += [
                lambda dim=dim, dtype=dtype, mean=mean: scan(dim, dtype, mean=mean),
                lambda dim=dim, dtype=dtype, mean=mean: scan(dim, dtype, mean=mean, carried=False),
                lambda dim=dim, dtype=dtype, mean=mean: scan(dim, dtype, "both", mean=mean),
            ]
    for dim in (1, 2, 4, 8, 64):
        runs += [
            lambda dim=dim: scan(dim, BF16),
            lambda dim=dim: scan(dim, BF16, carried=False),
            lambda dim=dim: documents(dim, BF16, "reverse"),
            lambda dim=dim: documents(dim, BF16, "both"),
            lambda dim=dim: scan(dim, FP32, "both"),
            lambda dim=dim: scan(dim, BF16, "both", lengths=lengths),
            lambda dim=dim: grid(dim, BF16),
            lambda dim=dim: step(dim, BF16),
        ]
    for run in runs[part::parts]:
        run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran" if parts == 1 else f"part {part} of {parts} ran")


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (0, 1)))
