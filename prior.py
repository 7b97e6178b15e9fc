"""The discrete prior: a Llama-style Transformer over the codes of an image, given its class.

D2C (2503.17155) section 4.1, Eq. 3, where q_i is code i:

    p(q | class) = prod_i p(q_i | q_<i, class)

    Prior(config)(codes [B, L], classes [B]) -> logits [B, L+1, K] fp32; [:, i] predicts code i, the last nothing
    .draw(B, generator)                      -> drop [B] for a training step: which images lose their class
    .loss(codes, classes, drop)              -> mean cross-entropy, nats per code; ln K at the start
    .generate(classes, ...)                  -> codes [B, L]
    .mixture(codes, classes, share, uniform) -> codes [B, L], some of them drawn by the prior, to train generator.py on

L codes of an image, K entries of the codebook, D = dim, H = heads. The class is one token in front of the codes.
Classes are 0 to config.classes - 1; class number config.classes is the null class of classifier-free guidance.

The layer sizes are those of LlamaGen-B (2406.06525), 110,888,448 parameters; checkpoints.py reads its published file.
`train.py --stage 1` trains the prior. sample.py lets it draw codes, from which generator.py makes the picture."""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PriorConfig:
    dim: int = 768
    layers: int = 12
    heads: int = 12
    vocab: int = 16384     # K, the codebook size
    grid: int = 16         # L = grid * grid
    classes: int = 1000
    dropout: float = 0.1
    class_drop: float = 0.1  # share of training images whose class becomes the null class

    @property
    def ffn_dim(self):  # SwiGLU: 2/3 of 4*dim, rounded up to a multiple of 256; 2048 for 768
        return 256 * math.ceil(int(8 * self.dim / 3) / 256)


# ---------------------------------------------------------------------------------------------------------- blocks

class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).type_as(x) * self.weight


def rope_table(grid, head_dim, base=10000.0):
    """2D rotary positions: [L+1, head_dim/2, 2] cosines and sines, fp32; entry 0 belongs to the class token.

    The first half of a head's channel pairs is rotated by the grid row of a position, the second half by its column."""
    # head_dim/4 frequencies, used once for rows and once for columns
    freqs = base ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = torch.arange(grid).float()[:, None] * freqs                                    # [grid, head_dim/4]
    rows, columns = angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)
    angles = torch.cat([rows, columns], dim=1)                                              # [L, head_dim/2]
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    # Trap: entry 0 is not a rotation by angle 0, (cos, sin) = (1, 0), but (0, 0). It makes the class token's query and
    # key zero vectors, so every query's score for it, before the softmax, is 0, while its value still counts.
    # LlamaGen's weights were trained so.
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])


def rotate(x, table):
    """Rotates channel pairs (2i, 2i+1) of x [..., n, head_dim] by the angles of table [n, head_dim/2, 2].

    A pair (a, b) is the complex number a + ib; the product with cos + i sin turns it."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())            # [..., n, head_dim/2]
    return torch.view_as_real(pairs * torch.view_as_complex(table)).flatten(-2).type_as(x)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + SwiGLU(norm(x)). The names of the layers are Llama's."""

    def __init__(self, c: PriorConfig):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim), RMSNorm(c.dim)
        self.wqkv = nn.Linear(c.dim, 3 * c.dim, bias=False)     # queries, keys and values in one product
        self.wo = nn.Linear(c.dim, c.dim, bias=False)           # attention's output
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)       # SwiGLU: w2(silu(w1 x) * w3 x)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)

    def attend(self, x, table, cache=None):
        B, rows, D = x.shape
        q, k, v = self.wqkv(x).view(B, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)          # each [B, H, rows, D/H]
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:  # a list: keys and values [B, H, 1, D/H] of each position so far
            cache.append((k, v))
            k, v = (torch.cat(all_positions, dim=2) for all_positions in zip(*cache))
        # With a cache the only query is the newest position. It sees all keys; is_causal would show it only the first.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.wo(y.transpose(1, 2).reshape(B, rows, D))

    def forward(self, x, table, cache=None):
        dropout = lambda y: F.dropout(y, self.dropout, self.training)
        x = x + dropout(self.attend(self.attention_norm(x), table, cache))
        h = self.ffn_norm(x)
        return x + dropout(self.w2(F.silu(self.w1(h)) * self.w3(h)))


# ----------------------------------------------------------------------------------------------------------- model

class Prior(nn.Module):
    def __init__(self, c: PriorConfig):
        super().__init__()
        self.config = c
        self.class_embedding = nn.Embedding(c.classes + 1, c.dim)
        self.code_embedding = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim)
        self.output = nn.Linear(c.dim, c.vocab, bias=False)
        self.register_buffer("rope", rope_table(c.grid, c.dim // c.heads), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        nn.init.zeros_(self.output.weight)  # the first loss is ln K

    def forward(self, codes, classes):
        """First n codes [B, n] int64, n <= L; classes [B] int64, null: config.classes -> logits [B, n+1, K] fp32."""
        x = torch.cat([self.class_embedding(classes)[:, None], self.code_embedding(codes)], dim=1)  # [B, n+1, D]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.rope[:x.shape[1]])
        return self.output(self.norm(x)).float()

    # ------------------------------------------------------------------------------------------------- training

    def loss(self, codes, classes, drop=None):
        """Mean cross-entropy in nats per code. drop [B] bool: images whose class becomes null; None: no class does."""
        classes = classes if drop is None else classes.masked_fill(drop, self.config.classes)
        logits = self(codes[:, :-1], classes)                                                # no code follows the last
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    @torch.no_grad()
    def resample(self, codes, classes, uniform):
        """Draws every code again from p(q_i | q_<i, class), given the *true* codes before it. Call eval() first.

        One causal pass gives all L distributions (teacher forcing). uniform [B, L] in [0, 1) are the random numbers.
        D2C trains its generator on these codes: like sampled ones, they contain mistakes of the prior, although here
        no mistake leads to others. They are drawn at temperature 1, without guidance."""
        # 32 images at a time: their logits for K = 16384 take 0.5 GB
        parts = zip(codes.split(32), classes.split(32), uniform.split(32))
        return torch.cat([pick(self(c[:, :-1], y), u) for c, y, u in parts])

    def mixture(self, codes, classes, share, uniform):
        """Keeps each true code with probability `share` (D2C: 0), else takes the resampled one. Call eval() first.

        uniform [2, B, L]: uniform[0] decides which codes stay, uniform[1] draws the others."""
        if share == 1:
            return codes
        return torch.where(uniform[0] < share, codes, self.resample(codes, classes, uniform[1]))

    def draw(self, B, generator=None):
        """What a training step draws for B images, beside dropout: drop [B] bool, True where the class becomes null.

        It is apart from `loss`, so that each process draws for the whole batch and then takes its own images."""
        return torch.rand(B, generator=generator, device=self.rope.device) < self.config.class_drop

    # ------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def generate(self, classes, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, given=None, watch=None):
        """classes [B] -> codes [B, L] int64, raster order. Call eval() first.

        cfg                   guidance on the logits, null + cfg * (cond - null); 1 skips the null branch
        temperature           divides the logits
        top_k, top_p          see filter_logits
        generator             a torch.Generator on the model's device, or a list of B, one per image
        given [B, L]          codes that stay (for editing), -1 where one is drawn; they are drawn in raster order,
                              so a drawn code does not see the given codes that follow it
        watch                 a function that is called after every code, to show progress"""
        B, L = len(classes), self.config.grid**2
        uniform = uniform_numbers(B, L, generator, classes.device)
        guided = cfg != 1
        if guided:  # the null branch is the second half of the batch
            classes = torch.cat([classes, torch.full_like(classes, self.config.classes)])
        x = self.class_embedding(classes)[:, None]                                           # [B or 2B, 1, D]
        codes, caches = [], [[] for _ in self.blocks]
        for i in range(L):
            for block, cache in zip(self.blocks, caches):
                x = block(x, self.rope[i:i + 1], cache)
            logits = self.output(self.norm(x[:, -1])).float()                                # [B or 2B, K]
            code = choose(logits, cfg, temperature, top_k, top_p, uniform[:, i])             # [B]
            if given is not None:
                code = torch.where(given[:, i] < 0, code, given[:, i])
            codes.append(code)
            x = self.code_embedding(torch.cat([code, code]) if guided else code)[:, None]
            if watch:
                watch()
        return torch.stack(codes, dim=1)


def choose(logits, cfg, temperature, top_k, top_p, uniform):
    """Logits [B, K], or [2B, K] with the null rows after the conditional ones -> one code per image [B]."""
    if temperature <= 0:
        raise ValueError("the temperature must be above 0; top_k=1 takes the likeliest code")
    if cfg != 1:
        cond, null = logits.chunk(2)
        logits = null + cfg * (cond - null)
    return pick(filter_logits(logits / temperature, top_k, top_p), uniform)


def filter_logits(logits, top_k=0, top_p=1.0):
    """logits [..., K] -> the same with -inf outside the k likeliest codes and outside the nucleus of probability top_p.

    Codes equal to the k-th stay too, and the code with which the nucleus exceeds top_p. 0 and 1.0 keep all codes."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        values, order = logits.sort(descending=True)
        probs = values.softmax(-1)
        outside = probs.cumsum(-1) - probs > top_p  # the codes before this one already hold more than top_p
        outside = torch.empty_like(outside).scatter(-1, order, outside)  # from sorted order back to the codebook's
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def pick(logits, uniform):
    """One code per distribution by the inverse of its cumulative sum: logits [..., K], uniform [...] -> int64 [...].

    torch.multinomial has the same distribution but takes one generator for the whole batch. With one uniform number
    per code, from a generator per image, the random numbers of an image do not depend on the batch it is drawn in."""
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]                                   # 1 up to rounding
    # If rounding made the target equal to total, no sum would be above it and the index would be K: so it stays below.
    target = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= target).sum(-1)                          # the index of the first sum above the target


def uniform_numbers(B, L, generator, device):
    """Uniform numbers [B, L]: row b from generator b of a list, or all rows from one generator."""
    generators = generator if isinstance(generator, list) else [generator] * B
    return torch.stack([torch.rand(L, generator=g, device=device) for g in generators])
