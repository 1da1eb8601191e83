"""The chunked torch form: the CPU path, and the fallback where a Triton kernel cannot run.

A chunk of C tokens is halved again and again. Where i lies in the second and j in the first half of a block, the decay
from j to i splits at the middle,

    exp(sum_{j<l<=i} g_l) = exp(P_i) exp(R_j),   P_i = sum over (middle, i],  R_j = sum over (j, middle],

so each level is one batched matrix product of factors whose exponents are <= 0 by construction: nothing overflows,
no branch looks at the data, and log C levels cover all pairs i > j. The pair i = j has no decay. P and R are sums of
numbers of one sign, built by merging halves (as products of their exponentials): no difference of cumulative sums,
hence no cancellation, for any decay down to -inf. Between chunks a K x V state is carried. Memory is linear in T.

Legend: G = B * H * N chunks flattened, N chunks a row, C tokens a chunk, K key dim, V value dim; g = log lam.
"""

import torch
from torch import Tensor

from hgrn2.ops.gates import activate, forget_gate, without_autocast
from hgrn2.ops.reference import compute_dtype, padding_mask
from hgrn2.ops.register import refuse_second_derivatives

_SLAB_ELEMENTS = 64 * 64 * 64  # 1 MiB of fp32


def chunk_size(dim: int, time: int) -> int:
    """Tokens a chunk: a power of two, no more than the sequence needs. Affects speed only (measured on CPUs)."""
    size = 64 if dim >= 128 else 32 if dim >= 16 else 16
    while size > 1 and size // 2 >= time:
        size //= 2
    return size


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Views of the first and second halves `[G, C/2m, m, K]` of each block of 2m tokens of x `[G, C, K]`."""
    blocks = x.unflatten(1, (-1, 2, m))
    return blocks[:, :, 0], blocks[:, :, 1]


def _score_blocks(a: Tensor, m: int) -> Tensor:
    """View of a `[G, C, C]`: rows of each second half against columns of its first half, `[G, C/2m, m, m]`."""
    size = a.shape[-1]
    blocks = a.unflatten(2, (-1, 2, m)).unflatten(1, (-1, 2, m))  # [G, n, 2, m, n, 2, m]
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1) if size > 1 else a


def _merge(prefix: Tensor, suffix: Tensor, m: int) -> None:
    """Grow inclusive prefix products exp(P) and exclusive suffix products exp(R) of blocks of m to 2m, in place."""
    p_first, p_second = _halves(prefix, m)
    r_first, _ = _halves(suffix, m)
    r_first *= p_second[:, :, -1:]
    p_second *= p_first[:, :, -1:]


def _intra_scores(q: Tensor, k: Tensor, g: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, list]:
    """Scores A `[G, C, C]` (lower triangle), whole-chunk exp(P), exp(R) `[G, C, K]`; with `keep` each level's factors.

    The decays are products of at most 1 + log2 C factors from 0 to 1: one exponential a token, and no overflow.
    """
    groups, size, _ = q.shape
    scores = q.new_zeros(groups, size, size)
    scores.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    prefix, suffix = g.exp(), torch.ones_like(g)
    factors, m = [], 1
    while m < size:
        decay_q, decay_k = _halves(prefix, m)[1], _halves(suffix, m)[0]
        q_dec, k_dec = _halves(q, m)[1] * decay_q, _halves(k, m)[0] * decay_k
        _score_blocks(scores, m).copy_(q_dec @ k_dec.mT)
        if keep:
            factors.append((decay_q.clone(), decay_k.clone(), q_dec, k_dec))
        _merge(prefix, suffix, m)
        m *= 2
    return scores, prefix, suffix, factors


def _intra_backward(dscores: Tensor, q: Tensor, k: Tensor, factors: list, grads: tuple[Tensor, ...]) -> None:
    """Add the gradients through the scores to (dq, dk, dP, dR) `[G, C, K]` in place; dP ends as the gradient of g.

    From the largest level to the smallest: dP and dR of blocks of 2m are handed down to m the way `_merge` built them.
    """
    dq, dk, dprefix, dsuffix = grads
    # the pair i = j carries no decay: it enters dq and dk, never dg
    diagonal = dscores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    dq.addcmul_(diagonal, k)
    dk.addcmul_(diagonal, q)
    m = q.shape[1] // 2
    for decay_q, decay_k, q_dec, k_dec in reversed(factors):
        p_first, p_second = _halves(dprefix, m)
        r_first, _ = _halves(dsuffix, m)
        p_first[:, :, -1] += p_second.sum(2)
        p_second[:, :, -1] += r_first.sum(2)
        block = _score_blocks(dscores, m).contiguous()
        if m == 1:  # a matrix product of single rows costs more than its arithmetic
            dq_dec, dk_dec = block * k_dec, block * q_dec
        else:
            dq_dec, dk_dec = block @ k_dec, block.mT @ q_dec
        _halves(dq, m)[1].addcmul_(dq_dec, decay_q)
        _halves(dk, m)[0].addcmul_(dk_dec, decay_k)
        p_second.addcmul_(dq_dec, q_dec)
        r_first.addcmul_(dk_dec, k_dec)
        m //= 2


def _slabs(x: Tensor) -> list[slice]:
    """Slices of the G chunks of x `[G, C, K]` that fit in a core's cache: the levels make many passes over them."""
    groups, size, dim = x.shape
    step = max(1, _SLAB_ELEMENTS // (size * dim)) if x.device.type == "cpu" else groups
    return [slice(i, min(i + step, groups)) for i in range(0, groups, step)]


class _ChunkedScan(torch.autograd.Function):
    """q, k, v, g `[R, N, C, K]` (R rows) -> o, and the states `[R, N, K, V]` after each chunk.

    Chunk 0 starts from `start[:, 0]`; with `first` `[N]` so does each chunk n where first[n], from `start[:, n]`.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, start, first):
        rows, n_chunks, size, dim = q.shape
        q_, k_, v_, g_ = (x.reshape(-1, size, dim) for x in (q, k, v, g))
        o, q_dec = torch.empty_like(q_), torch.empty_like(q_)
        after = q_.new_empty(len(q_), dim, dim)  # first what each chunk adds to the state, then the state itself
        decay = q_.new_empty(len(q_), dim, 1)
        for s in _slabs(q_):
            scores, decay_q, decay_k, _ = _intra_scores(q_[s], k_[s], g_[s], keep=False)
            o[s].baddbmm_(scores, v_[s], beta=0)  # writes in place: no temporary to copy from
            after[s].baddbmm_(decay_k.mul_(k_[s]).mT, v_[s], beta=0)
            decay[s] = decay_q[:, -1].unsqueeze(-1)
            q_dec[s] = decay_q.mul_(q_[s])
        after, decay = after.unflatten(0, (rows, n_chunks)), decay.unflatten(0, (rows, n_chunks))
        state = start[:, 0]
        for n in range(n_chunks):
            if n and first is not None:
                state = torch.where(first[n], start[:, n], state)
            state = after[:, n].addcmul_(decay[:, n], state)
        before = torch.cat([start[:, :1], after[:, :-1]], dim=1)
        if first is not None:
            before[:, 1:] = torch.where(first[1:, None, None], start[:, 1:], before[:, 1:])
        o.baddbmm_(q_dec, before.flatten(0, 1))
        ctx.save_for_backward(q, k, v, g, before, first)
        return o.view_as(q), after

    @staticmethod
    def backward(ctx, do, dafter):
        refuse_second_derivatives()
        q, k, v, g, before, first = ctx.saved_tensors
        rows, n_chunks, size, dim = q.shape
        q_, k_, v_, g_, do_ = (x.reshape(-1, size, dim) for x in (q, k, v, g, do))
        dbefore = torch.empty_like(before)
        decay = q_.new_empty(len(q_), dim, 1)
        for s in _slabs(q_):
            decay_q = g_[s].cumsum(1).exp_()
            decay[s] = decay_q[:, -1].unsqueeze(-1)
            dbefore.flatten(0, 1)[s] = decay_q.mul_(q_[s]).mT @ do_[s]
        decay = decay.unflatten(0, (rows, n_chunks))

        # between chunks: dstate is the gradient of the state after chunk n, gathered from the last chunk back
        dstates = torch.empty_like(dbefore)
        dstart = dbefore.new_zeros(rows, 1 if first is None else n_chunks, dim, dim)
        carried = torch.zeros_like(dbefore[:, 0])
        for n in reversed(range(n_chunks)):
            dstate = dafter[:, n] + carried
            dstates[:, n] = dstate
            carried = torch.addcmul(dbefore[:, n], decay[:, n], dstate)
            if n == 0:
                dstart[:, 0] = carried
            elif first is not None:
                dstart[:, n] = torch.where(first[n], carried, 0)
                carried = torch.where(first[n], 0, carried)
        ddecay = (dstates * before).sum(-1).mul_(decay.squeeze(-1)).flatten(0, 1)

        dq, dk, dv, dg = (torch.empty_like(x) for x in (q_, k_, v_, g_))
        before_, dstates_ = before.flatten(0, 1), dstates.flatten(0, 1)
        for s in _slabs(q_):
            scores, decay_q, decay_k, factors = _intra_scores(q_[s], k_[s], g_[s], keep=True)
            k_dec = k_[s] * decay_k
            dv[s] = torch.baddbmm(k_dec @ dstates_[s], scores.mT, do_[s])
            dq[s] = (do_[s] @ before_[s].mT).mul_(decay_q)
            dk[s] = (v_[s] @ dstates_[s].mT).mul_(decay_k)
            dprefix, dsuffix = dq[s] * q_[s], dk[s] * k_[s]
            dprefix[:, -1] += ddecay[s]
            _intra_backward(do_[s] @ v_[s].mT, q_[s], k_[s], factors, (dq[s], dk[s], dprefix, dsuffix))
            dg[s] = dprefix
        return dq.view_as(q), dk.view_as(q), dv.view_as(q), dg.view_as(q), dstart, None


def _to_chunks(x: Tensor, size: int) -> Tensor:
    """`[B, N * C, H, K]` -> `[B * H, N, C, K]`."""
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4).flatten(0, 1)


def chunked_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None = None,
    *,
    direction: str = "forward",
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q_act: str | None = None,
    v_act: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scan in chunks; arguments as `hgrn2.ops.hgrn2_scan`. Compiled or exported code is specialised on T.

    Returns:
        o in the dtype of q, and the final state (None for both directions).
    """
    dtype, out_dtype = compute_dtype(q), q.dtype
    with without_autocast(q):
        pad = None if lengths is None else padding_mask(q, lengths)
        if pad is not None:
            q, f, v = (x.masked_fill(pad, 0) for x in (q, f, v))
        q, v = activate(q.to(dtype), q_act), activate(v.to(dtype), v_act)
        k, g = forget_gate(f.to(dtype), None if lower_bound is None else lower_bound.to(dtype))
        if pad is not None:  # the state passes through padding unchanged, and nothing is read from it
            q, k, g = (x.masked_fill(pad, 0) for x in (q, k, g))
        state = None if initial_state is None else initial_state.to(dtype)
        streams = (q, k, v, g)
        if direction == "forward":
            o, final = _ahead(*streams, state, cu_seqlens)
        elif direction == "reverse":
            o, final = _back(*streams, state, cu_seqlens)
        elif cu_seqlens is not None:
            o, final = _ahead(*streams, None, cu_seqlens)[0] + _back(*streams, None, cu_seqlens)[0], None
        else:  # both directions as one batch: half the launches
            o, _ = _rows(*(torch.cat([x, x.flip(1)]) for x in streams), None)
            ahead, back = o.chunk(2)
            o, final = ahead + back.flip(1), None
    return o.to(out_dtype), final


def _ahead(q, k, v, g, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """The scan from the first token to the last."""
    if cu_seqlens is None:
        return _rows(q, k, v, g, state)
    return _packed(q, k, v, g, state, cu_seqlens)


def _back(q, k, v, g, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """The scan from the last token to the first: the other one on flipped time (and documents in flipped order)."""
    streams = (x.flip(1) for x in (q, k, v, g))
    if cu_seqlens is None:
        o, final = _rows(*streams, state)
        return o.flip(1), final
    flipped = None if state is None else state.flip(0)
    o, final = _packed(*streams, flipped, q.shape[1] - cu_seqlens.flip(0))
    return o.flip(1), final.flip(0)


def _rows(q, k, v, g, state) -> tuple[Tensor, Tensor]:
    """One document a row: `[B, T, H, K]` -> o `[B, T, H, V]` and final state `[B, H, K, V]`."""
    batch, time, heads, dim = q.shape
    size = chunk_size(dim, time)
    extra = -time % size
    if extra:  # k = 0 and g = 0 leave the state alone
        q, k, v, g = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, extra)) for x in (q, k, v, g))
    q, k, v, g = (_to_chunks(x, size) for x in (q, k, v, g))
    start = q.new_zeros(batch * heads, 1, dim, dim) if state is None else state.flatten(0, 1).unsqueeze(1)
    o, after = _ChunkedScan.apply(q, k, v, g, start, None)
    o = o.unflatten(0, (batch, heads)).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :time]
    return o, after[:, -1].unflatten(0, (batch, heads))


def _packed(q, k, v, g, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Documents packed in one row: each is laid out from a chunk's start on, so that a chunk has one document.

    All shapes follow from T and N alone, so `cu_seqlens` stays on its device.
    """
    _, time, heads, dim = q.shape
    size = chunk_size(dim, time)
    bounds = cu_seqlens.long()
    n_docs = bounds.numel() - 1
    n_chunks = (time + size - 1) // size + n_docs  # an upper bound: each document adds at most one partial chunk
    lengths = bounds.diff()
    chunks_of = (lengths + size - 1) // size
    chunk_end = chunks_of.cumsum(0)
    chunk_start = chunk_end - chunks_of
    token = torch.arange(time, device=q.device)
    doc_of_token = torch.searchsorted(bounds[1:], token, right=True)
    slot = chunk_start[doc_of_token] * size + token - bounds[doc_of_token]
    # empty slots: k = 0 and g = 0 leave the state alone
    q, k, v, g = (x.new_zeros(1, n_chunks * size, heads, dim).index_copy(1, slot, x) for x in (q, k, v, g))
    q, k, v, g = (_to_chunks(x, size) for x in (q, k, v, g))
    chunk = torch.arange(n_chunks, device=q.device)
    doc_of_chunk = torch.searchsorted(chunk_end, chunk, right=True).clamp(max=n_docs - 1)
    first = chunk == chunk_start[doc_of_chunk]
    initial = q.new_zeros(n_docs, heads, dim, dim) if state is None else state
    start = initial[doc_of_chunk].transpose(0, 1)  # [H, N, K, V]
    o, after = _ChunkedScan.apply(q, k, v, g, start, first)
    o = o.permute(1, 2, 0, 3).flatten(0, 1)[slot].unsqueeze(0)
    last = after.transpose(0, 1)[(chunk_end - 1).clamp(min=0)]
    return o, torch.where((lengths == 0)[:, None, None, None], initial, last)
