"""What the parts of bench.py and gpu.py share: models with random weights, inputs, time, FLOPs, memory.

Importing this file makes the modules of the repository importable.
"""
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fast
from generator import mask_ratio


def random_weights(model, device, training=False):
    """Fills the parameters that are all zero, which could run faster than real ones; frozen unless for training."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    model.to(device)
    return model.train() if training else model.eval().requires_grad_(False)


def completed(preset):
    """The preset with a generator for the codes of its prior, as train.py completes it."""
    return replace(preset, generator=replace(preset.generator, vocab=preset.prior.vocab, code_dim=preset.prior.dim))


def classes_and_codes(config, B, device):
    """Classes [B] and random codes [B, codes] for a generator."""
    classes = torch.arange(B, device=device) % config.classes
    return classes, torch.randint(config.vocab, (B, config.codes), device=device)


def average_draws(model, B):
    """The random numbers of a training step that masks the average number of tokens and drops no class."""
    L, low, draws = model.config.grid**2, model.config.mask_min, model.draw(B, uniform=0.5)
    masked = round(L * statistics.mean(mask_ratio((i + 0.5) / 100, low) for i in range(100)))
    mask = torch.rand(B, L, device=draws.mask.device).argsort(dim=1) < masked
    return draws._replace(mask=mask.float(), masked=masked, drop=torch.zeros_like(draws.drop))


def seconds(call, device):
    """Wall time of one call, including the work that it leaves to the device."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def matmul_rate(device, dtype=torch.float32, n=2048):
    """FLOP/s of a product of n x n matrices, the best of five."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def count_flops(call):
    """FLOPs of one call, which runs. The counter misses a CPU's attention and fast.FewRows: here they are products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), patch.object(fast, "ONEDNN", False):
        call()
    return counter.get_total_flops()


def peak_memory(device):
    """MB. On CUDA the most that tensors took since the last reset; on a CPU the most that the process ever took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
