"""The continuous generator: a masked autoencoder over the tokens of an image, with a diffusion head for each token.

D2C (2503.17155) section 4.2, which extends MAR (2406.11838). The model learns p(latents | class, codes). Latents are
L continuous tokens of an image with C channels each. Codes are discrete tokens of the same image. In sampling prior.py
draws them; in training they are the image's own, or Prior.mixture replaces some or all of them.
In training, a random part of the continuous tokens is masked. The network sees the other tokens, the class and the
codes, and computes a hidden vector z for every position. At masked positions the diffusion head (diffloss.py) learns
to draw the token from z. Sampling starts with all tokens masked and draws some of them in each iteration.

    Generator(config)
    .hidden(latents [B, L, C], classes [B], codes, mask [B, L])  -> z [B, L, D]; mask 1 = masked
    .loss(latents, classes, codes, mask, t, noise, drop)         -> scalar: self.hidden, then head.loss where mask is 1
    .generate(classes, codes, ...)                               -> latents: a loop of hidden, head.sample, fill in
    .draw(B, generator)                                          -> Draws: all random numbers of a step but dropout's

    rows of the encoder:  [ prefix P | visible tokens V ]
            the decoder:  [ prefix P | all tokens L, a mask token where one is masked ]

fusion.py turns class and codes into the P prefix rows and, for some fusions, into a context for cross-attention or
into vectors added to mask tokens. Classes are 0 to config.classes - 1; class number config.classes is the null class,
of classifier-free guidance. This file is the textbook form; train.py and sample.py use the faster one of fast.py."""
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from diffloss import T, DiffusionHead, HeadConfig
from fusion import Fused, make_fusion


@dataclass(frozen=True)
class GeneratorConfig:
    fusion: str = "qformer"    # one of fusion.FUSIONS
    dim: int = 768             # D
    depth: int = 12            # encoder blocks, and again as many decoder blocks
    heads: int = 12
    prefix: int = 64           # n of fusion.py: class tokens in front; some fusions replace a few, or add rows
    token_dim: int = 16        # C
    grid: int = 16             # L = grid * grid tokens
    code_grid: int = 0         # codes per side; 0: one code per token
    classes: int = 1000
    head_depth: int = 6        # of the diffusion head
    head_width: int = 1024
    batch_mul: int = 4         # M draws of (t, noise) per token and training step
    mask_min: float = 0.7      # least share of tokens masked in training; MAR's choice; sampling goes below
    dropout: float = 0.1
    class_drop: float = 0.1    # share of training images whose class and codes become null, together
    vocab: int = 16384         # K, number of different codes
    code_dim: int = 768        # width of the prior's code table
    queries: int = 16          # Q
    qformer_width: int = 512   # size of the Q-Former
    qformer_layers: int = 4    # of its decoder, and of its encoder if it has one
    qformer_heads: int = 4
    qformer_encoder: bool = True

    @property
    def codes(self):  # codes of an image
        return (self.code_grid or self.grid) ** 2


class Block(nn.Module):
    """ViT block, pre-norm, with the fusion's cross-attention in the middle if it has one. No causal mask."""

    def __init__(self, dim, heads, dropout, cross):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.cross = cross
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, context=None):
        p = self.dropout if self.training else 0.0
        B, rows, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, rows, D/H]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p)                              # [B, rows, D]
        if self.cross is not None:
            x = x + self.cross(x, context)
        return x + F.dropout(self.fc2(F.dropout(F.gelu(self.fc1(self.norm2(x))), p)), p)


class Draws(NamedTuple):
    """All random numbers of a training step on B images, but those of dropout."""
    drop: torch.Tensor             # [B] bool, True where an image loses its class and its codes
    mask: torch.Tensor             # [B, L], 1 = masked, equally many per image
    t: torch.Tensor                # [M, B, L] diffusion timesteps
    noise: torch.Tensor            # [M, B, L, C]
    posterior_noise: torch.Tensor  # [B, L, C], for tokenizers.KL.sample, which draws the latents anew in every step
    code_uniform: torch.Tensor     # [2, B, L_q], for Prior.mixture: keep a code or not, and which instead
    masked: int                    # masked tokens per image

    def part(self, s):
        """The numbers of the images in the slice s: a rank draws for the whole batch and takes its own images."""
        drop, mask, t, noise, posterior, code, masked = self
        return Draws(drop[s], mask[s], t[:, s], noise[:, s], posterior[s], code[:, s], masked)


# ----------------------------------------------------------------------------------------------------------- model

class Generator(nn.Module):
    def __init__(self, c: GeneratorConfig):
        super().__init__()
        self.config = c
        self.fusion = make_fusion(c)
        P, L = self.fusion.prefix_rows, c.grid**2
        self.class_embedding = nn.Embedding(c.classes, c.dim)
        self.fake_class = nn.Parameter(torch.empty(1, c.dim))
        self.latent_in = nn.Linear(c.token_dim, c.dim)
        self.encoder_positions = nn.Parameter(torch.empty(1, P + L, c.dim))
        self.encoder_in_norm = nn.LayerNorm(c.dim, eps=1e-6)
        block = lambda: Block(c.dim, c.heads, c.dropout, self.fusion.make_cross_attention(c.dim, c.heads))
        self.encoder_blocks = nn.ModuleList(block() for _ in range(c.depth))
        self.encoder_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.decoder_in = nn.Linear(c.dim, c.dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.decoder_positions = nn.Parameter(torch.empty(1, P + L, c.dim))
        self.decoder_blocks = nn.ModuleList(block() for _ in range(c.depth))
        self.decoder_norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.output_positions = nn.Parameter(torch.empty(1, L, c.dim))
        for m in self.modules():  # those of the fusion too, but not of the head, which initialises itself
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for p in (self.class_embedding.weight, self.fake_class, self.mask_token, self.encoder_positions,
                  self.decoder_positions, self.output_positions):
            nn.init.normal_(p, std=0.02)
        self.head = DiffusionHead(HeadConfig(c.token_dim, c.dim, c.head_depth, c.head_width))

    def hidden(self, latents, classes, codes, mask):
        """latents [B, L, C], mask [B, L] (1 = masked, equally many per image) -> z [B, L, D], in raster order.

        Latents at masked positions have no influence. codes [B, L_q] int64, or None for fusion `none`."""
        fused = self.fuse(classes, codes)
        visible = F.pad(1 - mask.float(), (self.fusion.prefix_rows, 0), value=1).bool()  # [B, P+L], the prefix too
        if (visible.sum(1) != visible[0].sum()).any():
            raise ValueError("a mask must cover equally many tokens of each image")
        return self.decode(self.encode(latents, fused, visible), fused, visible)

    def fuse(self, classes, codes) -> Fused:
        """classes [B], codes [B, L_q] or None -> the Fused of these images.

        Class and codes are null together: fake_class replaces a null class, and the fusion replaces the codes."""
        is_null = classes == self.config.classes                                     # [B]
        token = self.class_embedding(classes.masked_fill(is_null, 0))                # [B, D]
        return self.fusion(codes, torch.where(is_null[:, None], self.fake_class, token), is_null)

    def encode(self, latents, fused, visible):
        """latents [B, L, C], visible [B, P+L] bool -> the visible rows, encoded [B, P+V, D]."""
        x = torch.cat([fused.prefix, self.latent_in(latents)], dim=1)                # [B, P+L, D]
        x = self.encoder_in_norm(x + self.encoder_positions)
        x = x[visible].view(len(x), -1, x.shape[-1])                                 # [B, P+V, D]
        for block in self.encoder_blocks:
            x = block(x, fused.context)
        return self.encoder_norm(x)

    def decode(self, encoded, fused, visible):
        """encoded [B, P+V, D] -> z [B, L, D]: the encoded rows return to their places, mask tokens fill the others."""
        P = self.fusion.prefix_rows
        encoded = self.decoder_in(encoded)                                           # [B, P+V, D]
        tokens = self.mask_token if fused.mask_codes is None else self.mask_token + fused.mask_codes
        x = torch.cat([encoded[:, :P], tokens.expand(*visible[:, P:].shape, -1)], dim=1)           # [B, P+L, D]
        x[visible] = encoded.flatten(0, 1).to(x.dtype)                               # writes the prefix again
        x = x + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x, fused.context)
        return self.decoder_norm(x)[:, P:] + self.output_positions                   # so z tells the head its position

    # ------------------------------------------------------------------------------------------------- training

    def loss(self, latents, classes, codes, mask=None, t=None, noise=None, drop=None):
        """Mean diffusion loss over masked tokens and M draws of (t, noise). D2C Eq. 2.

        latents [B, L, C]; mask [B, L]; t [M, B, L] int64; noise [M, B, L, C]: drawn as in training where None.
        drop [B] bool: images that lose class and codes; None: no image does, as in validation."""
        if mask is None or t is None or noise is None:
            drawn = self.draw(len(latents))
            mask = drawn.mask if mask is None else mask
            t = drawn.t if t is None else t
            noise = drawn.noise if noise is None else noise
        classes = classes if drop is None else classes.masked_fill(drop, self.config.classes)
        z = self.hidden(latents, classes, codes, mask)                               # [B, L, D]
        at = mask.bool()
        # N masked tokens of all images: latents [N, C], z [N, D], t [M, N], noise [M, N, C]
        return self.head.loss(latents[at], z[at], t[:, at], noise[:, at]).mean()

    def draw(self, B, generator=None, uniform=None) -> Draws:
        """Draws the random numbers of a training step on B images, on the model's device.

        All images mask equally many tokens. `uniform`, a Python float in [0, 1), decides how many, so the host knows
        their number at once; None draws it on the device and waits for it."""
        c, L, device = self.config, self.config.grid**2, self.mask_token.device
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
        masked = math.ceil(mask_ratio(float(rand(1)) if uniform is None else uniform, c.mask_min) * L)
        normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        return Draws(
            drop=rand(B) < c.class_drop,
            mask=(rand(B, L).argsort(dim=1) < masked).float(),  # of a permutation, `masked` entries are < masked
            t=torch.randint(T, (c.batch_mul, B, L), generator=generator, device=device),
            noise=normal(c.batch_mul, B, L, c.token_dim), posterior_noise=normal(B, L, c.token_dim),
            code_uniform=rand(2, B, c.codes), masked=masked)

    # ------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def generate(self, classes, codes, iterations=64, steps=100, cfg=4.0, schedule="linear", temperature=1.0,
                 orders=None, noise=None, generator=None, t_max=T - 1, cfg_from=0.0, start=None, watch=None):
        """classes [B], codes [B, L_q] (or None) -> latents [B, L, C]. MAR section 3.3. Call eval() first.

        iterations      at most the number of tokens to draw; each draws one or more of them
        steps           diffusion steps per token: an int, or a list with an int per iteration
        cfg             strength of guidance; 1 is none
        schedule        `constant`, or `linear`: guidance grows to cfg with the share of tokens visible afterwards
        cfg_from        iterations whose guidance is below this number have none instead: half the work
        temperature     scales the noise that the diffusion head adds in its steps
        t_max           the diffusion timestep at which the head starts, from N(0, 1) as always
        orders [B, L]   a permutation of the positions per image; drawn from its end, as in MAR
        noise           a list, one [steps+1, N, C] per iteration, for its N tokens: image by image, in raster order
        generator       a torch.Generator on the model's device, or a list of B
        start           (latents [B, L, C], keep [B, L] bool): tokens that stay, equally many per image
        watch           a function that is called after each iteration with the latents so far; masked ones are zero"""
        L, C = self.config.grid**2, self.config.token_dim
        plan = make_plan(len(classes), L, iterations, steps, cfg, schedule, cfg_from, orders, generator, start,
                         classes.device)
        null = torch.full_like(classes, self.config.classes)
        x, mask = torch.zeros(len(classes), L, C, device=classes.device), plan.mask
        if start is not None:
            x = torch.where(mask[..., None] == 0, start[0], x)
        for k, later in enumerate(plan.masked):      # the first `later` positions of each order stay masked for now
            next_mask = torch.zeros_like(mask).scatter(1, plan.orders[:, :later], 1.0)
            now = (mask - next_mask).bool()                                    # [B, L]: the N tokens of this iteration
            z = self.hidden(x, classes, codes, mask)[now]                            # [N, D], image by image
            z_null = self.hidden(x, null, codes, mask)[now] if plan.cfg[k] != 1 else None  # fake_code replaces codes
            noise_k = plan.draw_noise(k, C) if noise is None else noise[k]           # [steps+1, N, C]
            x[now] = self.head.sample(z, z_null, plan.cfg[k], plan.steps[k], temperature, noise_k, t_max=t_max)
            mask = next_mask
            if watch:
                watch(x.clone())
        return x


@dataclass
class Plan:
    """What is decided before the first iteration of `generate`."""
    orders: torch.Tensor   # [B, L], positions; drawn from the end
    mask: torch.Tensor     # [B, L], 1 = masked at the start
    kept: int              # tokens per image that are not drawn
    masked: list           # tokens per image that are still masked after each iteration
    cfg: list              # guidance of each iteration; 1: none
    steps: list            # diffusion steps of each iteration
    generators: list       # B entries: the caller's list, or B times the caller's one generator or None

    def draw_noise(self, k, C):
        """The head's noise in iteration k, [steps+1, N, C], image by image from the generators."""
        n = (self.masked[k - 1] if k else self.orders.shape[1] - self.kept) - self.masked[k]
        return torch.cat([torch.randn(self.steps[k] + 1, n, C, generator=g, device=self.mask.device)
                          for g in self.generators], dim=1)


def make_plan(B, L, iterations, steps, cfg, schedule, cfg_from, orders, generator, start, device) -> Plan:
    """The Plan of `generate`; see there for the arguments."""
    kept, mask = 0, torch.ones(B, L, device=device)
    if start is not None:
        kept, mask = int(start[1][0].sum()), 1 - start[1].float()
        if (start[1].sum(1) != kept).any():
            raise ValueError("each image must keep equally many tokens")
    if not 1 <= iterations <= L - kept:
        raise ValueError(f"iterations must be between 1 and the {L - kept} tokens to draw, not {iterations}")
    if schedule not in ("linear", "constant"):
        raise ValueError(f"guidance schedule must be linear or constant, not {schedule!r}")
    generators = generator if isinstance(generator, list) else [generator] * B
    if orders is None:
        orders = torch.stack([torch.rand(L, generator=g, device=device) for g in generators]).argsort(1)
    if kept:  # a stable sort: kept tokens (mask 0) to the end, as if drawn already; the others stay in order
        orders = orders.gather(1, mask.gather(1, orders).argsort(dim=1, descending=True, stable=True))
    masked = masked_counts(L - kept, iterations)
    # As in MAR, the last iteration counts 1 masked token instead of 0, so its guidance is slightly below cfg.
    guidance = [1 + (cfg - 1) * (L - max(m, 1)) / L if schedule == "linear" else cfg for m in masked]
    return Plan(orders, mask, kept, masked, [g if g >= cfg_from else 1.0 for g in guidance],
                [steps] * iterations if isinstance(steps, int) else steps, generators)


def mask_ratio(uniform, low):
    """Share of masked tokens in a training step: normal(1, 0.25) truncated to [low, 1], from uniform in [0, 1)."""
    d = NormalDist(1, 0.25)
    return d.inv_cdf(d.cdf(low) + uniform * (d.cdf(1.0) - d.cdf(low)))


def masked_counts(L, iterations):
    """Tokens still masked after each iteration: MAR's cosine schedule, at least one drawn each time, none left.

    For L = 256 the cosine alone, rounded down, would draw no token in 3 of 64 iterations, or in 53 of 256. Such an
    iteration would run the network for nothing, so each iteration draws at least one token."""
    counts, now = [], L
    for k in range(iterations - 1):
        m = math.floor(L * math.cos(math.pi / 2 * (k + 1) / iterations))
        now = min(now - 1, m)  # leaves one for each later iteration, as the cosine lies above its chord
        counts.append(now)
    return counts + [0]
