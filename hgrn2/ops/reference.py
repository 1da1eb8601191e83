"""The truth: HGRN2's recurrence as a plain loop, in the words of the paper (arXiv 2404.07904, section 3).

Per head, with key dim K = value dim V = `expand_ratio` and S in R^{K x V}:

    lam_t = gamma + (1 - gamma) sigmoid(f_t)        k_t = (1 - gamma) sigmoid(-f_t)
    S_t   = diag(lam_t) S_{t-1} + k_t (x) v_t
    o_t   = S_t^T q_t

Every other implementation is tested against this one.
Legend: B batch, T time, H heads, K key dim, V value dim, N documents.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2.ops.gates import activate, without_autocast


def compute_dtype(x: Tensor) -> torch.dtype:
    """Gates and states are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def padding_mask(x: Tensor, lengths: Tensor) -> Tensor:
    """True at padded tokens: `[B, T, 1, 1]` for x `[B, T, H, K]` and lengths `[B]`."""
    t = torch.arange(x.shape[1], device=x.device)
    return (t >= lengths[:, None].to(t.dtype))[:, :, None, None]


def recurrent_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None = None,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    q_act: str | None = None,
    v_act: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of the scan, one token at a time; arguments as `hgrn2.ops.hgrn2_scan`.

    Returns:
        o `[B, T, H, V]` in the dtype of q and the final state `[B, H, K, V]` (`[N, H, K, V]` with `cu_seqlens`) in
        fp32, or fp64 for fp64 inputs. Differentiable through autograd.
    """
    if cu_seqlens is not None:
        return _documents(q, f, v, lower_bound, reverse, initial_state, cu_seqlens, q_act, v_act)
    with without_autocast(q):
        return _row(q, f, v, lower_bound, reverse, initial_state, lengths, q_act, v_act)


def _row(q, f, v, lower_bound, reverse, initial_state, lengths, q_act, v_act) -> tuple[Tensor, Tensor]:
    """One document a row."""
    batch, time, heads, dim = q.shape
    dtype = compute_dtype(q)
    out_dtype = q.dtype
    q, f, v = q.to(dtype), f.to(dtype), v.to(dtype)
    if lengths is not None:
        pad = padding_mask(q, lengths)
        q, f, v = (x.masked_fill(pad, 0) for x in (q, f, v))
    q, v = activate(q, q_act), activate(v, v_act)
    gamma = torch.zeros(heads, dim, dtype=dtype, device=q.device) if lower_bound is None else lower_bound.to(dtype)
    # exp(logsigmoid) is sigmoid with a derivative that stays accurate where sigmoid itself rounds to 1
    lam = gamma + (1 - gamma) * F.logsigmoid(f).exp()
    k = (1 - gamma) * F.logsigmoid(-f).exp()
    if lengths is not None:  # padding leaves the state alone and writes zeros
        lam, k, q = lam.masked_fill(pad, 1), k.masked_fill(pad, 0), q.masked_fill(pad, 0)
    state = q.new_zeros(batch, heads, dim, dim) if initial_state is None else initial_state.to(dtype)
    outputs = [None] * time
    for t in reversed(range(time)) if reverse else range(time):
        state = lam[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = (q[:, t, :, None, :] @ state).squeeze(-2)
    return torch.stack(outputs, dim=1).to(out_dtype), state


def _documents(q, f, v, lower_bound, reverse, initial_state, cu_seqlens, q_act, v_act) -> tuple[Tensor, Tensor]:
    """Each document of a packed row on its own."""
    bounds = cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        if start == end:
            empty = q.new_zeros(1, q.shape[2], q.shape[3], q.shape[3], dtype=compute_dtype(q))
            finals.append(empty if state is None else state.to(empty.dtype))
            continue
        part = slice(start, end)
        o, final = recurrent_scan(
            q[:, part], f[:, part], v[:, part], lower_bound,
            reverse=reverse, initial_state=state, q_act=q_act, v_act=v_act,
        )  # fmt: skip
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), torch.cat(finals)
