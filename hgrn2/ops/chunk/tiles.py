"""The table of tiles: how each head dim and dtype is cut up. Fixed, so that nothing is tuned at run time.

How much shared memory a tile takes differs by chip and by Triton's version: where the table's tile takes more than a
device has, the first smaller one that fits is taken. tests/ops/test_aot.py compiles all of them for every chip.
"""

import dataclasses
import functools

import torch

from hgrn2.ops.launch import INTERPRET


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Tile of one kernel: key channels `bk`, value channels `bv`, warps, pipeline stages.

    For the factor kernel, `bk` is channels (of several heads if the head dim is smaller) and `bv` tokens at a time.
    needs: bytes of shared memory that it takes with some Triton version of the supported range on a chip that may not
    have them; 0 for tiles that fit on all.
    """

    bk: int
    bv: int
    warps: int
    stages: int = 1
    needs: int = 0

    @property
    def options(self) -> dict:
        """What Triton calls them."""
        return {"num_warps": self.warps}

    def candidates(self, shared: int) -> list["Kernel"]:
        """This tile if it fits into `shared` bytes, then ever smaller ones, for a Triton that takes more than known."""
        tile, found = dataclasses.replace(self, needs=0), [] if self.needs > shared else [self]
        while tile.stages > 1:
            tile = dataclasses.replace(tile, stages=tile.stages - 1)
            found.append(tile)
        for side in ("bv", "bk"):
            while getattr(tile, side) > 16:
                tile = dataclasses.replace(tile, **{side: getattr(tile, side) // 2})
                found.append(tile)
        return found


@dataclasses.dataclass(frozen=True)
class Tiles:
    """One head dim and dtype: tokens a chunk and the tile of each kernel."""

    chunk: int
    factor: Kernel
    state: Kernel
    score: Kernel
    out: Kernel
    dv: Kernel
    grad: Kernel
    safe_grad: Kernel


def _tiles(chunk: int, dim: int, state: tuple, out: tuple, dv: tuple, grad: tuple, safe: tuple) -> Tiles:
    factor = Kernel(max(128, dim), 4, max(128, dim) // 128, 2)
    score = Kernel(min(dim, 32), 0, 2)
    return Tiles(
        chunk, factor, Kernel(*state), score, Kernel(*out), Kernel(*dv), Kernel(*grad), Kernel(*safe)
    )  # fmt: skip


# bf16 inputs: bf16 products. Hopper's own products (64 rows) raced on the device in tiles narrower than 64 columns
# (Triton 3.6): small head dims take chunks of 32, which run the older ones.
_BF16 = {
    16: _tiles(32, 16, (16, 16, 1, 2), (16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 16, 1)),
    32: _tiles(32, 32, (32, 32, 1, 2), (32, 32, 1), (32, 32, 1), (32, 32, 1), (32, 32, 2)),
    64: _tiles(64, 64, (64, 64, 4, 2), (64, 64, 4), (64, 64, 4), (64, 64, 4), (32, 32, 2, 2)),
    128: _tiles(64, 128, (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2), (32, 64, 2, 2)),
    256: _tiles(64, 256, (64, 128, 4, 3), (64, 128, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2), (32, 64, 2, 2)),
}
# fp32 operands: three tf32 products for fp32 inputs (but see `output_precision`), one for fp16 (whose range the
# factors would leave)
_FP32 = {
    16: _tiles(32, 16, (16, 16, 4), (16, 16, 4), (16, 16, 4), (16, 16, 4), (16, 16, 1)),
    32: _tiles(32, 32, (32, 32, 4), (32, 32, 4), (32, 32, 4), (32, 32, 4), (32, 32, 2)),
    64: _tiles(32, 64, (32, 64, 4), (32, 64, 4), (32, 64, 4), (32, 32, 4), (32, 32, 2)),
    128: _tiles(32, 128, (32, 64, 4), (32, 64, 4), (32, 64, 4), (32, 32, 4), (32, 32, 2)),
    256: _tiles(32, 256, (32, 64, 4), (32, 64, 4), (32, 64, 4), (32, 32, 4), (32, 32, 2)),
}


def tiles_for(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a head dim for inputs of a dtype."""
    return (_BF16 if dtype == torch.bfloat16 else _FP32)[int(head_dim)]


def arithmetic(dtype: torch.dtype) -> tuple[str, int, int]:
    """PRECISION of products, SPLIT of decay sums and SUB, where safe scores stop to halve (see `common`)."""
    if dtype == torch.bfloat16:
        return "bf16", 2, 4
    if INTERPRET:
        return "ieee", 0, 0
    return ("tf32", 3, 4) if dtype == torch.float16 else ("tf32x3", 3, 0)


def exact_state(head_dim: int) -> Kernel:
    """The tile of the states' gradients where the initial state has one: of fp32 products, which take registers."""
    return Kernel(min(head_dim, 32), min(head_dim, 32), 8 if head_dim > 32 else 4)


def pair(tiles: Tiles) -> Tiles:
    """The tiles for both directions at once, whose kernels hold twice as much."""
    if tiles.chunk < 64:
        warps = 2 * tiles.grad.warps if tiles.grad.warps < 4 else 4
        return dataclasses.replace(tiles, grad=dataclasses.replace(tiles.grad, warps=warps))
    out, dv, grad = (dataclasses.replace(x, bv=min(64, x.bv)) for x in (tiles.out, tiles.dv, tiles.grad))
    needs = 120 * 1024 if tiles.grad.stages > 1 else 0  # Triton 3.8; 112 KiB with 3.5
    return dataclasses.replace(tiles, out=out, dv=dv, grad=dataclasses.replace(grad, warps=8, needs=needs))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def output_precision(dtype: torch.dtype) -> str:
    """PRECISION of the products that form states, fast chunks' scores, the gradients of both, o and dv.

    Of values of one sign, tf32 parts would lose fp32's last digits.
    """
    precision = arithmetic(dtype)[0]
    return "ieee" if precision == "tf32x3" else precision


@functools.cache
def sum_masks(chunk: int, device: torch.device) -> torch.Tensor:
    """`[10 + 2 log2 C, C, C]` masks for sums over a chunk's tokens, rows by rows summed; 0 and 1 but for one.

    0: the token itself; 1: it and later ones; 2: earlier ones; then per halving level (smallest first) the tokens on
    the way to the boundary (see `common`), and their transposes; within blocks of 16, it and later ones; half
    the sum up to the token less half the sum after it; the tokens up to it, and those after it; last the transpose of
    those halves and, within blocks again, the tokens up to it, and earlier ones.
    """
    i, j = torch.arange(chunk)[:, None], torch.arange(chunk)[None, :]
    masks = [i == j, j >= i, j < i]
    levels = []
    for shift in range(chunk.bit_length() - 1):
        half = i >> shift
        levels.append((half == j >> shift) & torch.where(half % 2 == 1, j <= i, j > i))
    masks += levels + [x.T for x in levels]
    block = i // 16 == j // 16
    centred = block * torch.where(j <= i, 0.5, -0.5)
    masks += [block & (j >= i), centred, j <= i, j > i, centred.T, block & (j <= i), block & (j < i)]
    dtype = torch.float32 if INTERPRET else torch.bfloat16
    return torch.stack([x.to(dtype) for x in masks]).to(device)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of factors and chunk states kept between kernels: that of the products they enter."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
