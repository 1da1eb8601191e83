"""The launches of one scan of the chunked kernels, planned (see `launch`). Shapes as in `common`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from triton import cdiv

from hgrn2.ops.chunk import tiles
from hgrn2.ops.chunk.backward import chunk_grad_kernel, chunk_value_grad_kernel, row_sum_kernel
from hgrn2.ops.chunk.common import FAST_LIMIT, FAST_LIMIT_FP32
from hgrn2.ops.chunk.factors import chunk_factor_kernel
from hgrn2.ops.chunk.forward import carry_kernel, chunk_out_kernel, chunk_state_kernel
from hgrn2.ops.chunk.safe_backward import chunk_safe_grad_kernel
from hgrn2.ops.chunk.safe_forward import chunk_score_kernel
from hgrn2.ops.gates import activation_code
from hgrn2.ops.launch import Plan, Slots, kinds, multiprocessors

# how many programs a kernel takes, by its tile
Programs = Callable[[tiles.Kernel], int]
# sequences of fewer chunks are not worth splitting
_MIN_SPLIT = 16
# programs a multiprocessor that safe chunks are spread over at least, if there are as many
_SAFE_PROGRAMS = 16


def saved_slots(
    n_chunks: int, heads: int, dim: int, dtype: torch.dtype, keep: bool, exact: bool, pair: bool = False
) -> Slots:
    """What the forward leaves in one buffer: for the backward if `keep`, for an initial state's gradient if `exact`.

    pair: of both directions; names that end in 2 are of the scan back (see `pair_forward`). ex2 is for safe chunks of
    two halves alone: elsewhere it holds anything.
    """
    slots, chunk, product = Slots(), tiles.tiles_for(dim, dtype).chunk, tiles.product_dtype(dtype)
    factors = ["qx", "kx", *(["qx2", "kx2"] if pair else [])]
    if keep:
        factors += ["ex", *(["ex2"] if pair and chunk > 32 else [])]
    for name in factors:
        slots.add(name, (n_chunks, heads, chunk, dim), product)
    for name in ("states", "states2") if pair else ("states",):
        slots.add(name, (n_chunks, heads, dim, dim), product)
    slots.add("a", (n_chunks, heads, chunk, chunk), product)
    slots.add("total", (n_chunks, heads, dim), torch.float32)
    if exact:
        slots.add("qf", (n_chunks, heads, chunk, dim), torch.float32)
    slots.add("safe", (n_chunks, heads), torch.int32)  # last: no gaps, which would hold anything
    return slots


class Call:
    """Sizes and constants of one kind of call, which add its kernels to a plan; tensors have the names used here.

    Methods that take `back` do their work for one scan of two at once: if it is set, for the scan back.
    """

    def __init__(self, q, f, v, lower_bound, lengths, others, n_chunks, packed_documents, reverse, q_act, v_act):
        *lines, self.time, self.heads, self.dim = q.shape
        self.batch = math.prod(lines)
        self.device, self.dtype, self.tiles = q.device, q.dtype, tiles.tiles_for(self.dim, q.dtype)
        chunk = self.tiles.chunk
        self.n_chunks, self.n_t, self.varlen = n_chunks, cdiv(self.time, chunk), packed_documents
        precision, split, sub = tiles.arithmetic(q.dtype)
        self.values = dict(
            T=self.time, NT=self.n_t, P=1 if len(lines) == 1 else lines[1], NC=n_chunks, H=self.heads,
            sign=-1 if reverse else 1, has_len=int(lengths is not None), K=self.dim, C=chunk,
            SUB=sub, VARLEN=packed_documents, HAS_LB=lower_bound is not None, PRECISION=precision, SPLIT=split,
            Q_ACT=activation_code(q_act, q.dtype), V_ACT=activation_code(v_act, q.dtype),
        )  # fmt: skip
        self.lengths = "safe" if lengths is None else "len"  # any integers: they are not read
        self.plan = Plan(kinds((q, f, v, lower_bound, lengths, *others)))
        for name, x in (("q", q), ("f", f), ("v", v)):
            self.strides(name, x)
        self.scratch = Slots()
        self.masks = {name: tiles.sum_masks(size, q.device) for name, size in (("mask", chunk), ("mask32", 32))}

    def strides(self, name: str, x: Tensor) -> None:
        b, *p, t, h, _ = x.stride()
        steps = min(self.tiles.chunk, self.time) - 1
        if t * steps >= 2**31:  # offsets inside a chunk have 32 bits
            most = (2**31 - 1) // steps
            raise ValueError(f"the tokens of {name} lie {t} values apart, the Triton scan takes at most {most}")
        self.values |= {f"{name}_stride_{axis}": s for axis, s in zip("bpth", (b, *(p or (0,)), t, h), strict=True)}

    def add(self, kernel, programs: Programs, tile: tiles.Kernel, values: dict | None = None, **names: str) -> None:
        """Add a kernel on `tile`, or where that does not fit on the first smaller one; programs: of any such tile."""
        choices = []
        for t in tile.candidates(tiles.shared_memory(self.device)):
            sizes = self.values | dict(BK=t.bk, BV=t.bv, STAGES=t.stages) | (values or {})
            choices.append((programs(t), t.options, sizes))
        self.plan.add_first(kernel, choices, **(dict(len=self.lengths) | names))

    def factors(self, keep: bool, exact: bool, fast_limit: float | None, kernel=chunk_factor_kernel) -> None:
        if fast_limit is None:
            fast_limit = FAST_LIMIT_FP32 if self.dtype == torch.float32 else FAST_LIMIT
        tile = self.tiles.factor
        band = max(1, tile.bk // self.dim)
        values = dict(BH=band, BT=tile.bv, EXACT=exact, keep=int(keep), fast_limit=float(fast_limit))
        names = dict(qf="qf" if exact else "none", ex="ex" if keep else "qx")
        self.add(kernel, lambda _: self.n_chunks * cdiv(self.heads, band), tile, values, **names)

    def states(self, x: str, y: str, states: str, enter: str, leave: str, backward: bool) -> None:
        """Chunk states, from `enter` to `leave` ("none": zero, not wanted); splits few long sequences."""
        tile = tiles.exact_state(self.dim) if x == "qf" else self.tiles.state

        def blocks(t: tiles.Kernel) -> int:
            return self.heads * (self.dim // t.bk) * (self.dim // t.bv)

        count = multiprocessors(self.device)
        values = {f"y_stride_{axis}": self.values[f"{y}_stride_{axis}"] for axis in "bpth"} | dict(
            BACKWARD=backward, HAS_INIT=enter != "none", HAS_FINAL=leave != "none", EXACT=x == "qf",
            ACT=self.values["V_ACT"] if y == "v" else 0, PRECISION=tiles.output_precision(self.dtype),
        )  # fmt: skip
        names = dict(x=x, y=y, states=states, init=enter, final=leave)

        def run(mode: int, segments: int, length: int, **more: str) -> None:
            more = {"seg": "none", "decay": "none"} | more
            values_ = values | dict(MODE=mode, L=length)
            self.add(chunk_state_kernel, lambda t: segments * blocks(t), tile, values_, **names, **more)

        if not self.varlen and (2 * self.batch * blocks(tile) >= count or self.n_t < _MIN_SPLIT):
            run(0, self.batch, self.n_t)
            return
        length = max(_MIN_SPLIT // 2, cdiv(self.n_chunks, max(1, 4 * count // blocks(tile))))
        segments = cdiv(self.n_chunks, length)
        # of two scans one after the other in the same place
        if "seg" not in self.scratch.of:
            self.scratch.add("seg", (segments, self.heads, self.dim, self.dim), torch.float32)
            self.scratch.add("decay", (segments, self.heads, self.dim), torch.float32)
        if segments > 1:
            run(1, segments, length, seg="seg", decay="decay")
        rows = min(self.dim, max(1, 512 // self.dim))
        # a single segment starts from the zeros that this writes
        carry = dict(N_SEG=segments, BACKWARD=backward)
        self.add(carry_kernel, lambda t: self.heads * (self.dim // t.bk), tiles.Kernel(rows, self.dim, 4), carry)
        run(2, segments, length, seg="seg")

    def safe_chunks(self, keep: bool, back: bool = False) -> None:
        number = "2" if back else ""
        names = dict(mask="mask32", kx="kx" + number, x=self.halves("ex" + number) if keep else "qx")
        self.add_safe(chunk_score_kernel, lambda _: 1, self.tiles.score, dict(keep=int(keep)), back, **names)

    def halves(self, name: str) -> str:
        """What only chunks of two halves have, else what is there in any case."""
        return name if self.tiles.chunk > 32 else "qx"

    def add_safe(self, kernel, programs: Programs, tile: tiles.Kernel, values: dict, back: bool, **names: str) -> None:
        """Add a kernel that takes `programs` programs for each safe chunk and head; groups of them share programs."""
        values |= dict(BACK=back, sign=-1 if back else self.values["sign"])
        each = self.n_chunks * self.heads
        group = max(1, min(16, each * programs(tile) // (_SAFE_PROGRAMS * multiprocessors(self.device))))
        self.add(kernel, lambda t: cdiv(each, group) * programs(t), tile, values | dict(GROUP=group), **names)

    def per_values(self, tile: tiles.Kernel) -> int:
        """Programs of kernels that each take one chunk, head and tile of value channels."""
        return self.n_chunks * self.heads * (self.dim // tile.bv)

    def outputs(self, keep: bool, add: bool = False, kernel=chunk_out_kernel) -> None:
        values = dict(keep=int(keep), ADD=add, PRECISION=tiles.output_precision(self.dtype))
        self.add(kernel, self.per_values, self.tiles.out, values)

    def state_gradients(self, enter: str, leave: str, exact: bool) -> None:
        """The gradients of the chunks' states, and room for those of the scores."""
        self.gradient_slots("dstates")
        self.states("qf" if exact else "qx", "do", "dstates", enter, leave, backward=True)

    def gradient_slots(self, *states: str) -> None:
        """Room for the gradients of scores and, by their names, of states."""
        chunk, product = self.tiles.chunk, tiles.product_dtype(self.dtype)
        for name in states:
            self.scratch.add(name, (self.n_chunks, self.heads, self.dim, self.dim), product)
        self.scratch.add("da", (self.n_chunks, self.heads, chunk, chunk), product)
        self.scratch.add("diag", (self.n_chunks, self.heads, chunk), torch.float32)

    def value_gradients(self, bound: bool, add: bool = False, kernel=chunk_value_grad_kernel) -> None:
        values = dict(LB_GRAD=bound, ADD=add, PRECISION=tiles.output_precision(self.dtype))
        names = {} if bound else dict(dlb="none", dlb2="none")
        self.add(kernel, self.per_values, self.tiles.dv, values, **names)

    def gradients(self, bound: bool, add: bool = False, kernel=chunk_grad_kernel) -> None:
        """dq and df of fast chunks."""
        values = dict(LB_GRAD=bound, ADD=add)

        def programs(t: tiles.Kernel) -> int:
            return self.n_chunks * self.heads * (self.dim // t.bk)

        self.add(kernel, programs, self.tiles.grad, values, dlb="dlb" if bound else "none")

    def safe_gradients(self, bound: bool, add: bool = False, pair: bool = False, back: bool = False) -> None:
        """dq and df of safe chunks; `pair`: of one of two scans."""
        tile, values = self.tiles.safe_grad, dict(LB_GRAD=bound, ADD=add, PAIR=pair)
        halves, number = self.tiles.chunk // 32, "2" if back else ""
        names = {name: name + number for name in ("qx", "kx", "states", "dstates")}
        names |= dict(dlb="dlb" + number if bound else "none", mask="mask32", x=self.halves("ex" + number))
        self.add_safe(chunk_safe_grad_kernel, lambda t: halves * (self.dim // t.bk), tile, values, back, **names)

    def bound_gradient(self, scans: int = 1) -> None:
        """The gradient of lower_bound, from the chunks' shares of it in each of the scans."""
        self.scratch.add("dlb", (scans * self.n_chunks, self.heads, self.dim), torch.float32)
        if scans == 2:
            self.scratch.part("dlb2", "dlb", self.n_chunks, self.n_chunks)
        rows, columns = scans * self.n_chunks, self.heads * self.dim
        length = max(64, cdiv(rows, 64))
        parts = cdiv(rows, length)
        tile = tiles.Kernel(16, 64, 4)
        steps = [("dlb", "d_bound", rows, rows)]
        if parts > 1:
            self.scratch.add("parts", (parts, self.heads, self.dim), torch.float32)
            steps = [("dlb", "parts", rows, length), ("parts", "d_bound", parts, parts)]
        for x, y, n, each in steps:
            values = dict(N=n, M=columns, L=each, BM=16, BN=64)
            count = cdiv(n, each) * cdiv(columns, 16)
            self.add(row_sum_kernel, lambda _, count=count: count, tile, values, shares=x, sum=y)
