"""The scan: every implementation against the fp64 loop; outputs, all gradients, states, extreme gates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hgrn2.ops import choose_impl, hgrn2_scan, hgrn2_scan_2d, hgrn2_step
from hgrn2.ops.gates import forget_gate

FP32 = 5e-6  # a few hundred roundings of 6e-8
TINY = 1e-30  # gradients below this are 0 for fp32


def make_inputs(batch, time, heads, dim, *, loc=0.0, scale=1.0, gamma=True, docs=None, seed=0):
    """fp64 inputs that fp32 represents exactly."""
    g = torch.Generator().manual_seed(seed)
    q, f, v = (torch.randn(batch, time, heads, dim, generator=g).double() for _ in range(3))
    lower_bound = torch.rand(heads, dim, generator=g).double() * 0.9 if gamma else None
    state = torch.randn(docs or batch, heads, dim, dim, generator=g).double()
    return q, (f * scale + loc).float().double(), v, lower_bound, state


def run(impl, dtype, inputs, **options):
    """Outputs and gradients by name, for a fixed random-looking loss."""
    both = options.get("direction") == "both"
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    q, f, v, lower_bound, state = leaves
    o, final = hgrn2_scan(
        q, f, v, lower_bound,
        initial_state=None if both else state, output_final_state=not both, impl=impl, **options,
    )  # fmt: skip
    assert o.dtype == dtype
    weight = torch.arange(o.numel(), dtype=torch.float64).mul(0.7).sin().view_as(o).to(dtype)
    loss = (o * weight).sum()
    results = {"o": o}
    if not both:
        results["final_state"] = final
        weight = torch.arange(final.numel(), dtype=torch.float64).mul(0.3).cos().view_as(final).to(dtype)
        loss = loss + (final * weight).sum()
    names = ["q", "f", "v", "lower_bound", *([] if both else ["initial_state"])]
    wanted = [(n, x) for n, x in zip(names, leaves, strict=False) if x is not None]
    grads = torch.autograd.grad(loss, [x for _, x in wanted])
    return results | {f"d{name}": grad for (name, _), grad in zip(wanted, grads, strict=True)}


def assert_close(got, want, tolerance, **context):
    assert got.keys() == want.keys()
    for name, reference in want.items():
        assert torch.isfinite(got[name]).all(), (name, context)
        error = (got[name].double() - reference).norm() / (reference.norm() + TINY)
        assert error < tolerance, f"{name}: relative error {error:.2e} {context}"


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize(
    "shape", [(2, 1, 2, 4), (2, 63, 2, 16), (1, 65, 3, 1), (1, 130, 2, 32), (2, 40, 1, 64), (1, 70, 1, 128)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.usefixtures("poisoned_empty")
def test_torch_form_equals_the_loop(direction, shape, dtype):
    inputs = make_inputs(*shape)
    options = {"direction": direction, "q_act": "sigmoid", "v_act": "silu"}
    want = run("reference", torch.float64, inputs, **options)
    assert_close(run("torch", dtype, inputs, **options), want, 1e-12 if dtype == torch.float64 else FP32)


@pytest.mark.parametrize("gamma", [True, False], ids=["gamma", "no gamma"])
@pytest.mark.parametrize(("loc", "scale"), [(3, 1), (-4, 1), (-8, 1), (-60, 1), (-100, 0), (100, 0), (0, 50)])
def test_strong_and_weak_decay(loc, scale, gamma):
    inputs = make_inputs(2, 97, 2, 16, loc=loc, scale=scale, gamma=gamma)
    want = run("reference", torch.float64, inputs)
    assert_close(run("torch", torch.float32, inputs), want, FP32 if loc > -50 else math.inf, loc=loc, scale=scale)
    if loc <= -50:  # df is far below fp32's smallest number where the gates are shut
        for name, value in run("torch", torch.float32, inputs).items():
            if name != "df":
                assert_close({name: value}, {name: want[name]}, FP32, loc=loc)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("bound", [None, 0.0, 1e-3, 0.5])
@pytest.mark.parametrize("value", [100.0, -100.0, math.inf, -math.inf])
def test_extreme_logits_give_finite_results(impl, bound, value):
    q, f, v, _, state = make_inputs(1, 40, 2, 8)
    f[:, 3::7] = value
    lower_bound = None if bound is None else torch.full((2, 8), bound).float().double()
    want = run("reference", torch.float64, (q, f, v, lower_bound, state))
    got = run(impl, torch.float32, (q, f, v, lower_bound, state))
    if bound == 0.0:  # ill-conditioned where gates are shut: finite is all that is promised
        assert torch.isfinite(got.pop("dlower_bound")).all()
        want.pop("dlower_bound")
    assert_close(got, want, FP32, bound=bound, value=value)


def test_one_step_decay_of_100_is_exact():
    """A document's memory cut by exp(-100) once: what follows sees only what came after."""
    q, f, v, _, _ = make_inputs(1, 64, 1, 16, gamma=False)
    f[:, 31] = -100.0
    full, _ = hgrn2_scan(q, f, v, impl="torch")
    tail, _ = hgrn2_scan(q[:, 31:], f[:, 31:], v[:, 31:], impl="torch")
    torch.testing.assert_close(full[:, 31:], tail, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_lengths(direction):
    inputs = make_inputs(4, 50, 2, 16)
    lengths = torch.tensor([0, 1, 33, 50], dtype=torch.int32)
    options = {"direction": direction, "lengths": lengths, "v_act": "silu"}
    assert_close(
        run("torch", torch.float32, inputs, **options), run("reference", torch.float64, inputs, **options), FP32
    )


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
def test_padding_is_never_read(impl, direction):
    q, f, v, lower_bound, state = make_inputs(2, 20, 2, 4)
    lengths = torch.tensor([7, 20])
    options = {"direction": direction, "lengths": lengths, "q_act": "silu"}
    want = run(impl, torch.float32, (q, f, v, lower_bound, state), **options)
    for x in (q, f, v):
        x[0, 7:] = math.nan
    got = run(impl, torch.float32, (q, f, v, lower_bound, state), **options)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert not got["o"][0, 7:].any()
    assert not got["dq"][0, 7:].any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_padded_row_is_the_row_alone(direction):
    q, f, v, lower_bound, state = make_inputs(2, 20, 2, 4)
    o, final = hgrn2_scan(
        q, f, v, lower_bound, direction=direction, initial_state=state, output_final_state=True,
        lengths=torch.tensor([7, 20]),
    )  # fmt: skip
    alone, final_alone = hgrn2_scan(
        *(x[:1, :7] for x in (q, f, v)), lower_bound, direction=direction, initial_state=state[:1],
        output_final_state=True,
    )  # fmt: skip
    torch.testing.assert_close(o[:1, :7], alone)
    torch.testing.assert_close(final[:1], final_alone)


@pytest.mark.parametrize("direction", ["forward", "reverse", "both"])
@pytest.mark.parametrize("bounds", [[0, 60], [0, 0, 13, 13, 14, 60, 60], [0, 16, 32, 60], [0, 1, 2, 60]], ids=str)
def test_documents_packed_in_a_row(direction, bounds):
    inputs = make_inputs(1, 60, 2, 16, docs=len(bounds) - 1)
    options = {"direction": direction, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    assert_close(
        run("torch", torch.float32, inputs, **options), run("reference", torch.float64, inputs, **options), FP32
    )


@hypothesis_settings(max_examples=25)
@given(
    time=st.integers(1, 150),
    dim=st.sampled_from([1, 2, 4, 8, 16, 32]),
    direction=st.sampled_from(["forward", "reverse", "both"]),
    loc=st.floats(-12, 12),
    scale=st.floats(0, 8),
    packing=st.sampled_from(["none", "lengths", "documents"]),
    acts=st.tuples(*[st.sampled_from([None, "silu", "sigmoid"])] * 2),
    data=st.data(),
)
def test_any_shape_and_gate(time, dim, direction, loc, scale, packing, acts, data):
    options = {"direction": direction, "q_act": acts[0], "v_act": acts[1]}
    batch, docs = 2, None
    if packing == "lengths":
        options["lengths"] = torch.tensor(data.draw(st.lists(st.integers(0, time), min_size=2, max_size=2)))
    elif packing == "documents":
        inner = sorted(data.draw(st.lists(st.integers(0, time), max_size=5)))
        options["cu_seqlens"], batch, docs = torch.tensor([0, *inner, time]), 1, len(inner) + 1
    inputs = make_inputs(batch, time, 2, dim, loc=loc, scale=scale, docs=docs)
    want = run("reference", torch.float64, inputs, **options)
    assert_close(run("torch", torch.float64, inputs, **options), want, 1e-9, **options)


def test_low_precision_inputs_keep_fp32_gates_and_states():
    inputs = [x.bfloat16().double() if i < 3 else x for i, x in enumerate(make_inputs(2, 80, 2, 32))]
    q, f, v, lower_bound, state = inputs
    want, final_want = hgrn2_scan(*inputs[:4], initial_state=state, output_final_state=True, impl="reference")
    o, final = hgrn2_scan(
        q.bfloat16(), f.bfloat16(), v.bfloat16(), lower_bound.float(),
        initial_state=state.float(), output_final_state=True, impl="torch",
    )  # fmt: skip
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert (final - final_want).norm() / final_want.norm() < FP32
    assert (o.double() - want).norm() / want.norm() < 2 * 2**-9  # bf16's own rounding of the output


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_changes_nothing(impl):
    q, f, v, lower_bound, _ = (x.float() for x in make_inputs(1, 40, 2, 16))
    want, _ = hgrn2_scan(q, f, v, lower_bound, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = hgrn2_scan(q, f, v, lower_bound, impl=impl)
    assert torch.equal(got, want)


def test_gradients_through_a_packed_projection():
    """q, f, v as strided views of one `[B, T, 3, H, K]` projection."""
    packed = torch.randn(2, 33, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    v, q, f = packed.unbind(2)
    grads = [
        torch.autograd.grad(hgrn2_scan(q, f, v, impl=impl)[0].square().sum(), packed, retain_graph=True)[0]
        for impl in ("torch", "reference")
    ]
    torch.testing.assert_close(*grads)


def test_two_dimensional_scan_is_the_sum_of_four():
    q, f, v = (torch.randn(2, 5, 7, 2, 4, dtype=torch.float64) for _ in range(3))
    lower_bound = torch.rand(2, 4, dtype=torch.float64)
    want = torch.zeros_like(q)
    for y in range(5):
        want[:, y] += hgrn2_scan(q[:, y], f[:, y], v[:, y], lower_bound, direction="both", impl="reference")[0]
    for x in range(7):
        want[:, :, x] += hgrn2_scan(
            q[:, :, x], f[:, :, x], v[:, :, x], lower_bound, direction="both", impl="reference"
        )[0]
    torch.testing.assert_close(hgrn2_scan_2d(q, f, v, lower_bound), want)


def test_steps_equal_the_scan():
    q, f, v, lower_bound, state = make_inputs(2, 9, 2, 8)
    options = {"q_act": "silu", "v_act": "sigmoid"}
    want, final = hgrn2_scan(q, f, v, lower_bound, initial_state=state, output_final_state=True, **options)
    running = state.clone()
    for t in range(9):
        o = hgrn2_step(q[:, t], f[:, t], v[:, t], running, lower_bound, **options)
        torch.testing.assert_close(o, want[:, t])
    torch.testing.assert_close(running, final)


def test_gates_keep_precision_at_both_ends():
    f = torch.tensor([-100.0, -15.0, -1.0, 0.0, 1.0, 15.0, 25.0, 100.0])
    for bound in (None, 0.0, 1e-3, 0.9):
        gamma = None if bound is None else torch.tensor(bound)
        k, g = forget_gate(f, gamma)
        wide = f.double()
        low = bound or 0.0
        k_want = (1 - torch.tensor(low).float().double()) * torch.sigmoid(-wide)
        torch.testing.assert_close(k.double(), k_want, rtol=1e-6, atol=1e-40)  # denormals may be flushed
        lam = torch.tensor(low).float().double() + (1 - torch.tensor(low).float().double()) * torch.sigmoid(wide)
        g_want = torch.where(k_want < 0.5, torch.log1p(-k_want), lam.log())
        torch.testing.assert_close(g.double(), g_want, rtol=2e-6, atol=1e-40)


def test_compile_has_no_graph_break():
    q, f, v = (torch.randn(1, 24, 2, 8, requires_grad=True) for _ in range(3))
    bound = torch.rand(2, 8)

    def loss(q, f, v):
        return hgrn2_scan(q, f, v, bound, direction="both", v_act="silu")[0].square().sum()

    want = torch.autograd.grad(loss(q, f, v), (q, f, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(torch.autograd.grad(compiled(q, f, v), (q, f, v)), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_memory_is_linear_in_time():
    """What autograd keeps grows with T, not with T^2."""

    def kept_bytes(time):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        q, f, v = (torch.randn(1, time, 1, 16, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hgrn2_scan(q, f, v)
        return total

    assert kept_bytes(4096) <= 2.1 * kept_bytes(2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "cuda"}, "impl='cuda'.*auto.*reference"),
        ({"impl": "triton"}, "impl='triton' cannot run here"),
        ({"direction": "left"}, "direction='left'.*forward.*reverse.*both"),
        ({"q_act": "relu"}, "q_act='relu'.*silu"),
        ({"direction": "both", "output_final_state": True}, "both.*no states"),
        ({"lengths": torch.tensor([3])}, "one entry a row"),
        ({"lengths": torch.tensor([3.0, 2.0])}, "lengths must be 1-D int32"),
        ({"lengths": torch.tensor([3, 3]), "cu_seqlens": torch.tensor([0, 5])}, "exclude each other"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "B = 1"),
        ({"lengths": torch.tensor([3, 6])}, "lengths must be from 0 to T = 5"),
        ({"initial_state": torch.zeros(2, 2, 4, 3)}, r"initial_state must be .*\(2, 2, 4, 4\)"),
        ({"lower_bound": torch.zeros(4, 2)}, r"lower_bound must be \[H, K\]"),
        ({"lower_bound": torch.zeros(2, 4, device="meta")}, "lower_bound must be on cpu as q is, got meta"),
        ({"initial_state": torch.zeros(2, 2, 4, 4, device="meta")}, "initial_state must be on cpu as q is, got meta"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else next(iter(x)),
)
def test_bad_arguments_are_named(change, message):
    q, f, v = (torch.randn(2, 5, 2, 4) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        hgrn2_scan(q, f, v, **change)


@pytest.mark.parametrize("bounds", [[0, 4, 8], [2, 10], [0, 12], [0, 7, 3, 10]], ids=str)
def test_bad_document_boundaries_are_named(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 10"):
        hgrn2_scan(*[torch.randn(1, 10, 2, 4)] * 3, cu_seqlens=torch.tensor(bounds))


def test_bad_shapes_are_named():
    q = torch.randn(2, 5, 2, 4)
    with pytest.raises(ValueError, match="head dim 3 is not supported"):
        hgrn2_scan(*[torch.randn(1, 2, 3, 3)] * 3)
    with pytest.raises(ValueError, match="q, f and v must agree"):
        hgrn2_scan(q, q[:, 1:], q)
    with pytest.raises(ValueError, match="int64"):
        hgrn2_scan(*[q.long()] * 3)
    with pytest.raises(ValueError, match="updated in place"):
        hgrn2_step(q[:, 0], q[:, 0], q[:, 0], torch.zeros(2, 2, 4, 4).double())
    with pytest.raises(ValueError, match="impl='triton' cannot run here"):
        hgrn2_step(q[:, 0], q[:, 0], q[:, 0], torch.zeros(2, 2, 4, 4), impl="triton")


def test_the_choice_of_implementation_has_a_reason():
    name, reason = choose_impl("cpu", 32)
    assert name == "torch"
    assert "cpu" in reason
