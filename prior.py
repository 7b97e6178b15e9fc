"""The discrete prior: a Llama-style transformer over the codes of an image, given its class. D2C section 4.1, Eq. 3.

    p(q | class) = prod_i p(q_i | q_<i, class)

    Prior(cfg)(codes [B, L], classes [B]) -> logits [B, L+1, K] fp32; logits[:, i] predict code i, the last none
    .loss(codes, classes)                 -> mean cross-entropy, nats per code; ln K at the start
    .generate(classes, ...)               -> codes [B, L]
    .resample(codes, classes, uniform)    -> codes [B, L] from p(q_i | true q_<i, class): D2C's condition in training

The class is one token in front of the codes; class index PriorConfig.classes is the null class of guidance (whose
strength is the argument `cfg`). Sizes and weights are LlamaGen's (arXiv 2406.06525): B 110,888,448 parameters.
`train.py --stage 1` trains it, `sample.py` draws from it.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from runtime import Linear  # torch's, faster for few rows on a CPU


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
    def hidden(self):  # SwiGLU: 2/3 of 4*dim, rounded up to a multiple of 256
        return -(-int(8 * self.dim / 3) // 256) * 256


# ---------------------------------------------------------------------------------------------------------- blocks

class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).type_as(x) * self.weight


def rope_table(grid, head_dim, base=10000.0):
    """2D rotary positions: [L+1, head_dim/2, 2] cosines and sines, fp32; row 0 belongs to the class token.

    The first half of a head's channel pairs turns with the row of the position, the second half with the column.
    Trap: row 0 is *zero*, where an angle of 0 would have cosine 1. The class token's query and key therefore vanish,
    and every position sees it with logit 0. LlamaGen's weights were trained that way.
    """
    freqs = base ** (-torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))          # [head_dim/4]
    angles = torch.arange(grid).float()[:, None] * freqs                                    # [grid, head_dim/4]
    rows, columns = angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)
    angles = torch.cat([rows, columns], dim=1)                                              # [L, head_dim/2]
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros(1, head_dim // 2, 2), table])


def rotate(x, table):
    """Turns channel pairs (2i, 2i+1) of x [B, H, T, head_dim] by the angles of table [T, head_dim/2, 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)


class Cache:
    """Keys and values of one block for all positions so far, in memory that is taken once."""

    def __init__(self, length):
        self.length, self.keys_values = length, None

    def extend(self, k, v, start):
        """k, v [B, H, 1, head_dim] of position `start` -> those of positions 0 to start."""
        if self.keys_values is None:
            B, H, _, width = k.shape
            self.keys_values = k.new_empty(2, B, H, self.length, width)
        end = start + k.shape[2]
        self.keys_values[0, :, :, start:end], self.keys_values[1, :, :, start:end] = k, v
        return self.keys_values[:, :, :, :end]


class Block(nn.Module):
    def __init__(self, c: PriorConfig):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim), RMSNorm(c.dim)
        self.wqkv = Linear(c.dim, 3 * c.dim, bias=False)
        self.wo = Linear(c.dim, c.dim, bias=False)
        self.w1 = Linear(c.dim, c.hidden, bias=False)
        self.w3 = Linear(c.dim, c.hidden, bias=False)
        self.w2 = Linear(c.hidden, c.dim, bias=False)

    def attend(self, x, table, cache=None, start=0):
        B, T, D = x.shape
        q, k, v = self.wqkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)          # each [B, H, T, D/H]
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.extend(k, v, start)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)  # with a cache: one new position
        return self.wo(y.transpose(1, 2).reshape(B, T, D))

    def forward(self, x, table, cache=None, start=0):
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        x = x + drop(self.attend(self.attention_norm(x), table, cache, start))
        h = self.ffn_norm(x)
        return x + drop(self.w2(F.silu(self.w1(h)) * self.w3(h)))


# ----------------------------------------------------------------------------------------------------------- model

class Prior(nn.Module):
    def __init__(self, c: PriorConfig):
        super().__init__()
        self.config = c
        self.class_embedding = nn.Embedding(c.classes + 1, c.dim)
        self.code_embedding = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim)
        self.output = Linear(c.dim, c.vocab, bias=False)
        self.register_buffer("rope", rope_table(c.grid, c.dim // c.heads), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.zeros_(p) if name == "output.weight" else nn.init.normal_(p, std=0.02)

    def forward(self, codes, classes):
        """codes [B, L] int64, classes [B] int64 (cfg.classes = null) -> logits [B, L+1, K] fp32."""
        x = torch.cat([self.class_embedding(classes)[:, None], self.code_embedding(codes)], dim=1)  # [B, L+1, D]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.rope[:x.shape[1]])
        return self.output(self.norm(x)).float()

    # ------------------------------------------------------------------------------------------------- training

    def loss(self, codes, classes, drop=None):
        """Mean cross-entropy in nats per code. drop [B] bool: images whose class becomes null (drawn when None)."""
        if drop is None:
            drop = torch.rand(len(classes), device=classes.device) < self.config.class_drop
        logits = self(codes, classes.masked_fill(drop, self.config.classes))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def resample(self, codes, classes, uniform):
        """One causal pass over the true codes, then one draw per position from p(q_i | q_<i, class). In eval mode.

        uniform [B, L] in [0, 1) decides the draws. D2C trains its generator on these codes, not on the true ones:
        they are what a prior says that is right about the past, and so nearer to what the generator will meet when
        sampling.
        """
        parts = zip(codes.split(32), classes.split(32), uniform.split(32))  # by 32: logits of 16384 codes are large
        with torch.inference_mode():
            drawn = torch.cat([draw(self(c, y)[:, :-1], u) for c, y, u in parts])
        return drawn.clone()  # a tensor that autograd may keep

    # ------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def generate(self, classes, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, greedy=False,
                 progress=None, given=None):
        """classes [B] -> codes [B, L] int64, raster order.

        cfg: guidance, u + cfg * (c - u) on the logits; at 1 or below the null branch is left away. generator: a
        torch.Generator, or a list of B, one per image. progress: called after every code. given [B, L]: codes that
        stay, -1 where one is drawn; as the order is fixed, a drawn code knows only those before it. In eval mode.
        """
        if temperature <= 0:
            raise ValueError("the temperature must be above 0; greedy=True takes the likeliest codes")
        B, L, device = len(classes), self.config.grid**2, classes.device
        uniform = torch.zeros(B, L, device=device) if greedy else randoms(B, L, generator, device)
        branches = 2 if cfg > 1 else 1
        if branches == 2:  # in one batch
            classes = torch.cat([classes, torch.full_like(classes, self.config.classes)])
        x = self.class_embedding(classes)[:, None]                                           # [B or 2B, 1, D]
        caches = [Cache(L + 1) for _ in self.blocks]
        codes = torch.empty(B, L, dtype=torch.long, device=device)
        for i in range(L):
            for block, cache in zip(self.blocks, caches):
                x = block(x, self.rope[i:i + 1], cache, start=i)
            logits = self.output(self.norm(x[:, -1])).float()                                # [B or 2B, K]
            if branches == 2:
                cond, null = logits.chunk(2)
                logits = null + cfg * (cond - null)
            if greedy:
                codes[:, i] = logits.argmax(-1)
            else:
                codes[:, i] = draw(filter_logits(logits / temperature, top_k, top_p), uniform[:, i])
            if given is not None:
                codes[:, i] = torch.where(given[:, i] < 0, codes[:, i], given[:, i])
            x = self.code_embedding(codes[:, i:i + 1]).repeat(branches, 1, 1)
            if progress:
                progress()
        return codes


def filter_logits(logits, top_k=0, top_p=1.0):
    """logits [..., K] -> the same with -inf outside the k likeliest codes and outside the nucleus of probability top_p.

    The nucleus keeps the first code that carries the sum over top_p. 0 and 1.0 switch the filters off.
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        values, order = logits.sort(descending=True)
        probs = values.softmax(-1)
        outside = probs.cumsum(-1) - probs > top_p  # what stands before this code is already more than top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def draw(logits, uniform):
    """One code per distribution by the inverse of its cumulative sum: logits [..., K], uniform [...] -> int64 [...].

    torch.multinomial would do, but takes one generator a batch; with one uniform number per code a picture depends on
    its own seed alone, whatever batch it is drawn in.
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    target = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= target).sum(-1)  # the first code whose sum exceeds the target: never one of probability 0


def randoms(B, L, generator, device):
    """Uniform numbers [B, L] from one generator, or row by row from a list of B."""
    if isinstance(generator, list):
        return torch.stack([torch.rand(L, generator=g, device=g.device) for g in generator]).to(device)
    return torch.rand(B, L, generator=generator, device=generator.device if generator else device).to(device)
