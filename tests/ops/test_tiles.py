"""Which tile runs where: by the device's shared memory, and by what Triton says of it at the first launch."""

import dataclasses
import itertools
import types
import warnings

import pytest
import torch

pytest.importorskip("triton")
import triton

from hgrn2.ops import launch
from hgrn2.ops.chunk import tiles

KIB = 1024


@pytest.mark.parametrize("dim", launch.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_chips_take_the_table_and_others_what_fits(dim, dtype):
    for cut in (tiles.tiles_for(dim, dtype), tiles.pair(tiles.tiles_for(dim, dtype))):
        for field in dataclasses.fields(cut)[1:]:
            tile = getattr(cut, field.name)
            for chip in (163, 227):  # compute capability 8.0, 9.0 and 10.0
                assert tile.candidates(chip * KIB)[0] == tile
            small = tile.candidates(99 * KIB)[0]
            assert small.needs <= 99 * KIB
            assert (small == tile) == (tile.needs <= 99 * KIB)


def test_candidates_get_ever_smaller():
    found = tiles.pair(tiles.tiles_for(128, torch.bfloat16)).grad.candidates(227 * KIB)
    sizes = [(tile.bk, tile.bv, tile.stages) for tile in found]
    assert sizes[:2] == [(64, 64, 2), (64, 64, 1)]
    assert len(set(sizes)) == len(sizes)
    assert all(a[i] >= b[i] for a, b in itertools.pairwise(sizes) for i in range(3))
    assert {tile.warps for tile in found} == {8}


class Kernel:
    """What `launch.Plan` knows of a kernel; takes 1 KiB of shared memory a value of its tile."""

    arg_names = ("x_ptr", "T", "BV")
    params = [types.SimpleNamespace(name=name, is_constexpr=name == "BV") for name in arg_names]
    fn = types.SimpleNamespace(__name__="some_kernel")

    def __init__(self, limit: int, error: Exception | None = None):
        self.limit, self.error, self.calls = limit, error, []

    def __getitem__(self, grid):
        def run(x, time, tile, **options):
            self.calls.append((grid, tile))
            if tile > self.limit:
                raise self.error or triton.OutOfResources(tile * KIB, self.limit * KIB, "shared memory")
            return types.SimpleNamespace(run=f"run {tile}", function=0, packed_metadata=1)

        return run


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRET", False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_too_large", set())
    launch._say_once.cache_clear()


def plan_of(kernel, time: int) -> launch.Plan:
    plan = launch.Plan(key=(0,))
    plan.add_first(kernel, [(256 // bv, dict(num_warps=4), dict(T=time, BV=bv)) for bv in (128, 64, 32)])
    return plan


@pytest.mark.usefixtures("fresh")
def test_a_tile_that_turns_out_too_large_gives_way_to_the_next():
    kernel = Kernel(limit=64)
    with pytest.warns(RuntimeWarning, match="some_kernel runs on a smaller tile: .* 131072 of 65536") as said:
        plan_of(kernel, 10).run(dict(x=torch.zeros(1)))
    assert len(said) == 1
    assert kernel.calls == [((2,), 128), ((4,), 64)]
    # another length: the one that did not fit is not tried again, and the one that did is not compiled again
    plan = plan_of(kernel, 20)
    assert plan._resolve()
    assert [(step[0], step[1]) for step in plan.launches] == [(4, "run 64")]
    assert len(kernel.calls) == 2


@pytest.mark.usefixtures("fresh")
def test_a_tile_that_does_not_compile_gives_way_to_the_next():
    kernel = Kernel(limit=64, error=RuntimeError("PassManager::run failed"))
    with pytest.warns(RuntimeWarning, match="some_kernel runs on a smaller tile: .* fails to compile"):
        plan_of(kernel, 10).run(dict(x=torch.zeros(1)))
    assert [tile for _, tile in kernel.calls] == [128, 64]


@pytest.mark.usefixtures("fresh")
def test_other_errors_are_nobodys_tile():
    kernel = Kernel(limit=64, error=RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        plan_of(kernel, 10).run(dict(x=torch.zeros(1)))
    assert [tile for _, tile in kernel.calls] == [128]


@pytest.mark.usefixtures("fresh")
def test_where_nothing_fits_triton_has_the_last_word():
    kernel = Kernel(limit=16)
    for _ in range(2):
        plan = plan_of(kernel, 10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with pytest.raises(triton.OutOfResources):
                plan.run(dict(x=torch.zeros(1)))
    assert [tile for _, tile in kernel.calls] == [128, 64, 32, 32]


@pytest.mark.usefixtures("fresh")
def test_the_first_tile_where_it_fits(recwarn):
    kernel = Kernel(limit=128)
    plan_of(kernel, 10).run(dict(x=torch.zeros(1)))
    assert [tile for _, tile in kernel.calls] == [128]
    assert not recwarn
