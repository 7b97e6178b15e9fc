"""The continuous generator: a masked autoencoder over latents, with a diffusion head for each token.

D2C section 4.2, on MAR (2406.11838).

    p(latents | class, codes): hide a random part of the tokens, look at the rest and at the condition, and say for
    each hidden position what the diffusion head needs to draw it (z). Sampling starts with everything hidden and
    draws a few positions an iteration.

    Generator(cfg)
    .loss(latents [B, L, C], classes [B], codes [B, L])  -> scalar
    .generate(classes [B], codes [B, L])                 -> latents [B, L, C]

    sequence, encoder:  [ prefix P | visible latents V ]
              decoder:  [ prefix P | visible latents V | masked positions L - V ]

The transformer knows positions only from the tables added to its rows, so rows may stand in any order. Both uses
below put the visible ones first and the masked ones behind: everything is then a slice. fusion.py decides what the
prefix is and what else the blocks see. classes == cfg.classes is the null class of guidance; the fusion then puts a
learned vector in the place of every code. train.py makes a tenth of the images null, class and codes together.
"""
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from diffloss import T, DiffusionHead, HeadConfig
from fusion import make_fusion


@dataclass(frozen=True)
class GeneratorConfig:
    fusion: str = "qformer"    # one of fusion.FUSIONS
    dim: int = 768             # D
    depth: int = 12            # encoder blocks, and again as many decoder blocks
    heads: int = 12
    prefix: int = 64           # class slots in front of the latents; Q-Former's queries take the place of some
    token_dim: int = 16        # C
    grid: int = 16             # L = grid * grid
    classes: int = 1000
    head_depth: int = 6
    head_width: int = 1024
    batch_mul: int = 4         # draws of (t, noise) per token and training step
    mask_min: float = 0.7      # the smallest share of tokens that a training step hides
    dropout: float = 0.1
    class_drop: float = 0.1    # share of training images whose class and codes become null, together
    vocab: int = 16384         # K and width of the prior's code table
    code_dim: int = 768
    queries: int = 16          # Q, and the size of the Q-Former
    qformer_width: int = 512
    qformer_layers: int = 4    # of its decoder, and again as many of its encoder if it has one
    qformer_heads: int = 4
    qformer_encoder: bool = True


class Block(nn.Module):
    """ViT block, pre-norm, with the fusion's cross-attention in the middle if it has one."""

    def __init__(self, dim, heads, dropout, cross):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.cross = cross
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, keys_values=None, rows=slice(None)):
        """x [B, T, D] -> [B, T', D] for the T' rows that are asked for; keys and values come from all rows."""
        p = self.dropout if self.training else 0.0
        B, rows_in, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, rows_in, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # each [B, H, T, D/H]
        y = F.scaled_dot_product_attention(q[:, :, rows], k, v, dropout_p=p)
        x = x[:, rows] + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p)                   # [B, T', D]
        if self.cross is not None:
            x = self.cross(x, keys_values)
        h = F.dropout(F.gelu(self.fc1(self.norm2(x))), p)
        return x + F.dropout(self.fc2(h), p)


def rows_at(x, where):
    """x [B or 1, L, D], where [B, n] positions -> [B, n, D]."""
    return x.expand(len(where), -1, -1).gather(1, where[..., None].expand(-1, -1, x.shape[-1]))


# ----------------------------------------------------------------------------------------------------------- model

class Prepared(NamedTuple):
    """A fusion.Condition made ready for the blocks: what is computed once per image, however many iterations follow."""
    prefix: torch.Tensor          # [B, P, D]
    masked: torch.Tensor | None   # [B, L, D] on top of the shared mask token, for fusions that say so
    encoder: list                 # per block: cross-attention's keys and values [2, B, H, L, D/H], or None
    decoder: list


class Generator(nn.Module):
    def __init__(self, c: GeneratorConfig):
        super().__init__()
        self.config = c
        self.fusion = make_fusion(c)
        P, L = self.fusion.slots, c.grid**2
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
        for m in self.modules():  # the fusion's too
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight), nn.init.zeros_(m.bias)
        for p in (self.class_embedding.weight, self.fake_class, self.mask_token, self.encoder_positions,
                  self.decoder_positions, self.output_positions):
            nn.init.normal_(p, std=0.02)
        self.head = DiffusionHead(HeadConfig(c.token_dim, c.dim, c.head_depth, c.head_width))  # initialises itself

    def condition(self, classes, codes) -> Prepared:
        """classes [B], codes [B, L] or None -> what the fusion makes of them."""
        is_null = classes == self.config.classes                                                    # [B]
        token = self.class_embedding(classes.masked_fill(is_null, 0))
        prefix, context, masked = self.fusion(codes, torch.where(is_null[:, None], self.fake_class, token), is_null)
        read = lambda blocks: [None if context is None else b.cross.attention.keys_values(context) for b in blocks]
        return Prepared(prefix, masked, read(self.encoder_blocks), read(self.decoder_blocks))

    def run_encoder(self, latents, visible, condition):
        """latents [B, V, C] at positions visible [B, V] -> [B, P+V, D]."""
        P = self.fusion.slots
        x = self.latent_in(latents) + rows_at(self.encoder_positions[:, P:], visible)
        x = torch.cat([condition.prefix + self.encoder_positions[:, :P], x], dim=1)              # [B, P+V, D]
        x = self.encoder_in_norm(x)
        for block, keys_values in zip(self.encoder_blocks, condition.encoder):
            x = block(x, keys_values)
        return self.encoder_norm(x)

    def run_decoder(self, encoded, positions, V, rows, condition):
        """encoded [B, P+V, D]; positions [B, L], the V visible first -> z [B, n, D] of positions[:, rows], a slice."""
        P = self.fusion.slots
        masked = positions[:, V:]
        tokens = self.mask_token if condition.masked is None else self.mask_token + condition.masked
        mask = rows_at(tokens.expand(-1, positions.shape[1], -1), masked)                        # [B, L-V, D]
        x = torch.cat([self.decoder_in(encoded), mask], dim=1)                                   # [B, P+L, D]
        place = rows_at(self.decoder_positions[:, P:], positions)                                # [B, L, D]
        x = x + torch.cat([self.decoder_positions[:, :P].expand(len(x), -1, -1), place], dim=1)
        for block, keys_values in zip(self.decoder_blocks[:-1], condition.decoder[:-1]):
            x = block(x, keys_values)
        asked = slice(P + rows.start, P + rows.stop)  # the last block computes no other rows
        x = self.decoder_blocks[-1](x, condition.decoder[-1], asked)                             # [B, n, D]
        return self.decoder_norm(x) + rows_at(self.output_positions, positions[:, rows])

    def encode(self, latents, classes, codes, mask):
        """The encoder alone, for tests: mask [B, L], 1 = hidden -> [B, P+V, D], visible latents in raster order."""
        positions, V = self._visible_first(mask)
        visible = positions[:, :V]
        return self.run_encoder(rows_at(latents, visible), visible, self.condition(classes, codes))

    def hidden(self, latents, classes, codes, mask):
        """Encoder and decoder, for tests: z [B, L, D] of every position, in raster order; arguments as in `encode`."""
        positions, V = self._visible_first(mask)
        condition = self.condition(classes, codes)
        encoded = self.run_encoder(rows_at(latents, positions[:, :V]), positions[:, :V], condition)
        z = self.run_decoder(encoded, positions, V, slice(0, self.config.grid**2), condition)
        return rows_at(z, positions.argsort(1))

    def _visible_first(self, mask, visible=None):
        """mask [B, L], equally many hidden per image -> positions [B, L], visible first, and the number visible."""
        if visible is None:
            counts = (mask == 0).sum(1)
            if (counts != counts[0]).any():
                raise ValueError("a mask must hide equally many tokens of each image")
            visible = int(counts[0])
        return mask.byte().argsort(dim=1, stable=True), visible

    # ------------------------------------------------------------------------------------------------------- loss

    def loss(self, latents, classes, codes, mask=None, t=None, noise=None, visible=None):
        """Mean diffusion loss over hidden tokens and batch_mul = M draws of (t, noise). D2C Eq. 2.

        latents [B, L, C]; mask [B, L], 1 = hidden, equally many per image; t [M, B, L] int64; noise [M, B, L, C]:
        drawn when None, for all L positions, of which the hidden ones are used. visible: how many of an image's tokens
        are not hidden; given, the host need not wait for the device to count. The head runs on hidden tokens only; same
        loss and gradient as computing all and masking afterwards.
        """
        B, L, C = latents.shape
        if mask is None:
            visible = L - math.ceil(mask_ratio(float(torch.rand(())), self.config.mask_min) * L)
            mask = torch.rand(B, L, device=latents.device).argsort(1) >= visible
        positions, V = self._visible_first(mask, visible)
        condition = self.condition(classes, codes)
        encoded = self.run_encoder(rows_at(latents, positions[:, :V]), positions[:, :V], condition)
        z = self.run_decoder(encoded, positions, V, slice(V, L), condition)                      # [B, n, D], n = L - V
        masked, M = positions[:, V:], self.config.batch_mul if t is None else len(t)
        x = rows_at(latents, masked)                                                             # [B, n, C]
        if t is None:
            t = torch.randint(T, (M, B, L), device=x.device)
        if noise is None:
            noise = torch.randn(M, B, L, C, device=x.device)
        draws = masked.expand(M, B, L - V).flatten(0, 1)                                         # [M*B, n]
        t = rows_at(t.flatten(0, 1)[..., None], draws).view(M, -1)                               # [M, B*n]
        noise = rows_at(noise.flatten(0, 1), draws).view(M, -1, C)                               # [M, B*n, C]
        return self.head.loss(x.flatten(0, 1), z.flatten(0, 1), t, noise).mean()

    # --------------------------------------------------------------------------------------------------- sampling

    def null_condition(self) -> Prepared:
        """The condition of one null image. The same for all images: computed once per run, `generate` takes it."""
        device = self.fake_class.device
        codes = torch.zeros(1, self.config.grid**2, dtype=torch.long, device=device)  # fakes take their place
        return self.condition(torch.full((1,), self.config.classes, device=device), codes)

    @torch.no_grad()
    def generate(self, classes, codes, iterations=64, steps=100, cfg=4.0, schedule="linear", temperature=1.0,
                 orders=None, noise=None, generator=None, t_max=T - 1, cfg_from=1.0, null=None, progress=None,
                 known=None, keep=None, watch=None):
        """classes [B], codes [B, L] (None for fusion none) -> latents [B, L, C]. MAR section 3.3.

        iterations           rounds in which all tokens are drawn; at most as many as tokens
        steps                of the head: an int, or a list with one per iteration
        cfg, schedule        guidance; linear (growing with what is visible) or constant; cfg 1: no null branch
        cfg_from             nor in iterations whose guidance is below it
        temperature, t_max   see DiffusionHead.sample
        orders [B, L]        a permutation of the positions per image, walked from its end (MAR masks its first entries)
        noise                a list, one [steps+1, B*n, C] per iteration: batch-major, then raster order of the n drawn
        generator            a torch.Generator or a list of B
        null                 null_condition(), to share between calls
        known, keep          [B, L, C] and [B, L] bool, equally many per image: latents to start with, never redrawn
        progress, watch      called after every iteration, watch with the latents so far, zero where there is none

        In eval mode.
        """
        c, device = self.config, classes.device
        B, L = len(classes), c.grid**2
        kept = 0 if keep is None else self._visible_first(~keep)[1]      # kept positions
        if not 1 <= iterations <= L - kept:
            raise ValueError(f"iterations must be between 1 and the {L - kept} tokens to draw, not {iterations}")
        if schedule not in ("linear", "constant"):
            raise ValueError(f"guidance schedule must be linear or constant, not {schedule!r}")
        steps = [steps] * iterations if isinstance(steps, int) else steps
        if orders is None:
            draw = lambda g, b: torch.rand(b, L, generator=g, device=g.device if g else device)
            orders = per_image(generator, B, draw).to(device).argsort(1)
        if kept:  # to the end of the order, which is walked first
            orders = orders.gather(1, keep.gather(1, orders).byte().argsort(dim=1, stable=True))
        hidden = hidden_counts(L - kept, iterations)                     # [m_0, ..., 0]: hidden after each iteration
        # Positions in the order of generation; within an iteration in raster order, which the rows of noise follow.
        # Iteration k sees walk[:, :bounds[k]] and draws walk[:, bounds[k]:bounds[k + 1]]: slices, no indexing.
        bounds = [kept] + [L - m for m in hidden]
        walk = orders.flip(1)
        walk = torch.cat([walk[:, a:b].sort(1).values for a, b in zip([0] + bounds, bounds)], dim=1)
        raster = walk.argsort(1)                                         # the way back

        alone = self.condition(classes, codes)                           # once per image, for all iterations
        guided = cfg != 1.0
        both = joined(alone, null or self.null_condition()) if guided else None
        latents = torch.zeros(B, L, c.token_dim, device=device)          # in the order of `walk`
        if kept:
            latents[:, :kept] = rows_at(known, walk[:, :kept])
        for k, (V, end) in enumerate(zip(bounds, bounds[1:])):
            # MAR counts at least 1 hidden token, so that a linear schedule ends just below cfg
            scale = 1 + (cfg - 1) * (L - max(hidden[k], 1)) / L if schedule == "linear" else cfg
            condition, branches = (both, 2) if guided and scale >= cfg_from else (alone, 1)
            x, positions = latents[:, :V].repeat(branches, 1, 1), walk.repeat(branches, 1)
            encoded = self.run_encoder(x, positions[:, :V], condition)   # both branches in one batch
            z = self.run_decoder(encoded, positions, V, slice(V, end), condition)                # [B or 2B, n, D]
            z, z_null = z.flatten(0, 1).split(B * (end - V)) if branches == 2 else (z.flatten(0, 1), None)
            if noise is not None:
                noise_k = noise[k]
            else:
                draw = lambda g, b: torch.randn(steps[k] + 1, b * (end - V), c.token_dim, generator=g,
                                                device=g.device if g else device)
                noise_k = per_image(generator, B, draw, dim=1).to(device)
            x = self.head.sample(z, z_null, scale, steps[k], temperature, noise_k, t_max=t_max)
            latents[:, V:end] = x.view(B, end - V, c.token_dim)
            if progress:
                progress()
            if watch:
                watch(rows_at(latents, raster))
        return rows_at(latents, raster)


def joined(condition: Prepared, null: Prepared) -> Prepared:
    """The conditions of B images, behind them B times that of the null image."""
    join = lambda a, b, dim: None if a is None else torch.cat([a, b.expand(*a.shape)], dim)
    blocks = lambda mine, its: [join(a, b, 1) for a, b in zip(mine, its)]
    return Prepared(join(condition.prefix, null.prefix, 0), join(condition.masked, null.masked, 0),
                    blocks(condition.encoder, null.encoder), blocks(condition.decoder, null.decoder))


def mask_ratio(uniform, low):
    """Share of hidden tokens in a training step: normal(1, 0.25) truncated to [low, 1], from uniform in [0, 1)."""
    d = NormalDist(1, 0.25)
    return d.inv_cdf(d.cdf(low) + uniform * (d.cdf(1.0) - d.cdf(low)))


def hidden_counts(L, iterations):
    """Tokens still hidden after each iteration: MAR's cosine schedule, at least one drawn each time, none left."""
    counts, now = [], L
    for k in range(iterations - 1):
        m = math.floor(L * math.cos(math.pi / 2 * (k + 1) / iterations))
        now = max(1, min(now - 1, m))
        counts.append(now)
    return counts + [0]


def per_image(generator, B, draw, dim=0):
    """Random numbers of a batch: draw(generator, B) for one generator, or image by image for a list of them."""
    if isinstance(generator, list):
        return torch.cat([draw(g, 1) for g in generator], dim=dim)
    return draw(generator, B)
