"""Fusion: how the discrete codes of an image condition its continuous generator. D2C (2503.17155) 4.3; DisCon; MixAR.

    Fusion(codes [B, L] or None, class_token [B, D], is_null [B]) -> Fused

A Fused answers the three questions that the generator asks, whatever the fusion:

    prefix      [B, P, D]          the P rows in front of the latents, in encoder and decoder
    context     [B, L, D] or None  what every block's cross-attention reads
    mask_codes  [B, L, D] or None  what is added to the mask token of each position, in the decoder

L counts codes in this file. A generator may have fewer tokens than codes (GeneratorConfig.code_grid), but mask_tokens
needs one code per token. The fusions, with c = GeneratorConfig.prefix class rows:

    none             MAR: c copies of the class token, P = c                                  (2406.11838)
    qformer          Q query tokens that have read all codes, then c - Q class tokens, P = c  (D2C)
    cross_attention  c class tokens; each block attends to the embedded codes, P = c          (D2C)
    prefix           c class tokens, then the L embedded codes, P = c + L: latents and codes are one sequence of
                     self-attention                                                           (DisCon, 2507.01756)
    mask_tokens      c class tokens; the mask token of position i carries code i, P = c       (MixAR, 2511.12181)

Codes are embedded by the frozen table of the prior, plus a learned position (not in the paper, but attention would
see an unordered set without it), and projected to the generator's width: h_q = Linear(Embed(q) + position), Eq. 4.
Class and codes are dropped together: where the class is null, one learned vector replaces the code at every position.
DisCon's and MixAR's papers are less explicit than D2C's. They share this embedding here, so that fusions differ in
nothing but the place where the codes enter.

To add a sixth fusion:
    1. Derive a class from CodeFusion. In __init__ set self.slots, the number P of prefix rows, if it is not c.
    2. In forward call self.embed(codes, is_null) for h_q [B, L, D], and return a Fused that puts it to use.
    3. If every block needs a layer for it, return that layer from make_cross_attention.
    4. Add the class to FUSIONS. Its name is now a value of --fusion, and every test of a fusion runs on it.
Whatever only prefix, context and mask_codes carry, the generator and fast.py already know what to do with.

generator.py calls a fusion once per forward pass; fast.py once per image when sampling.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Fused(NamedTuple):
    prefix: torch.Tensor
    context: torch.Tensor | None = None
    mask_codes: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------------- attention

class Attention(nn.Module):
    """Multi-head attention of rows x [B, T, D] over rows y [B, U, D]. No mask; every projection has a bias."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def keys_values(self, y):
        """[B, U, D] -> [2, B, H, U, D/H]: keys and values of y."""
        B, U, D = y.shape
        return self.kv(y).view(B, U, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def attend(self, x, keys_values):
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.heads, D // self.heads).transpose(1, 2)       # [B, H, T, D/H]
        y = F.scaled_dot_product_attention(q, *keys_values)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))

    def forward(self, x, y):
        return self.attend(x, self.keys_values(y))


class CrossAttention(nn.Module):
    """Attention(LayerNorm(x), h_q): stands in every generator block between self-attention and MLP. D2C Eq. 5.

    The paper does not say in which blocks. Its Table 1 does: prior and generator have 389M parameters together, which
    fits cross-attention in all 24 blocks (388.7M) and no smaller number. LayerNorm's eps is the generator's.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)

    def forward(self, x, context):
        return self.attention(self.norm(x), context)


# --------------------------------------------------------------------------------------------------------- Q-Former

class MapperLayer(nn.Module):
    """Pre-norm Transformer layer with ReLU: self-attention, cross-attention if `reads`, feed-forward."""

    def __init__(self, width, heads, reads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross = (nn.LayerNorm(width), Attention(width, heads)) if reads else (None, None)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x, memory=None):
        h = self.norm1(x)
        x = x + self.attention(h, h)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class QFormer(nn.Module):
    """h_q [B, L, D] -> queries [B, Q, D]. D2C Eq. 6. GILL's mapper (2305.17216): encoder-decoder, learned queries.

    LayerNorm (eps 1e-5) and queries (normal(1)) follow GILL. With encoder=False the queries read h_q directly: the
    decoder alone, which D2C's Table 3 compares.
    """

    def __init__(self, dim, queries, width, layers, heads, encoder=True):
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.encoder = nn.ModuleList(MapperLayer(width, heads, reads=False) for _ in range(layers if encoder else 0))
        self.decoder = nn.ModuleList(MapperLayer(width, heads, reads=True) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(1, queries, width))

    def forward(self, h):
        h = self.down(h)                                                            # [B, L, width]
        for layer in self.encoder:
            h = layer(h)
        h = self.encoder_norm(h)
        x = self.queries.expand(len(h), -1, -1)                                     # [B, Q, width]
        for layer in self.decoder:
            x = layer(x, h)
        return self.up(self.decoder_norm(x))                                        # [B, Q, D]


# ----------------------------------------------------------------------------------------------------------- fusions

class Fusion(nn.Module):
    """What all fusions share: `slots` is P, the number of prefix rows; `class_slots` of them hold the class token."""
    reads_codes = False  # True: a run also needs a VQ tokenizer and a prior

    def __init__(self, c):
        super().__init__()
        self.slots = self.class_slots = c.prefix

    def make_cross_attention(self, dim, heads):
        """A new layer for one generator block, between self-attention and MLP; None for most fusions."""
        return None

    def class_rows(self, class_token):
        return class_token[:, None].expand(-1, self.class_slots, -1)


class NoFusion(Fusion):
    """MAR: the class alone."""

    def forward(self, codes, class_token, is_null):
        return Fused(self.class_rows(class_token))


class CodeFusion(Fusion):
    """Embeds the codes: h_q = Linear(Embed(q) + position). Eq. 4."""
    reads_codes = True

    def __init__(self, c):
        super().__init__(c)
        self.embedding = nn.Embedding(c.vocab, c.code_dim)  # frozen; the prior's, or unit normal without a prior
        self.embedding.weight.requires_grad_(False)
        self.fake_code = nn.Parameter(torch.randn(c.code_dim))
        self.positions = nn.Parameter(torch.randn(1, c.codes, c.code_dim))
        self.project = nn.Linear(c.code_dim, c.dim)  # generator.py initialises all Linear layers

    def copy_table(self, table):
        """Takes the prior's table [K, code_dim], scaled to unit variance.

        The entries of the prior's table are a few hundredths. Unscaled, keys and values would be as small: attention
        would start out uniform over the codes and need thousands of steps to find the code at its own position.
        """
        self.embedding.weight.data.copy_(table / table.std())

    def embed(self, codes, is_null):
        """codes [B, L], is_null [B] -> h_q [B, L, D]; a null image has the fake code at every position."""
        if codes is None:
            raise ValueError("this generator's fusion needs codes; codes=None is for fusion 'none'")
        e = torch.where(is_null[:, None, None], self.fake_code, self.embedding(codes))
        return self.project(e + self.positions)


class QFormerFusion(CodeFusion):
    def __init__(self, c):
        super().__init__(c)
        if c.queries > c.prefix:
            raise ValueError(f"{c.queries} queries do not fit into {c.prefix} prefix rows")
        self.class_slots -= c.queries
        self.qformer = QFormer(c.dim, c.queries, c.qformer_width, c.qformer_layers, c.qformer_heads, c.qformer_encoder)

    def forward(self, codes, class_token, is_null):
        queries = self.qformer(self.embed(codes, is_null))
        return Fused(torch.cat([queries, self.class_rows(class_token)], dim=1))


class CrossAttentionFusion(CodeFusion):
    def make_cross_attention(self, dim, heads):
        return CrossAttention(dim, heads)

    def forward(self, codes, class_token, is_null):
        return Fused(self.class_rows(class_token), context=self.embed(codes, is_null))


class PrefixFusion(CodeFusion):
    """A code gets two positions: the embedding's, and the one that the generator adds to each prefix row."""

    def __init__(self, c):
        super().__init__(c)
        self.slots += c.codes

    def forward(self, codes, class_token, is_null):
        return Fused(torch.cat([self.class_rows(class_token), self.embed(codes, is_null)], dim=1))


class MaskTokenFusion(CodeFusion):
    """Adds the embedded code to the shared mask token. MixAR replaces the token, which can express the same, because
    the projection has a bias. The encoder sees no hidden position, so it sees no codes either.
    """

    def __init__(self, c):
        super().__init__(c)
        if c.code_grid not in (0, c.grid):
            raise ValueError("mask_tokens needs one code per token; choose another fusion or equal grids")

    def forward(self, codes, class_token, is_null):
        return Fused(self.class_rows(class_token), mask_codes=self.embed(codes, is_null))


FUSIONS = {"none": NoFusion, "qformer": QFormerFusion, "cross_attention": CrossAttentionFusion,
           "prefix": PrefixFusion, "mask_tokens": MaskTokenFusion}


def make_fusion(c) -> Fusion:
    """The fusion that a GeneratorConfig names."""
    if c.fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {c.fusion!r}; known are {', '.join(FUSIONS)}")
    return FUSIONS[c.fusion](c)
