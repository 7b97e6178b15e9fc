"""The diffusion head: a small MLP that draws one continuous token x given what the generator says about it, z.

D2C (2503.17155) Eq. 2, MAR (2406.11838) section 3.2.

    DiffusionHead(cfg)
    .net(x_t [N, C], t [N], z [N, D])   -> [N, 2C]: predicted noise, then v that interpolates the log-variance
    .loss(x [N, C], z [N, D])           -> [N], one value per row; [M, N] for M draws of (t, noise)
    .sample(z [N, D], z_null, cfg, ...) -> x [N, C]

N rows are tokens of any images; they do not see each other. The process is improved DDPM (Nichol & Dhariwal,
2102.09672, "IDDPM" below): 1000 steps, cosine schedule, learned variance. generator.py calls loss in training and
sample once an iteration.

Precision: abar at the last timestep is 2.4e-9, so the first reverse step multiplies an error of the predicted noise
by mean_x0 * x_from_eps = 316 at 100 steps (632 at 50). Everything here runs in fp32 with autocast off, and no fp16
comes near; only the hidden layers use TF32 in the forward pass, on GPUs that have it.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul

import torch
from torch import nn
from torch.nn import functional as F

from runtime import Linear  # torch's, faster for few rows on a CPU

T = 1000    # training timesteps
ROWS = 1024  # steps x tokens of one adaLN product in sampling, about: a row takes (3 * depth + 2) * width floats


@dataclass(frozen=True)
class HeadConfig:
    token_dim: int = 16    # C
    cond_dim: int = 768    # D
    depth: int = 6         # residual blocks
    width: int = 1024


# --------------------------------------------------------------------------------------------------------- schedule

def cosine_alpha_bar(s):
    """abar(s) for s in [0, 1], IDDPM Eq. 17 without its normalisation."""
    return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2


def spaced_timesteps(steps, t_max=T - 1):
    """`steps` timesteps from 0 to t_max, evenly spaced, ascending. A single step keeps timestep 0, as in MAR's code."""
    if not 1 <= steps <= t_max + 1:
        raise ValueError(f"diffusion steps must be between 1 and {t_max + 1}, not {steps}")
    stride = t_max / max(steps - 1, 1)
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += stride  # accumulated, not i * stride: the rounding must fall as it did for the official code
    return kept


class Schedule:
    """Coefficients of the process over the given timesteps: lists of Python floats (float64), one per timestep."""

    def __init__(self, timesteps=range(T)):
        betas = [min(1 - cosine_alpha_bar((i + 1) / T) / cosine_alpha_bar(i / T), 0.999) for i in range(T)]
        alpha_bar = list(accumulate((1 - b for b in betas), mul))
        self.timesteps = list(timesteps)
        self.abar = [alpha_bar[t] for t in self.timesteps]
        previous = [1.0] + self.abar[:-1]
        self.beta = [1 - a / p for a, p in zip(self.abar, previous)]  # equals betas when every timestep is kept
        # posterior q(x_{t-1} | x_t, x_0), DDPM Eq. 7
        posterior = [b * (1 - p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        posterior[0] = posterior[1] if len(posterior) > 1 else self.beta[0]  # it is 0, which has no logarithm
        self.min_logvar = [math.log(v) for v in posterior]
        self.max_logvar = [math.log(b) for b in self.beta]
        self.mean_x0 = [b * math.sqrt(p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        self.mean_xt = [math.sqrt(1 - b) * (1 - p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        # x_0 = x_from_xt * x_t - x_from_eps * eps
        self.x_from_xt = [math.sqrt(1 / a) for a in self.abar]
        self.x_from_eps = [math.sqrt(1 / a - 1) for a in self.abar]


@lru_cache
def respaced(steps, t_max) -> Schedule:
    return Schedule(spaced_timesteps(steps, t_max))


# -------------------------------------------------------------------------------------------------------------- net

@contextmanager
def tf32():
    """Lets a GPU round the inputs of fp32 matrix products to 10 bits, for its tensor cores. No effect on a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class HeadBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), with (shift, scale, gate) = Linear(SiLU(y)): adaLN.

    y is time + condition. HeadNet.modulations applies the Linear beforehand, for several steps at once, and hands in
    1 + scale. As in MAR this LayerNorm has weights of its own, the one before the output has none.
    """

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)  # HeadNet.modulations reads its weights

    def forward(self, x, shift_scale_gate):
        shift, scale, gate = shift_scale_gate.chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.norm(x), scale)))


class HeadNet(nn.Module):
    def __init__(self, c: HeadConfig):
        super().__init__()
        self.input = nn.Linear(c.token_dim, c.width)
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.cond = nn.Linear(c.cond_dim, c.width)
        self.blocks = nn.ModuleList(HeadBlock(c.width) for _ in range(c.depth))
        self.output_modulation = nn.Linear(c.width, 2 * c.width)
        self.output = nn.Linear(c.width, 2 * c.token_dim)
        # what is added to (shift, scale, gate); the output layer has no gate
        self.register_buffer("offset", torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(c.width), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight), nn.init.zeros_(m.bias)
        nn.init.normal_(self.time[0].weight, std=0.02), nn.init.normal_(self.time[2].weight, std=0.02)
        for m in [b.modulation for b in self.blocks] + [self.output_modulation, self.output]:
            nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)  # every block starts as the identity, the output as zero

    def embed_time(self, t):
        """t [...], original timesteps -> [..., width]: cosines, then sines, at 10000^(-i/128); then two layers."""
        if t.numel() > T:  # in training: each timestep once
            return F.embedding(t, self.embed_time(torch.arange(T, device=t.device)))
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        angles = t.float()[..., None] * freqs
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def modulations(self, y):
        """y [..., width] -> (shift, 1 + scale, gate) [..., 3 width] per block, then (shift, 1 + scale) of the output.

        They depend on time and condition, not on x.
        """
        y = F.silu(y)
        with tf32():
            return [F.linear(y, m.weight, m.bias + self.offset[:len(m.bias)])
                    for m in [*(b.modulation for b in self.blocks), self.output_modulation]]

    def body(self, x_t, modulations):
        x = self.input(x_t)                                                     # [..., N, width]
        with tf32():
            for block, m in zip(self.blocks, modulations):
                x = block(x, m)
        shift, scale = modulations[-1].chunk(2, dim=-1)
        x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
        return self.output(x)                                                   # [..., N, 2C]

    def forward(self, x_t, t, z):
        """x_t [..., N, C], t [..., N] original timesteps 0..999, z [N, D] -> [..., N, 2C]."""
        return self.body(x_t, self.modulations(self.embed_time(t) + self.cond(z)))


# ------------------------------------------------------------------------------------------------ loss and sampler

class DiffusionHead(nn.Module):
    def __init__(self, c: HeadConfig):
        super().__init__()
        self.config, self.net = c, HeadNet(c)
        s = Schedule()
        # rows in the order in which `loss` unpacks them
        rows = [[math.sqrt(a) for a in s.abar], [math.sqrt(1 - a) for a in s.abar], s.x_from_xt, s.x_from_eps,
                s.mean_x0, s.mean_xt, s.min_logvar, s.max_logvar]
        self.register_buffer("table", torch.tensor(rows, dtype=torch.float32), persistent=False)     # [8, T]
        self.register_buffer("clock", torch.arange(T), persistent=False)  # timesteps, on the device
        self.graphs = None  # or Graphs(), on CUDA

    def loss(self, x, z, t=None, noise=None):
        """x [N, C] clean, z [N, D] -> [N]: squared error of the noise plus the variational bound in bits, means over C.

        t [N] int64 and noise [N, C] are drawn when None; with [M, N] and [M, N, C], M draws for each row, the result
        is [M, N], and what depends on z alone is computed once. IDDPM's hybrid loss: 0.001 times a sum over T = 1000
        steps is 1 times the one step drawn here. The bound trains only the variance, as eps is detached in it.
        """
        with torch.autocast(x.device.type, enabled=False):
            x, z = x.float(), z.float()
            if t is None:
                t = torch.randint(T, (len(x),), device=x.device)
            if noise is None:
                noise = torch.randn(*t.shape, x.shape[-1], device=x.device)
            signal, sigma, from_xt, from_eps, mean_x0, mean_xt, low, high = self.table[:, t, None]  # each [..., N, 1]
            x_t = signal * x + sigma * noise                                    # DDPM Eq. 4
            eps, v = self.net(x_t, t, z).chunk(2, dim=-1)                       # each [..., N, C]
            f = (v + 1) / 2
            logvar = f * high + (1 - f) * low                                   # IDDPM Eq. 15; v is not clamped
            mean = mean_x0 * (from_xt * x_t - from_eps * eps.detach()) + mean_xt * x_t
            true_mean = mean_x0 * x + mean_xt * x_t
            # KL from the posterior, N(true_mean, exp(low)), to the model, N(mean, exp(logvar))
            kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + (true_mean - mean) ** 2 * (-logvar).exp())
            nll = -discretized_log_likelihood(x, mean, 0.5 * logvar)            # replaces the KL at t = 0
            bound = torch.where(t[..., None] == 0, nll, kl).mean(-1) / math.log(2)
            return ((eps - noise) ** 2).mean(-1) + bound

    @torch.no_grad()
    def sample(self, z, z_null=None, cfg=1.0, steps=100, temperature=1.0, noise=None, generator=None, t_max=T - 1):
        """z [N, D] -> x [N, C] by `steps` reverse steps (DDPM Algorithm 2 on IDDPM's respaced timesteps).

        z_null [N, D] and cfg != 1: guidance, eps = null + cfg * (cond - null); the variance is the conditional
        branch's. noise [steps+1, N, C]: x_T, then each step's noise from the noisiest on; the last is unused (none is
        added at t = 0). temperature multiplies the steps' noise, not x_T. t_max < 999, which is not in the official
        code, takes x_T for a sample at t_max and so leaves out the steps that amplify a head's errors most; for heads
        trained briefly.
        """
        N, C = len(z), self.config.token_dim
        if noise is None:
            noise = torch.randn(steps + 1, N, C, generator=generator, device=z.device)
        guided = z_null is not None and cfg != 1
        z = (torch.cat([z, z_null]) if guided else z).float()                                    # [N or 2N, D]
        guidance = torch.full((), float(cfg), device=z.device)  # a tensor: in a graph it changes with the iteration
        loop = lambda z, noise, guidance: self.reverse(z, noise, guidance, respaced(steps, t_max), temperature)
        if self.graphs is None:
            return loop(z, noise, guidance)
        return self.graphs((N, guided, steps, t_max, temperature), loop, z, noise, guidance)

    def reverse(self, z, noise, guidance, s: Schedule, temperature):
        """The step loop. z [N, D], or [2N, D] with the null branch behind; noise [S+1, N, C]; guidance, a scalar.

        What does not depend on x is kept out of the steps: the embedding of all times, one projection of z, and the
        adaLN projections of SiLU(t + c), which are most of the arithmetic. Each (step, row) needs its own, as
        SiLU(t + c) is not f(t) + g(c); but one product for several steps reads the weights once.
        """
        with torch.autocast(z.device.type, enabled=False):
            net, N, C, S = self.net, noise.shape[1], noise.shape[2], len(s.timesteps)
            # no torch.tensor(s.timesteps): a CUDA graph may not copy from the host
            times = net.embed_time(torch.stack([self.clock[t] for t in s.timesteps]))            # [S, width]
            cond = net.cond(z)                                                                   # [N or 2N, width]
            together = max(1, ROWS // len(z))                                                    # steps per product
            x = noise[0]
            for k, i in enumerate(reversed(range(S))):
                if k % together == 0:  # for steps i, i - 1, ..., first
                    first = max(0, i + 1 - together)
                    modulations = net.modulations(times[first:i + 1, None] + cond)               # each [steps, rows, .]
                both = x.repeat(len(z) // N, 1)  # both branches see the same x
                out = net.body(both, [m[i - first] for m in modulations])                        # = net(both, t, z)
                eps, v = out[:N].chunk(2, dim=-1)
                if len(z) > N:
                    null = out[N:, :C]
                    eps = null + guidance * (eps - null)
                x0 = s.x_from_xt[i] * x - s.x_from_eps[i] * eps  # not clipped: latents have no fixed range
                x = s.mean_x0[i] * x0 + s.mean_xt[i] * x
                if i > 0:
                    f = (v + 1) / 2
                    logvar = f * s.max_logvar[i] + (1 - f) * s.min_logvar[i]
                    x = x + (0.5 * logvar).exp() * noise[k + 1] * temperature
            return x


class Graphs:
    """CUDA graphs of a function of tensors, one per key: `graphs(key, function, *inputs)` is function(*inputs).

    The step loop launches thousands of kernels, and a launch takes longer than its work; a graph replays them all in
    one call. The key must hold whatever the function depends on besides the inputs' values. Weights are read where
    they lie, so training them in place is seen, and new memory for a parameter is not.
    """

    def __init__(self):
        self.recorded = {}

    def record(self, function, inputs):
        """-> what replays function(*inputs), reading and writing the memory of this call, and its output."""
        if not self.recorded:
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)  # libraries set themselves up at their first call, which must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = function(*inputs)
        return graph.replay, out

    def __call__(self, key, function, *inputs):
        if key not in self.recorded:
            kept = [x.clone() for x in inputs]
            self.recorded[key] = kept, *self.record(function, kept)
        kept, replay, out = self.recorded[key]
        for mine, given in zip(kept, inputs):
            mine.copy_(given)
        replay()
        return out.clone()  # the next graph may use the same memory


def normal_cdf(x):
    """The tanh approximation of the standard normal's distribution function that IDDPM uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x, mean, log_std):
    """log P(x) of values on a grid of step 2/255 in [-1, 1] under a Gaussian, as in IDDPM; [N, C] -> [N, C], nats.

    Latents are on no such grid, but the official loss applies it at t = 0 all the same.
    """
    inverse = (-log_std).exp()
    upper, lower = normal_cdf(inverse * (x - mean + 1 / 255)), normal_cdf(inverse * (x - mean - 1 / 255))
    log = lambda p: p.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
