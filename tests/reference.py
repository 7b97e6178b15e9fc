"""Inception for tests: weights made by a rule, and the network as pytorch-fid computes it."""
import math
import zlib

import numpy as np
import torch
from torch import nn

import fid


def rule_weights():
    """Every tensor of the published layout, drawn from a seed that its name gives."""
    shapes, c = {}, 3
    with torch.device("meta"):
        for name, text in map(str.split, fid.STEM):
            shapes[name] = (unit := fid.convolution(c, text)).weight.shape
            c = unit.out_channels
        for name, layout, width, pooling in fid.BLOCKS:
            block = fid.Mixed(c, layout.format(width), pooling)
            shapes |= {f"{name}.{k}": unit.weight.shape for k, unit in block.named_children()}
            c = block.cout

    def draw(key, make):
        random = np.random.RandomState((20151205 + zlib.crc32(key.encode())) % 2**32)
        return {key: torch.from_numpy(make(random)).float()}

    state = {}
    for unit, shape in shapes.items():
        n, fan_in = shape[0], math.prod(shape[1:])
        state |= draw(f"{unit}.conv.weight", lambda r: r.standard_normal(shape) * np.sqrt(2 / fan_in))
        state |= draw(f"{unit}.bn.weight", lambda r: r.uniform(0.9, 1.1, n))
        state |= draw(f"{unit}.bn.bias", lambda r: 0.1 * r.standard_normal(n))
        state |= draw(f"{unit}.bn.running_mean", lambda r: 0.1 * r.standard_normal(n))
        state |= draw(f"{unit}.bn.running_var", lambda r: r.uniform(0.8, 1.25, n))
    state |= draw("fc.weight", lambda r: 0.25 * r.standard_normal((1008, 2048)))
    return state | draw("fc.bias", lambda r: 0.5 * r.standard_normal(1008))


def plain_inception(path, resize="torch"):
    """fid.Inception as pytorch-fid computes it: batch norms of their own, channels first."""
    model, weights = fid.Inception(path, resize).to(memory_format=torch.contiguous_format), torch.load(path)
    for name, unit in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]:
        conv = nn.Conv2d(unit.in_channels, unit.out_channels, unit.kernel_size, unit.stride, unit.padding, bias=False)
        both = nn.Sequential(conv, nn.BatchNorm2d(unit.out_channels, eps=0.001))
        keys = zip(("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"),
                   ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
        both.load_state_dict({mine: weights[f"{name}.{its}"] for mine, its in keys}, strict=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, both)
    return model.eval().requires_grad_(False)
