"""The diffusion head: a small MLP that draws one continuous token x, given the generator's vector z for this token.

D2C (2503.17155) Eq. 2, MAR (2406.11838) section 3.2.

    DiffusionHead(config)
    .net(x_t [N, C], t [N], z [N, D])   -> [N, 2C]: predicted noise eps, then v, which sets the variance
    .loss(x [N, C], z [N, D])           -> [N], one value per row
    .sample(z [N, D], z_null, cfg, ...) -> x [N, C]

The N rows are tokens of any images; rows do not see each other. The process is improved DDPM (Nichol & Dhariwal,
2102.09672, called IDDPM below): 1000 timesteps, cosine schedule, learned variance. generator.py calls `loss` in
training and `sample` once per iteration. fast.py holds the same sampler in a faster form.

Precision. The first reverse step multiplies an error of eps by 316 at 100 steps (632 at 50), because abar(999) is
2.4e-9. bf16 rounds a value near 1 by up to 0.4%, and 316 times 0.4% is 1.2: more than one standard deviation of the
latents, so the step would draw noise. Therefore x, eps, the coefficients and the first and last layer stay in fp32,
and autocast is off here. The layers in between may round their inputs to TF32 (0.05%): their outputs are sums of
hundreds of products whose errors largely cancel, and they reach eps only through the last layer, which is exact.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import nn
from torch.nn import functional as F

T = 1000  # training timesteps


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
        position += stride  # accumulated, not i * stride: the rounding must fall as it does in the official code
    return kept


class Schedule:
    """Coefficients of the process over the given timesteps: lists of floats (float64), one entry per timestep."""

    def __init__(self, timesteps=range(T)):
        betas = [min(1 - cosine_alpha_bar((i + 1) / T) / cosine_alpha_bar(i / T), 0.999) for i in range(T)]
        alpha_bar = list(accumulate((1 - b for b in betas), mul))
        self.timesteps = list(timesteps)
        self.abar = [alpha_bar[t] for t in self.timesteps]
        previous = [1.0] + self.abar[:-1]
        self.beta = [1 - a / p for a, p in zip(self.abar, previous)]  # equals betas when every timestep is kept
        # x_t = signal * x_0 + sigma * eps, DDPM Eq. 4; and back: x_0 = x_from_xt * x_t - x_from_eps * eps
        self.signal = [math.sqrt(a) for a in self.abar]
        self.sigma = [math.sqrt(1 - a) for a in self.abar]
        self.x_from_xt = [math.sqrt(1 / a) for a in self.abar]
        self.x_from_eps = [math.sqrt(1 / a - 1) for a in self.abar]
        # mean of the posterior q(x_{t-1} | x_t, x_0) = mean_x0 * x_0 + mean_xt * x_t, and its log-variance, DDPM Eq. 7
        self.mean_x0 = [b * math.sqrt(p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        self.mean_xt = [math.sqrt(1 - b) * (1 - p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        variance = [b * (1 - p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        variance[0] = variance[1] if len(variance) > 1 else self.beta[0]  # it is 0 at t = 0, which has no logarithm
        # the learned variance lies between these two, IDDPM Eq. 15
        self.min_logvar = [math.log(v) for v in variance]
        self.max_logvar = [math.log(b) for b in self.beta]


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
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), with (shift, scale, gate) = Linear(SiLU(y)): adaLN."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x, y):
        shift, scale, gate = self.modulation(F.silu(y)).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class HeadNet(nn.Module):
    """Predicts noise and variance of x_t. The condition is y = time embedding + projected z."""

    def __init__(self, c: HeadConfig):
        super().__init__()
        self.input = nn.Linear(c.token_dim, c.width)
        self.time = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.cond = nn.Linear(c.cond_dim, c.width)
        self.blocks = nn.ModuleList(HeadBlock(c.width) for _ in range(c.depth))
        self.output_modulation = nn.Linear(c.width, 2 * c.width)
        self.output = nn.Linear(c.width, 2 * c.token_dim)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight), nn.init.zeros_(m.bias)
        nn.init.normal_(self.time[0].weight, std=0.02), nn.init.normal_(self.time[2].weight, std=0.02)
        for m in [b.modulation for b in self.blocks] + [self.output_modulation, self.output]:
            nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)  # every block starts as the identity, the output as zero

    def embed_time(self, t):
        """t [...], original timesteps -> [..., width]: cosines, then sines, at 10000^(-i/128); then two layers."""
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        angles = t.float()[..., None] * freqs
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x_t, t, z):
        """x_t [..., N, C], t [..., N] original timesteps 0 to 999, z [N, D] -> [..., N, 2C]."""
        x, y = self.input(x_t), self.embed_time(t) + self.cond(z)               # each [..., N, width]
        with tf32():
            for block in self.blocks:
                x = block(x, y)
        shift, scale = self.output_modulation(F.silu(y)).chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift       # without weights of its own, as in MAR
        return self.output(x)


# ------------------------------------------------------------------------------------------------ loss and sampler

class DiffusionHead(nn.Module):
    def __init__(self, c: HeadConfig):
        super().__init__()
        self.config, self.net = c, HeadNet(c)
        for name, values in vars(Schedule()).items():  # each [T]; buffers follow the module to its device
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def loss(self, x, z, t=None, noise=None):
        """x [N, C] clean, z [N, D] -> [N]: squared error of the noise plus the variational bound in bits, means over C.

        t [N] int64 and noise [N, C] are drawn when None. With t [M, N] and noise [M, N, C], M draws per row, the result
        is [M, N]. IDDPM's hybrid loss weights the bound, a sum over 1000 steps, by 0.001: that is 1 for the single step
        drawn here. The bound trains only the variance, because eps is detached in it.
        """
        with torch.autocast(x.device.type, enabled=False):
            x, z = x.float(), z.float()
            t = torch.randint(T, (len(x),), device=x.device) if t is None else t
            noise = torch.randn(*t.shape, x.shape[-1], device=x.device) if noise is None else noise
            at = lambda coefficients: coefficients[t][..., None]                # [..., N, 1]
            x_t = at(self.signal) * x + at(self.sigma) * noise                  # DDPM Eq. 4
            eps, v = self.net(x_t, t, z).chunk(2, dim=-1)                       # each [..., N, C]
            low, logvar = at(self.min_logvar), self.log_variance(v, at(self.max_logvar), at(self.min_logvar))
            x0 = at(self.x_from_xt) * x_t - at(self.x_from_eps) * eps.detach()
            mean = at(self.mean_x0) * x0 + at(self.mean_xt) * x_t
            true_mean = at(self.mean_x0) * x + at(self.mean_xt) * x_t
            # KL from the posterior, N(true_mean, exp(low)), to the model, N(mean, exp(logvar))
            kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + (true_mean - mean) ** 2 * (-logvar).exp())
            nll = -discretized_log_likelihood(x, mean, 0.5 * logvar)            # replaces the KL at t = 0
            bound = torch.where(t[..., None] == 0, nll, kl).mean(-1) / math.log(2)
            return ((eps - noise) ** 2).mean(-1) + bound

    @torch.no_grad()
    def sample(self, z, z_null=None, cfg=1.0, steps=100, temperature=1.0, noise=None, generator=None, t_max=T - 1):
        """z [N, D] -> x [N, C] by `steps` reverse steps (DDPM Algorithm 2 on IDDPM's respaced timesteps).

        z_null [N, D] and cfg != 1: guidance, eps = null + cfg * (cond - null); the variance is the conditional
        branch's. noise [steps+1, N, C]: x_T, then each step's noise from the noisiest on; the last is unused, because
        no noise is added at t = 0. temperature multiplies the steps' noise, not x_T. t_max < 999 (not in the official
        code) takes x_T for a sample at t_max: that skips the steps which amplify a briefly trained head's errors most.
        """
        (N, _), C, s = z.shape, self.config.token_dim, Schedule(spaced_timesteps(steps, t_max))
        guided = z_null is not None and cfg != 1
        if noise is None:
            noise = torch.randn(steps + 1, N, C, generator=generator, device=z.device)
        with torch.autocast(z.device.type, enabled=False):
            z = (torch.cat([z, z_null]) if guided else z).float()               # [N or 2N, D]
            x = noise[0]
            for k, i in enumerate(reversed(range(steps))):                      # from the noisiest step to the last
                x_t = torch.cat([x, x]) if guided else x                        # both branches see the same x
                t = torch.full((len(x_t),), s.timesteps[i], device=z.device)
                eps, v = self.net(x_t, t, z).chunk(2, dim=-1)
                if guided:
                    eps, null = eps.chunk(2)
                    eps = null + cfg * (eps - null)
                x0 = s.x_from_xt[i] * x - s.x_from_eps[i] * eps                 # not clipped: latents have no range
                x = s.mean_x0[i] * x0 + s.mean_xt[i] * x
                if i > 0:
                    logvar = self.log_variance(v[:N], s.max_logvar[i], s.min_logvar[i])
                    x = x + (0.5 * logvar).exp() * noise[k + 1] * temperature
            return x

    @staticmethod
    def log_variance(v, high, low):
        """IDDPM Eq. 15: v = 1 gives `high`, v = -1 gives `low`. v is not clamped."""
        f = (v + 1) / 2
        return f * high + (1 - f) * low


def normal_cdf(x):
    """The tanh approximation of the standard normal's distribution function that IDDPM uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x, mean, log_std):
    """log P(x) of values on a grid of step 2/255 in [-1, 1] under a Gaussian, as in IDDPM; [N, C] -> [N, C], nats.

    Latents are on no such grid, but the official loss applies this likelihood at t = 0 all the same.
    """
    inverse = (-log_std).exp()
    upper, lower = normal_cdf(inverse * (x - mean + 1 / 255)), normal_cdf(inverse * (x - mean - 1 / 255))
    log = lambda p: p.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
