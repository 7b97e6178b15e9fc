"""Inception weights made by a rule, for the official ones cannot be shipped. tests/golden was recorded with them."""
import math
import zlib

import numpy as np
import torch

from inception import ConvBN, Network


def rule_weights() -> dict:
    """The 472 tensors of the published file, each drawn from a seed that follows from its name."""
    def draw(key, make):
        random = np.random.RandomState((20151205 + zlib.crc32(key.encode())) % 2**32)
        state[key] = torch.from_numpy(make(random)).float()

    with torch.device("meta"):
        units = {name: m.conv.weight.shape for name, m in Network().named_modules() if isinstance(m, ConvBN)}
    state = {}
    for unit, shape in units.items():
        n, fan_in = shape[0], math.prod(shape[1:])
        draw(f"{unit}.conv.weight", lambda r: r.standard_normal(shape) * np.sqrt(2 / fan_in))
        draw(f"{unit}.bn.weight", lambda r: r.uniform(0.9, 1.1, n))
        draw(f"{unit}.bn.bias", lambda r: 0.1 * r.standard_normal(n))
        draw(f"{unit}.bn.running_mean", lambda r: 0.1 * r.standard_normal(n))
        draw(f"{unit}.bn.running_var", lambda r: r.uniform(0.8, 1.25, n))
    draw("fc.weight", lambda r: 0.25 * r.standard_normal((1008, 2048)))
    draw("fc.bias", lambda r: 0.5 * r.standard_normal(1008))
    return state
