"""Fusion: how the discrete codes of an image condition its continuous generator. D2C (2503.17155) 4.3; DisCon; MixAR.

    Fusion(codes [B, L] or None, class_token [B, D], is_null [B]) -> Condition

A Condition answers the three questions that the generator asks, whatever the fusion:

    prefix   [B, slots, D]      what stands in front of the latents, in encoder and decoder
    context  [B, L, D] or None  what every block's cross-attention reads
    masked   [B, L, D] or None  what is added to the mask token of each position, in the decoder

The fusions, with P = GeneratorConfig.prefix and L codes (generator.py's P is the number of all slots):

    none             MAR: P copies of the class token                                       (2406.11838)
    qformer          Q query tokens that have read all codes, then P - Q class tokens        (D2C)
    cross_attention  P class tokens; each block attends to the embedded codes                (D2C)
    prefix           P class tokens, then the L embedded codes: latents and codes are one sequence of self-attention
                                                                                            (DisCon, 2507.01756)
    mask_tokens      P class tokens; the mask token of position i carries code i            (MixAR's DC-Mix, 2511.12181)

Codes are embedded by the frozen table of the prior, plus a learned position (not in the paper, but without one
attention would see a bag of codes), and projected to the generator's width: h_q = Linear(Embed(q) + position), Eq. 4.
Where the class is null, so are the codes: one learned vector stands for all. DisCon's and MixAR's papers are less
explicit than D2C's: they share this embedding here, so that the fusions differ in nothing but where the codes enter.
generator.py calls this once a forward, once an image when sampling.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Condition(NamedTuple):
    prefix: torch.Tensor
    context: torch.Tensor | None = None
    masked: torch.Tensor | None = None


# ------------------------------------------------------------------------------------------------------- attention

class Attention(nn.Module):
    """Multi-head attention of rows x [B, T, D] over rows y [B, U, D], given as keys_values(y).

    No mask; every projection has a bias.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def keys_values(self, y):
        """[B, U, D] -> [2, B, H, U, D/H]: all that attention needs of y, to be computed once per image."""
        B, U, D = y.shape
        return self.kv(y).view(B, U, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, x, keys_values):
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.heads, D // self.heads).transpose(1, 2)       # [B, H, T, D/H]
        y = F.scaled_dot_product_attention(q, *keys_values)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class CrossAttention(nn.Module):
    """x + Attention(LayerNorm(x), h_q): stands in every generator block between self-attention and MLP. D2C Eq. 5.

    The generator calls attention.keys_values(h_q) once per image. LayerNorm's eps is that of the generator's blocks.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)

    def forward(self, x, keys_values):
        return x + self.attention(self.norm(x), keys_values)


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
        x = x + self.attention(h, self.attention.keys_values(h))
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), self.cross.keys_values(memory))
        return x + self.mlp(self.norm3(x))


class QFormer(nn.Module):
    """h_q [B, L, D] -> queries [B, Q, D]. D2C Eq. 6. GILL's mapper (2305.17216): encoder-decoder, learned queries.

    LayerNorm (eps 1e-5) and queries (normal(1)) follow GILL. encoder=False: the queries read the codes as they are,
    the decoder alone that D2C's Table 3 compares.
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
    """`none`, and the base of the others. slots: rows of Condition.prefix; class_slots: those with the class token."""
    reads_codes = False  # True: a run also needs a VQ tokenizer and a prior

    def __init__(self, c):
        super().__init__()
        self.slots = self.class_slots = c.prefix

    def make_cross_attention(self, dim, heads):
        """A new module for one generator block, between self-attention and MLP; None for most fusions."""
        return None

    def class_rows(self, class_token):
        return class_token[:, None].expand(-1, self.class_slots, -1)

    def forward(self, codes, class_token, is_null):
        return Condition(self.class_rows(class_token))


class CodeFusion(Fusion):
    """Embeds the codes: h_q = Linear(Embed(q) + position). Eq. 4."""
    reads_codes = True

    def __init__(self, c):
        super().__init__(c)
        self.embedding = nn.Embedding(c.vocab, c.code_dim)  # frozen; the prior's, or unit normal without a prior
        self.embedding.weight.requires_grad_(False)
        self.fake_code = nn.Parameter(torch.randn(c.code_dim))
        self.positions = nn.Parameter(torch.randn(1, c.grid**2, c.code_dim))
        self.project = nn.Linear(c.code_dim, c.dim)  # generator.py initialises all Linear layers

    def copy_table(self, table):
        """Takes the prior's table [K, code_dim], scaled to unit variance.

        As it comes its entries are a few hundredths, and keys and values as small: attention then starts out
        uniform over the codes and takes thousands of steps to find the one at its own position.
        """
        self.embedding.weight.data.copy_(table / table.std())

    def embed(self, codes, is_null):
        if codes is None:
            raise ValueError("this generator's fusion needs codes; codes=None is for fusion 'none'")
        e = torch.where(is_null[:, None, None], self.fake_code, self.embedding(codes))
        return self.project(e + self.positions)                                     # [B, L, D]


class QFormerFusion(CodeFusion):
    def __init__(self, c):
        super().__init__(c)
        if c.queries > c.prefix:
            raise ValueError(f"{c.queries} queries do not fit into {c.prefix} prefix slots")
        self.class_slots -= c.queries
        self.qformer = QFormer(c.dim, c.queries, c.qformer_width, c.qformer_layers, c.qformer_heads, c.qformer_encoder)

    def forward(self, codes, class_token, is_null):
        queries = self.qformer(self.embed(codes, is_null))
        return Condition(torch.cat([queries, self.class_rows(class_token)], dim=1))


class CrossAttentionFusion(CodeFusion):
    def make_cross_attention(self, dim, heads):
        return CrossAttention(dim, heads)

    def forward(self, codes, class_token, is_null):
        return Condition(self.class_rows(class_token), context=self.embed(codes, is_null))


class PrefixFusion(CodeFusion):
    """A code gets two positions: the embedding's, and the one that the generator adds to each slot."""

    def __init__(self, c):
        super().__init__(c)
        self.slots += c.grid**2

    def forward(self, codes, class_token, is_null):
        return Condition(torch.cat([self.class_rows(class_token), self.embed(codes, is_null)], dim=1))


class MaskTokenFusion(CodeFusion):
    """Adds to the shared mask token where MixAR replaces it: which can express the same, as the projection has a bias.

    The encoder, which sees no masked position, sees no codes either.
    """

    def forward(self, codes, class_token, is_null):
        return Condition(self.class_rows(class_token), masked=self.embed(codes, is_null))


FUSIONS = {"none": Fusion, "qformer": QFormerFusion, "cross_attention": CrossAttentionFusion, "prefix": PrefixFusion,
           "mask_tokens": MaskTokenFusion}


def make_fusion(c) -> Fusion:
    """The fusion that a GeneratorConfig names."""
    if c.fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {c.fusion!r}; known are {', '.join(FUSIONS)}")
    return FUSIONS[c.fusion](c)
