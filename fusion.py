"""Fusion: how the discrete codes of an image condition its continuous generator.

The methods are those of D2C (2503.17155, section 4.3), DisCon (2507.01756), MixAR (2511.12181) and MAR (2406.11838).

    make_fusion(config)(codes [B, L_q] int64 or None, class_token [B, D], is_null [B] bool) -> Fused

is_null marks images without class: the caller has replaced their class_token; the fusion replaces their codes. A Fused:

    prefix      [B, P, D]            rows in front of the tokens, at the input of the generator's encoder
    context     [B, L_q, D] or None  what the cross-attention of every block reads
    mask_codes  [B, L, D] or None    what the decoder adds to the mask tokens of the L positions

L_q is the number of codes (L in prior.py), L that of the tokens. n is GeneratorConfig.prefix, 64 in MAR: n copies of
the class token, told apart by learned positions, give the Transformer rows to compute in. P is n; but in the fusion
that is called `prefix` the codes stand in the prefix too.

    none             prefix: n class tokens                                                    MAR     P = n
    qformer          prefix: Q outputs of the Q-Former, which reads all codes (Q is
                     GeneratorConfig.queries), then n - Q class tokens                         D2C     P = n
    cross_attention  prefix: n class tokens; context: the embedded codes                       D2C     P = n
    prefix           prefix: n class tokens, then the L_q embedded codes, so that self-attention
                     runs over codes and tokens together                                       DisCon  P = n + L_q
    mask_tokens      prefix: n class tokens; mask_codes: the embedded codes of each position   MixAR   P = n

All but `none` embed codes as h_q = Linear(Embed(q) + position). Embed is a copy of the prior's code table, rescaled
and, as in D2C, frozen. This is D2C Eq. 4 plus a learned position, without which attention to the codes would see a set.
Class and codes are dropped together: where is_null, one learned vector (`fake_code`) replaces each Embed(q).

To add a sixth fusion:
    1. Derive from CodeFusion. In __init__ set self.prefix_rows (P) and self.class_rows (its class tokens) if not n.
    2. In forward compute h_q = self.embed(codes, is_null) [B, L_q, D]; make a Fused of it and self.repeat(class_token).
    3. If every block needs an extra layer, return it from make_cross_attention, and set context. The block computes
       x + layer(x, context) between self-attention and MLP.
    4. Add the class to FUSIONS. Its key is then a value of --fusion, and the tests of all fusions include it.
New sizes go to GeneratorConfig. fast.py, the faster form of the loops, needs no change if the layer of step 3 is a
CrossAttention and the codes of a null image have no influence (`embed` sees to that)."""
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
    """Multi-head attention: queries from x [B, R, D], keys and values from y [B, U, D], H heads. No attention mask.

    keys_values and attend are separate, because fast.py computes keys and values of the codes once per image."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def keys_values(self, y):
        """[B, U, D] -> [2, B, H, U, D/H]: keys and values of y."""
        B, U, D = y.shape
        return self.kv(y).view(B, U, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)

    def attend(self, x, keys_values):
        B, R, D = x.shape
        q = self.q(x).view(B, R, self.heads, D // self.heads).transpose(1, 2)       # [B, H, R, D/H]
        out = F.scaled_dot_product_attention(q, *keys_values)
        return self.proj(out.transpose(1, 2).reshape(B, R, D))

    def forward(self, x, y):
        return self.attend(x, self.keys_values(y))


class CrossAttention(nn.Module):
    """Attention(LayerNorm(x), h_q), between self-attention and MLP; the block adds the residual. D2C Eq. 5.

    The text of the paper does not say which blocks have it. Its Table 1 lists 389M parameters for prior plus generator,
    and only cross-attention in all 24 blocks gives that (388.7M without our positions). eps is MAR's 1e-6."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)

    def forward(self, x, context):
        return self.attention(self.norm(x), context)


# --------------------------------------------------------------------------------------------------------- Q-Former

class MapperLayer(nn.Module):
    """A layer of the Q-Former. Pre-norm, with ReLU: self-attention, cross-attention if `has_cross`, feed-forward."""

    def __init__(self, width, heads, has_cross):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross = (nn.LayerNorm(width), Attention(width, heads)) if has_cross else (None, None)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x, memory=None):
        h = self.norm1(x)
        x = x + self.attention(h, h)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class QFormer(nn.Module):
    """h_q [B, L_q, D] -> [B, Q, D]: an encoder-decoder Transformer whose decoder starts from Q learned queries.

    D2C Eq. 6, built like GILL's mapper (2305.17216): LayerNorm eps 1e-5, PyTorch's default, and queries from N(0, 1).
    encoder=False leaves out the encoder's layers; D2C's Table 3 compares both."""

    def __init__(self, dim, queries, width, layers, heads, encoder=True):
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        encoder_layers = layers if encoder else 0
        self.encoder = nn.ModuleList(MapperLayer(width, heads, has_cross=False) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(MapperLayer(width, heads, has_cross=True) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(1, queries, width))

    def forward(self, h):
        h = self.down(h)                                                            # [B, L_q, width]
        for layer in self.encoder:
            h = layer(h)
        h = self.encoder_norm(h)
        x = self.queries.expand(len(h), -1, -1)                                     # [B, Q, width]
        for layer in self.decoder:
            x = layer(x, h)
        return self.up(self.decoder_norm(x))                                        # [B, Q, D]


# ----------------------------------------------------------------------------------------------------------- fusions

class Fusion(nn.Module):
    """What all fusions share. prefix_rows is P; class_rows says how many of them hold the class token."""
    reads_codes = False  # True: it needs codes, so a run needs VQ and a prior

    def __init__(self, c):
        super().__init__()
        self.prefix_rows = self.class_rows = c.prefix

    def make_cross_attention(self, dim, heads):
        """A new layer for one generator block, between self-attention and MLP; None for most fusions."""
        return None

    def repeat(self, class_token):
        return class_token[:, None].expand(-1, self.class_rows, -1)


class NoFusion(Fusion):
    """MAR: the class alone."""

    def forward(self, codes, class_token, is_null):
        return Fused(self.repeat(class_token))


class CodeFusion(Fusion):
    """A fusion that embeds the codes."""
    reads_codes = True

    def __init__(self, c):
        super().__init__(c)
        self.embedding = nn.Embedding(c.vocab, c.code_dim)  # frozen; N(0, 1) until copy_table replaces it
        self.embedding.weight.requires_grad_(False)
        self.fake_code = nn.Parameter(torch.randn(c.code_dim))
        self.positions = nn.Parameter(torch.randn(1, c.codes, c.code_dim))
        self.project = nn.Linear(c.code_dim, c.dim)  # generator.py initialises all Linear layers

    def copy_table(self, table):
        """Copies the prior's code table [K, code_dim], divided by its standard deviation.

        The entries of that table are of size 0.02 or so, and positions start from N(0, 1). Without the division, codes
        would vanish beside positions, and the generator would need thousands of steps before it tells codes apart."""
        self.embedding.weight.data.copy_(table / table.std())

    def embed(self, codes, is_null):
        """codes [B, L_q], is_null [B] -> h_q [B, L_q, D] (MaskTokenFusion: D/k^2). D2C Eq. 4, plus a position."""
        if codes is None:
            raise ValueError("this generator's fusion needs codes; codes=None is for fusion 'none'")
        e = torch.where(is_null[:, None, None], self.fake_code, self.embedding(codes))  # [B, L_q, code_dim]
        return self.project(e + self.positions)


class QFormerFusion(CodeFusion):
    def __init__(self, c):
        super().__init__(c)
        if c.queries > c.prefix:
            raise ValueError(f"{c.queries} queries do not fit into {c.prefix} prefix rows")
        self.class_rows -= c.queries
        self.qformer = QFormer(c.dim, c.queries, c.qformer_width, c.qformer_layers, c.qformer_heads, c.qformer_encoder)

    def forward(self, codes, class_token, is_null):
        outputs = self.qformer(self.embed(codes, is_null))                          # [B, Q, D]
        return Fused(torch.cat([outputs, self.repeat(class_token)], dim=1))


class CrossAttentionFusion(CodeFusion):
    def make_cross_attention(self, dim, heads):
        return CrossAttention(dim, heads)

    def forward(self, codes, class_token, is_null):
        return Fused(self.repeat(class_token), context=self.embed(codes, is_null))


class PrefixFusion(CodeFusion):
    """Codes get positions three times: from `embed` and, as prefix rows, in the generator's encoder and decoder."""

    def __init__(self, c):
        super().__init__(c)
        self.prefix_rows += c.codes

    def forward(self, codes, class_token, is_null):
        return Fused(torch.cat([self.repeat(class_token), self.embed(codes, is_null)], dim=1))


class MaskTokenFusion(CodeFusion):
    """Adds the embedded code to the learned mask token; in MixAR the code replaces that token. The encoder sees no mask
    tokens, and so no codes. If a token has k x k codes, each fills D/k^2 of its channels; this is our extension."""

    def __init__(self, c):
        super().__init__(c)
        self.side, self.k = round(c.codes**0.5), round(c.codes**0.5) // c.grid      # c.grid: tokens per side
        if self.side != self.k * c.grid or c.dim % self.k**2:
            raise ValueError("mask_tokens needs k x k codes per token and D divisible by k^2; choose another fusion")
        self.project = nn.Linear(c.code_dim, c.dim // self.k**2)

    def forward(self, codes, class_token, is_null):
        h = self.embed(codes, is_null).mT.unflatten(2, (self.side, self.side))      # [B, D/k^2, side, side]
        h = F.pixel_unshuffle(h, self.k)                                            # [B, D, grid, grid]
        return Fused(self.repeat(class_token), mask_codes=h.flatten(2).mT)          # [B, L, D]


FUSIONS = {"none": NoFusion, "qformer": QFormerFusion, "cross_attention": CrossAttentionFusion,
           "prefix": PrefixFusion, "mask_tokens": MaskTokenFusion}


def make_fusion(c) -> Fusion:
    """The fusion that a GeneratorConfig names."""
    if c.fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {c.fusion!r}; known are {', '.join(FUSIONS)}")
    return FUSIONS[c.fusion](c)
