"""Fused decoding takes only modules that consist of exactly what it consumes: whatever is added to one shows here."""

import pytest
import torch
from torch import nn

from hgrn2 import HGRN2Config, HGRN2Mixer
from hgrn2.backbone import Block
from hgrn2.fused import block_consists, glu_consists, mixer_consists, norm_consists
from hgrn2.layers import DropPath

PARTS = ("", "mixer_norm", "mixer", "mixer.in_proj", "mixer.norm", "mixer.out_proj", "glu_norm", "dropout", "drop_path")
PARTS += tuple(f"glu{part}" for part in ("", ".fc1", ".act", ".drop1", ".norm", ".fc2", ".drop2"))


def make(**options) -> Block:
    return Block(HGRN2Config(dim=16, depth=2, expand_ratio=4, glu_width=16, **options), drop_path=0.1).eval()


def consists(block: Block) -> bool:
    mixer = mixer_consists(block.mixer, HGRN2Mixer)
    return mixer and block_consists(block, Block) and norm_consists(block.glu_norm) and glu_consists(block.glu)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "simple_rmsnorm"])
@pytest.mark.parametrize("act", ["silu", "sigmoid", None])
@pytest.mark.parametrize("bias", [True, False])
def test_our_modules_are_what_fused_decoding_consumes(norm, act, bias):
    """Fails for whoever adds something to them: add it to `hgrn2.fused`, or have this configuration expect False."""
    assert consists(make(norm=norm, mixer_norm=norm, glu_act=act, bias=bias, glu_bias=bias))
    assert block_consists(Block(HGRN2Config(dim=16, expand_ratio=4)).eval(), Block)


@pytest.mark.parametrize("options", [dict(norm="batchnorm"), dict(glu_act="gelu")])
def test_what_it_cannot_do_takes_the_plain_step(options):
    assert not consists(make(**options))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", ["parameter", "buffer", "child", "hook", "pre-hook", "forward", "subclass"])
def test_any_addition_is_seen(part, what):
    block = make()
    module = block.get_submodule(part)
    if what == "parameter":
        module.scale = nn.Parameter(torch.ones(4))
    elif what == "buffer":
        module.register_buffer("scale", torch.ones(4))
    elif what == "child":
        module.more = nn.Identity()
    elif what == "hook":
        module.register_forward_hook(lambda *_: None)
    elif what == "pre-hook":
        module.register_forward_pre_hook(lambda *_: None)
    elif what == "forward":
        module.forward = lambda x: x
    else:
        module.__class__ = type("Other", (type(module),), {})
    assert not consists(block)


def test_losses_of_parts_modes_and_hooks_on_all_modules_are_seen():
    for change in (
        lambda block: block.train(),
        lambda block: block.dropout.train(),
        lambda block: block.drop_path.train(),
        lambda block: setattr(block.glu, "gate_last", True),
        lambda block: setattr(block.glu.drop1, "p", 0.5),
        lambda block: setattr(block, "drop_path", nn.Dropout()),
        lambda block: setattr(block.mixer, "norm", nn.LayerNorm((4, 4))),
        lambda block: setattr(block.mixer, "out_proj", nn.Bilinear(16, 16, 16)),
        lambda block: nn.utils.parametrizations.weight_norm(block.mixer.in_proj),
    ):
        block = make()
        assert type(block.drop_path) is DropPath
        assert consists(block)
        change(block)
        assert not consists(block), change
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not consists(make())
    hook.remove()
    assert consists(make())
