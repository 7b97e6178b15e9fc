"""The plain form of what the modules compute in a faster one: tests compare results with it, bench.py speed.

Each function does what the official loop does and in its order of work (MAR's sample_tokens, DiffLoss and p_sample,
LlamaGen's generate), on the weights of our modules: every token through every layer, both branches of guidance at
every step, the condition at every iteration, boolean masks, coefficients gathered row by row.
"""
import math
import zlib
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import fid
from diffloss import T, DiffusionHead, spaced_timesteps
from generator import hidden_counts
from prior import draw, rotate


def alpha_bar(t):
    """Cosine schedule in float64, from its definition, as a product of clipped steps. t = -1 is clean."""
    f = lambda i: math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return math.prod(1 - min(1 - f(i + 1) / f(i), 0.999) for i in range(t + 1))


def head_net(net, x_t, t, z):
    """x_t [N, C], t [N], z [N, D] -> [N, 2C]: adaLN computed block by block."""
    freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angles = t[:, None].float() * freqs
    y = net.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + net.cond(z)
    x = net.input(x_t)
    for block in net.blocks:
        shift, scale, gate = block.modulation(F.silu(y)).chunk(3, dim=-1)
        first, _, second = block.mlp
        h = F.silu(F.linear(block.norm(x) * (1 + scale) + shift, first.weight, first.bias))
        x = x + gate * F.linear(h, second.weight, second.bias)
    shift, scale = net.output_modulation(F.silu(y)).chunk(2, dim=-1)
    return net.output(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


@torch.no_grad()
def head_sample(head, z, z_null, cfg, steps, temperature, noise, t_max=T - 1):
    """DiffusionHead.sample: with guidance, state and noise exist twice, and the network is asked about all of it."""
    kept = spaced_timesteps(steps, t_max)
    abar = torch.tensor([alpha_bar(t) for t in kept], dtype=torch.float64)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / previous
    posterior = beta * (1 - previous) / (1 - abar)
    posterior[0] = posterior[1] if steps > 1 else beta[0]
    at = lambda values, i: values.to(z.device)[i].float()[:, None]  # one coefficient per row: [rows, 1]
    guided = z_null is not None
    both = lambda a: torch.cat([a, a]) if guided else a
    z, x, kept = both(z) if not guided else torch.cat([z, z_null]), both(noise[0]), torch.tensor(kept, device=z.device)
    for k, index in enumerate(reversed(range(steps))):
        i = torch.full((len(x),), index, device=x.device)
        eps, v = head_net(head.net, x, kept[i], z).chunk(2, dim=-1)
        if guided:
            cond, null = eps.chunk(2)
            eps = both(null + cfg * (cond - null))
        f = (v + 1) / 2
        logvar = f * at(beta.log(), i) + (1 - f) * at(posterior.log(), i)
        x0 = at((1 / abar).sqrt(), i) * x - at((1 / abar - 1).sqrt(), i) * eps
        mean = at(beta * previous.sqrt() / (1 - abar), i) * x0
        mean = mean + at((1 - previous) * (1 - beta).sqrt() / (1 - abar), i) * x
        x = mean + (i != 0)[:, None] * (0.5 * logvar).exp() * both(noise[k + 1]) * temperature
    return x[:len(noise[0])]


def encode(model, latents, mask, condition):
    """Generator.encode: all rows are embedded and normalised, then boolean indexing keeps those in sight."""
    x = torch.cat([condition.prefix, model.latent_in(latents)], dim=1)                       # [B, P+L, D]
    x = model.encoder_in_norm(x + model.encoder_positions)
    with_prefix = torch.cat([torch.zeros(len(x), model.fusion.slots, device=x.device), mask], dim=1)
    x = x[(1 - with_prefix).nonzero(as_tuple=True)].reshape(len(x), -1, x.shape[-1])         # [B, P+V, D]
    for block, keys_values in zip(model.encoder_blocks, condition.encoder):
        x = block(x, keys_values)
    return model.encoder_norm(x)


def decode(model, encoded, mask, condition):
    """The decoder in raster order, every row through every block -> z [B, L, D]."""
    B, P, L = len(mask), model.fusion.slots, mask.shape[1]
    x = model.decoder_in(encoded)
    tokens = (model.mask_token if condition.masked is None else model.mask_token + condition.masked).expand(B, L, -1)
    rows = torch.cat([x[:, :P], tokens], dim=1).clone()                                      # [B, P+L, D]
    with_prefix = torch.cat([torch.zeros(B, P, device=x.device), mask], dim=1)
    rows[(1 - with_prefix).nonzero(as_tuple=True)] = x.flatten(0, 1)
    x = rows + model.decoder_positions
    for block, keys_values in zip(model.decoder_blocks, condition.decoder):
        x = block(x, keys_values)
    return model.decoder_norm(x)[:, P:] + model.output_positions


@torch.no_grad()
def generate(model, classes, codes, iterations, steps, cfg, schedule, temperature, orders, noise, head=head_sample):
    """Generator.generate; arguments as there. Both branches and the fusion anew at every iteration."""
    B, L, C = len(classes), model.config.grid**2, model.config.token_dim
    guided = cfg != 1.0
    mask, tokens = torch.ones(B, L, device=classes.device), torch.zeros(B, L, C, device=classes.device)
    for k, hidden in enumerate(hidden_counts(L, iterations)):
        double = lambda a: torch.cat([a, a]) if guided else a
        labels = torch.cat([classes, torch.full_like(classes, model.config.classes)]) if guided else classes
        condition = model.condition(labels, None if codes is None else double(codes))
        z = decode(model, encode(model, double(tokens), double(mask), condition), double(mask), condition)
        later = torch.zeros_like(mask).scatter(1, orders[:, :hidden], 1.0)
        now = mask.bool() & ~later.bool()                                                    # drawn in this iteration
        z = z[double(now).nonzero(as_tuple=True)]
        cond, null = z.chunk(2) if guided else (z, None)
        scale = 1 + (cfg - 1) * (L - max(hidden, 1)) / L if schedule == "linear" else cfg
        tokens[now.nonzero(as_tuple=True)] = head(model.head, cond, null, scale, steps, temperature, noise[k])
        mask = later
    return tokens


def loss(model, latents, classes, codes, mask, t, noise):
    """Generator.loss: the head on every token and draw, masked afterwards. Arguments as there."""
    condition = model.condition(classes, codes)
    z = decode(model, encode(model, latents, mask, condition), mask, condition)
    repeat = lambda a: a.expand(len(t), *a.shape).flatten(0, 2)
    plain = SimpleNamespace(table=model.head.table, net=lambda x_t, t, z: head_net(model.head.net, x_t, t, z))
    rows = DiffusionHead.loss(plain, repeat(latents), repeat(z), t.flatten(), noise.flatten(0, 2))    # [M*B*L]
    hidden = mask.expand(len(t), *mask.shape).flatten()
    return (rows * hidden).sum() / hidden.sum()


@torch.no_grad()
def prior_generate(model, classes, cfg, temperature, uniform):
    """Prior.generate: static cache, every query masked against its whole length, projections one by one."""
    B, L, H = len(classes), model.config.grid**2, model.config.heads
    labels = torch.cat([classes, torch.full_like(classes, model.config.classes)])
    shape = (2 * B, H, L + 1, model.config.dim // H)
    zeros = lambda: torch.zeros(shape, device=labels.device)
    caches = [(zeros(), zeros()) for _ in model.blocks]
    causal = torch.ones(L + 1, L + 1, dtype=torch.bool, device=labels.device).tril()
    norm = lambda n, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * n.weight
    x, codes = model.class_embedding(labels)[:, None], []
    for i in range(L):
        at = torch.tensor([i], device=labels.device)
        for block, (keys, values) in zip(model.blocks, caches):
            qkv = F.linear(norm(block.attention_norm, x), block.wqkv.weight).view(2 * B, 1, 3, H, -1)
            q, k, v = (a.transpose(1, 2) for a in qkv.unbind(2))                             # [2B, H, 1, D/H]
            q, keys[:, :, at], values[:, :, at] = rotate(q, model.rope[at]), rotate(k, model.rope[at]), v
            # LlamaGen repeats keys and values for grouped heads, once each here: a copy of the whole cache
            k, v = keys.repeat_interleave(1, dim=1), values.repeat_interleave(1, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal[at][None, None])
            x = x + F.linear(y.transpose(1, 2).flatten(2), block.wo.weight)
            h = norm(block.ffn_norm, x)
            x = x + F.linear(F.silu(F.linear(h, block.w1.weight)) * F.linear(h, block.w3.weight), block.w2.weight)
        cond, null = F.linear(norm(model.norm, x), model.output.weight)[:, -1].float().chunk(2)
        codes.append(draw((null + cfg * (cond - null)) / temperature, uniform[:, i]))
        x = model.code_embedding(torch.cat([codes[-1]] * 2))[:, None]
    return torch.stack(codes, dim=1)


# -------------------------------------------------------------------------------------------------------- Inception

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
