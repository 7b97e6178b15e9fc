"""The diffusion head: a small MLP that draws one continuous token x, given the generator's vector z for this token.

D2C (2503.17155) Eq. 2, MAR (2406.11838) section 3.2. With x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise:

    loss(x, z) = mean over C of (eps(x_t, t, z) - noise)^2 + one term of the variational bound, for random t and noise

    DiffusionHead(config)
    .net(x_t [N, C], t [N], z [N, D])   -> [N, 2C]: the predicted noise eps, then v, which sets the variance of a step
    .loss(x [N, C], z [N, D])           -> [N], one value per row
    .sample(z [N, D], z_null, cfg, ...) -> x [N, C]; z_null [N, D] is z of the null class, for guidance

N rows, which are tokens of any images and do not see each other; C channels of a token; D width of z. The process is
improved DDPM (Nichol & Dhariwal, 2102.09672, called IDDPM below): 1000 timesteps, cosine schedule, learned variance.
"Official code" is MAR's, which uses IDDPM's. generator.py calls `loss` in training, and `sample` once for each group of
tokens that it draws together. fast.py holds the same sampler in a faster form.
The head never computes in bf16, only in fp32 and, in its blocks on a GPU, TF32; `tf32` says why."""
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

def cosine(u):
    """The curve that abar follows, at the fraction u of the process: IDDPM Eq. 17 without its normalisation."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def spaced_timesteps(steps, t_max=T - 1):
    """`steps` timesteps from 0 to t_max, evenly spaced, ascending. steps=1 keeps timestep 0, as MAR's code does."""
    if not 1 <= steps <= t_max + 1:
        raise ValueError(f"diffusion steps must be between 1 and {t_max + 1}, not {steps}")
    stride = t_max / max(steps - 1, 1)
    # a running sum, not i * stride: the rounding must fall as it does in the official code
    return [round(t) for t in accumulate([stride] * (steps - 1), initial=0.0)]


class Schedule:
    """Coefficients of the process over the given ascending timesteps: lists of floats (float64), one per timestep."""

    def __init__(self, timesteps=range(T)):
        every_beta = [min(1 - cosine((t + 1) / T) / cosine(t / T), 0.999) for t in range(T)]
        every_abar = list(accumulate((1 - b for b in every_beta), mul))
        self.timesteps = list(timesteps)
        self.abar = [every_abar[t] for t in self.timesteps]
        previous = [1.0] + self.abar[:-1]
        self.beta = [1 - a / p for a, p in zip(self.abar, previous)]  # every_beta, if every timestep is kept
        # x_t = signal * x + sigma * eps, DDPM Eq. 4. Our t = 0 is DDPM's t = 1, one step of noise; x_0 is the clean x
        self.signal = [math.sqrt(a) for a in self.abar]
        self.sigma = [math.sqrt(1 - a) for a in self.abar]
        # the same solved for x_0 = x_from_xt * x_t - x_from_eps * eps
        self.x_from_xt = [math.sqrt(1 / a) for a in self.abar]
        self.x_from_eps = [math.sqrt(1 / a - 1) for a in self.abar]
        # posterior q(x_{t-1} | x_t, x_0), DDPM Eq. 7: its mean is mean_x0 * x_0 + mean_xt * x_t; then its variance
        self.mean_x0 = [b * math.sqrt(p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        self.mean_xt = [math.sqrt(1 - b) * (1 - p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        variance = [b * (1 - p) / (1 - a) for b, a, p in zip(self.beta, self.abar, previous)]
        # At t = 0 the posterior variance is 0, which has no logarithm: IDDPM takes the next one's, if there is one.
        variance[0] = variance[1] if len(variance) > 1 else self.beta[0]
        # bounds of the learned log-variance, IDDPM Eq. 15
        self.min_logvar = [math.log(v) for v in variance]
        self.max_logvar = [math.log(b) for b in self.beta]


# -------------------------------------------------------------------------------------------------------------- net

@contextmanager
def tf32(allowed=True):
    """Whether a GPU may round the inputs of fp32 products to TF32, a mantissa of 10 bits, for its tensor cores.

    When sample takes 100 steps, the first multiplies an error of eps by 316: solving for x_0 multiplies it by
    sqrt(1/abar_999) = 20,300, and mean_x0, about sqrt(abar_989), by 0.0156. bf16 rounds a value near 1 by up to 0.4%.
    Times 316 this is 1.2, above the standard deviation of x_t, which is 1; later steps correct only most of it. So
    autocast is off in `sample`, and in `loss`, to train as it samples. (Backward: see train.py.)

    HeadNet keeps all but the blocks in fp32: `input`, because errors in sums of only C products do not cancel; `output`
    and the embeddings, because they are cheap. The blocks may round to TF32 (0.05%): each of their products sums
    `width` terms, whose errors largely cancel. In a small trained head (100 steps, imitated on a CPU) TF32 in the
    blocks changes the samples by 0.5% (RMS), bf16 everywhere by 15%."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class HeadBlock(nn.Module):
    """x + gate * MLP(LayerNorm(x) * (1 + scale) + shift), with (shift, scale, gate) = Linear(y): adaLN."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)  # with weights of its own, as in MAR
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, x, y):
        shift, scale, gate = self.modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class HeadNet(nn.Module):
    """Predicts the noise in x_t, and v, which sets the variance of x_{t-1}, given y = SiLU(time + projected z)."""

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
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in (self.time[0], self.time[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in [b.modulation for b in self.blocks] + [self.output_modulation, self.output]:
            nn.init.zeros_(m.weight)  # every block starts as the identity, the output as zero

    def embed_time(self, t):
        """t [...], timesteps of the full process -> [..., width]: two layers on [cos, sin] of t * 10000^(-i/128)."""
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        angles = t.float()[..., None] * freqs
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def forward(self, x_t, t, z):
        """x_t [..., N, C], t [..., N] timesteps 0 to 999 of the full process, z [N, D] -> [..., N, 2C]."""
        with tf32(False):
            y = F.silu(self.embed_time(t) + self.cond(z))                       # [..., N, width]
        return self.denoise(x_t, y)

    def denoise(self, x_t, y):  # the rest of forward, once y is known
        with tf32(False):
            x = self.input(x_t)                                                 # [..., N, width]
            with tf32():
                for block in self.blocks:
                    x = block(x, y)
            shift, scale = self.output_modulation(y).chunk(2, dim=-1)
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift   # this LayerNorm has no weights
            return self.output(x)


# ------------------------------------------------------------------------------------------------ loss and sampler

class DiffusionHead(nn.Module):
    def __init__(self, c: HeadConfig):
        super().__init__()
        self.config, self.net = c, HeadNet(c)
        # self.timesteps, self.abar, ..., self.max_logvar [T]: the Schedule as buffers, which move with the module
        for name, values in vars(Schedule()).items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def loss(self, x, z, t=None, noise=None, net=None):
        """x [N, C] clean, z [N, D] -> [N]: squared error of the noise plus a term of the bound in bits, means over C.

        t [N] int64 and noise [N, C] are drawn when None; t [M, N] and noise [M, N, C] give M draws per row: [M, N].
        The bound is a sum over 1000 steps. IDDPM weights it by 0.001, which makes it the mean over the steps; the term
        of one random t estimates that mean. Its gradient passes through v alone. net replaces self.net, see fast.py."""
        with torch.autocast(x.device.type, enabled=False):
            x, z = x.float(), z.float()
            t = torch.randint(T, (len(x),), device=x.device) if t is None else t
            noise = torch.randn(*t.shape, x.shape[-1], device=x.device) if noise is None else noise
            at = lambda coefficients: coefficients[t][..., None]                # [..., N, 1]
            x_t = at(self.signal) * x + at(self.sigma) * noise                  # DDPM Eq. 4
            eps, v = (net or self.net)(x_t, t, z).chunk(2, dim=-1)              # each [..., N, C]
            low, high = at(self.min_logvar), at(self.max_logvar)
            logvar = self.log_variance(v, low, high)
            x0 = at(self.x_from_xt) * x_t - at(self.x_from_eps) * eps.detach()
            mean = at(self.mean_x0) * x0 + at(self.mean_xt) * x_t
            true_mean = at(self.mean_x0) * x + at(self.mean_xt) * x_t
            # KL(posterior || model), of the Gaussians N(true_mean, exp(low)) and N(mean, exp(logvar))
            kl = 0.5 * (logvar - low - 1 + (low - logvar).exp() + (true_mean - mean) ** 2 * (-logvar).exp())
            nll = -discretized_log_likelihood(x, mean, 0.5 * logvar)            # replaces the KL at t = 0
            bound = torch.where(t[..., None] == 0, nll, kl).mean(-1) / math.log(2)
            return ((eps - noise) ** 2).mean(-1) + bound

    @torch.no_grad()
    def sample(self, z, z_null=None, cfg=1.0, steps=100, temperature=1.0, noise=None, generator=None, t_max=T - 1):
        """z [N, D] -> x [N, C] by `steps` reverse steps (DDPM Algorithm 2 on IDDPM's respaced timesteps).

        cfg != 1 needs z_null [N, D]: eps = null + cfg * (cond - null); the conditional branch's v is taken.
        noise [steps+1, N, C]: noise[0] is where the process starts, noise[k+1] is added after step k. The last one
        is never used, because no noise is added at t = 0; it is there because the official code draws it. temperature
        multiplies the noise that is added, not noise[0]. t_max < 999 (not in the official code) starts at timestep
        t_max, still from noise[0]: it skips the noisiest steps, which amplify errors most. steps=1 has timestep 0."""
        N, C = len(z), self.config.token_dim
        s = Schedule(spaced_timesteps(steps, t_max))
        guided = cfg != 1
        if guided and z_null is None:
            raise ValueError("guidance (cfg other than 1) needs z_null")
        if noise is None:
            noise = torch.randn(steps + 1, N, C, generator=generator, device=z.device)
        with torch.autocast(z.device.type, enabled=False):
            z = (torch.cat([z, z_null]) if guided else z).float()               # [N or 2N, D]
            x = noise[0]
            for k, i in enumerate(reversed(range(steps))):                      # i: index in s, the noisiest first
                x_t = torch.cat([x, x]) if guided else x                        # both branches see the same x
                t = torch.full((len(x_t),), s.timesteps[i], device=z.device)
                eps, v = self.net(x_t, t, z).chunk(2, dim=-1)
                if guided:
                    cond, null = eps.chunk(2)
                    eps = null + cfg * (cond - null)
                x0 = s.x_from_xt[i] * x - s.x_from_eps[i] * eps                 # latents have no range to clip to
                x = s.mean_x0[i] * x0 + s.mean_xt[i] * x
                if i > 0:
                    logvar = self.log_variance(v[:N], s.min_logvar[i], s.max_logvar[i])
                    x = x + (0.5 * logvar).exp() * noise[k + 1] * temperature
            return x

    @staticmethod
    def log_variance(v, low, high):
        """IDDPM Eq. 15 as in its code: v = -1 gives `low`, v = 1 gives `high`; v may leave this range."""
        f = (v + 1) / 2
        return f * high + (1 - f) * low


def discretized_log_likelihood(x, mean, log_std):
    """log P of the bin of width 2/255 around x, under a Gaussian, as in IDDPM; all [..., C], in nats.

    The bins are those of 8-bit pixels in [-1, 1], the outer ones open. The official loss uses it for latents too."""
    cdf = lambda u: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))      # of N(0, 1), nearly
    upper, lower = (cdf((-log_std).exp() * (x - mean + edge)) for edge in (1 / 255, -1 / 255))
    log = lambda p: p.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
