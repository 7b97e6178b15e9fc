"""Tokenizers: an image as discrete codes (VQ) and as continuous latents (KL). D2C (2503.17155) section 3.

    VQ.encode   images [B, 3, h*f, h*f] in [-1, 1] -> codes [B, h*h] int64, raster order               stride f
    VQ.decode   codes [B, h*h]                     -> images [B, 3, h*f, h*f]
    KL.encode   images                             -> moments [B, 2Z, h, h]: posterior mean and log-variance
    KL.sample   moments                            -> latents [B, L, C], drawn, scaled to a standard deviation of 1
    KL.decode   latents [B, L, C]                  -> images

Z is z_channels. Usually C = Z and L = h*h; with config.merge = m, squares of m x m positions become one latent, so
C = Z*m*m and L = h*h/(m*m). VQ and KL may differ in f. With f = 16 (LlamaGen, MAR) 256x256 pixels have 256 tokens.

Both are the convolutional autoencoder of latent diffusion (LDM, 2112.10752). The default sizes are those of LlamaGen's
VQ (2406.06525) and of MAR's KL (2406.11838). `train.py --stage 0` trains both with `loss`. Stage 1 (the prior over
codes) and stage 2 (the generator of latents) keep them frozen: `data.py` calls encode, `sample.py` calls decode.

The latent scale. Stage 2 wants latents with a standard deviation of 1: KL.sample multiplies them by config.scale, and
KL.decode divides by it. No other code applies it; KL.set_scale says where the number comes from."""
from collections import OrderedDict
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class VQConfig:
    ch: int = 128                     # channels at the highest resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)  # times ch, per level; each level but the last halves the resolution
    z_channels: int = 256             # width before quant_conv
    codebook_size: int = 16384        # K
    codebook_dim: int = 8             # d
    blocks: int = 2                   # residual blocks per level (one more in the decoder)
    unshuffle: int = 1                # small models: u x u pixels become channels, at 1/u of the resolution
    linear_path: bool = False         # small models: a linear codec beside the convolutions, see this file's end
    lapped: bool = False              # with linear_path: a filter across its tiles' borders, see border_filter


@dataclass(frozen=True)
class KLConfig:
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    z_channels: int = 16              # Z
    encoder_attention: bool = True    # at the lowest resolution, besides the attention in the middle
    decoder_attention: bool = False   # MAR's kl16 has none here; CompVis' kl-f16 and VA-VAE have it
    scale: float | None = 0.2325      # 1 / std of the latents, here of MAR's kl16.ckpt; None: not measured yet
    blocks: int = 2                   # this and the next three as in VQConfig
    unshuffle: int = 1
    linear_path: bool = False
    lapped: bool = False
    merge: int = 1                    # m: m x m positions make one latent of m^2 Z channels (MAR's patch_size)
    noise: float = 0.0                # training: added to latents, with a std of at most this times the latents' own

    @property
    def token_dim(self):  # C
        return self.z_channels * self.merge**2


# ---------------------------------------------------------------------------------------------------------- blocks

def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head attention over all h*w positions."""

    def __init__(self, c):
        super().__init__()
        self.norm = norm(c)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, h, w = x.shape
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # each [B, 1, hw, C]
        y = F.scaled_dot_product_attention(q, k, v)  # scale C^-1/2
        return x + self.proj(y[:, 0].mT.reshape(B, C, h, w))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if `attention`, then a change of resolution."""

    def __init__(self, cin, cout, blocks, attention, resample):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(cin if j == 0 else cout, cout) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cout) for _ in range(blocks if attention else 0))
        self.resample = resample

    def forward(self, x):
        for j, block in enumerate(self.blocks):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return x if self.resample is None else self.resample(x)


def downsample(c):  # pads at the right and at the bottom only, as LDM's weights expect
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2)))


def upsample(c):
    return nn.Sequential(OrderedDict(twice=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1)))


def middle(c):
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """[B, 3u^2, H/u, W/u] -> [B, out, h, w]. `levels` run from the highest resolution to the lowest."""

    def __init__(self, c, out, attention):
        super().__init__()
        widths, last = [c.ch * m for m in c.ch_mult], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(3 * c.unshuffle**2, c.ch, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(([c.ch] + widths)[i], w, c.blocks, attention and i == last, downsample(w) if i < last else None)
            for i, w in enumerate(widths))
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, Z, h, w] -> [B, 3u^2, H/u, W/u]. `levels` run from the lowest resolution to the highest.

    With c.lapped the highest level also sees the picture of the linear path, [B, 3u^2, H/u, W/u], to correct it."""

    def __init__(self, c, attention):
        super().__init__()
        widths, last = [c.ch * m for m in reversed(c.ch_mult)], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(c.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.levels = nn.ModuleList(
            Level(([widths[0]] + widths)[i], w, c.blocks + 1, attention and i == 0, upsample(w) if i < last else None)
            for i, w in enumerate(widths))
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 3 * c.unshuffle**2, 3, padding=1)
        self.picture_in = None
        if c.linear_path and c.lapped:
            self.picture_in = nn.Conv2d(3 * c.unshuffle**2, ([widths[0]] + widths)[last], 3, padding=1)

    def forward(self, x, picture=None):
        x = self.mid(self.conv_in(x))
        for level in self.levels[:-1]:
            x = level(x)
        if self.picture_in is not None:
            x = x + self.picture_in(picture)
        x = self.levels[-1](x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """What VQ and KL share: images to a grid with a position per stride x stride pixels, and back.

    grid_out: channels that to_grid returns; grid_in: those that to_images takes. For linear_path see the file's end."""

    def __init__(self, c, grid_out, grid_in, encoder_out, encoder_attention, decoder_attention):
        super().__init__()
        self.config, self.stride = c, c.unshuffle * 2 ** (len(c.ch_mult) - 1)
        self.encoder = Encoder(c, encoder_out, encoder_attention)
        self.quant_conv = nn.Conv2d(encoder_out, grid_out, 1)
        self.post_quant_conv = nn.Conv2d(grid_in, c.z_channels, 1)
        self.decoder = Decoder(c, decoder_attention)
        if c.linear_path:
            add_linear_path(self, grid_out, grid_in)

    def to_grid(self, images):  # [B, 3, H, W] -> [B, grid_out, h, w]
        z = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.unshuffle)))
        return z + self.patch_in(lap(images, self.border)) if self.config.linear_path else z

    def to_images(self, z):  # [B, grid_in, h, w] -> [B, 3, H, W]
        u, x = self.config.unshuffle, self.post_quant_conv(z)
        if not self.config.linear_path:
            return F.pixel_shuffle(self.decoder(x), u)
        picture = lap(self.patch_out(z), self.border, back=True)
        return picture + F.pixel_shuffle(self.decoder(x, F.pixel_unshuffle(picture, u)), u)


# -------------------------------------------------------------------------------------------------------------- VQ

class VQ(Autoencoder):
    """Discrete tokenizer: the nearest of K vectors on the unit sphere, by cosine similarity. A code is its index."""

    def __init__(self, c: VQConfig):
        super().__init__(c, grid_out=c.codebook_dim, grid_in=c.codebook_dim, encoder_out=c.z_channels,
                         encoder_attention=True, decoder_attention=True)
        self.codebook = nn.Embedding(c.codebook_size, c.codebook_dim)
        nn.init.uniform_(self.codebook.weight, -1, 1)
        self.codebook.weight.data = F.normalize(self.codebook.weight.data, dim=1)
        self.register_buffer("usage", torch.zeros(c.codebook_size), persistent=False)  # counts since the last restart

    def _quantize(self, images):
        """-> unit vectors [B, d, h, w], codes [B, h*h], their vectors [B, d, h, w]. In fp32: bf16 is too coarse."""
        z = self.to_grid(images)
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)                                     # [B, d, h, w]
            book = F.normalize(self.codebook.weight, dim=1)                       # [K, d]
            codes = (z.flatten(2).mT @ book.T).argmax(-1)                         # [B, L]: nearest = largest product
        return z, codes, F.embedding(codes, book).mT.reshape(z.shape)

    @torch.no_grad()
    def encode(self, images):
        """images [B, 3, H, W] in [-1, 1] -> codes [B, L] int64 in raster order."""
        return self._quantize(images)[1]

    @torch.no_grad()
    def decode(self, codes):
        """codes [B, L] -> images [B, 3, H, W], about [-1, 1]."""
        B, L = codes.shape
        e = F.embedding(codes, F.normalize(self.codebook.weight, dim=1))
        return self.to_images(e.mT.reshape(B, -1, isqrt(L), isqrt(L)))

    def loss(self, images):
        """-> scalar, reconstruction [B, 3, H, W]. L2 + codebook + 0.25 commitment (VQ-VAE, 1711.00937, Eq. 3).

        LlamaGen also uses LPIPS and a GAN. This repository has neither; LPIPS needs weights that cannot be shipped."""
        z, codes, e = self._quantize(images)
        with torch.no_grad():
            self.usage.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=self.usage.dtype))
        recon = self.to_images(z + (e - z).detach())  # straight-through: the decoder sees e; z gets e's gradient
        return F.mse_loss(recon, images) + F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach()), recon

    @torch.no_grad()
    def restart_dead_codes(self, images, generator):
        """Replaces vectors that no image used since the last call by random encodings of `images` -> their indices."""
        dead = (self.usage == 0).nonzero().flatten()
        z = F.normalize(self.to_grid(images), dim=1).flatten(2).mT.flatten(0, 1)  # [B*L, d]
        dead = dead[:len(z)]
        self.codebook.weight[dead] = z[torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)]
        self.usage.zero_()
        return dead


# -------------------------------------------------------------------------------------------------------------- KL

class KL(Autoencoder):
    """Continuous tokenizer: a Gaussian posterior per position."""

    def __init__(self, c: KLConfig):
        super().__init__(c, grid_out=2 * c.z_channels, grid_in=c.z_channels, encoder_out=2 * c.z_channels,
                         encoder_attention=c.encoder_attention, decoder_attention=c.decoder_attention)

    def set_scale(self, scale):
        """Puts the latents' measured 1 / std (`latent_scale`) into the config.

        Stage 0 measures it for kl.pt, or data.py for a kl.pt without it (VA-VAE). Stage 2 copies it into generator.pt
        and sample.py takes it from there, because decoding with another scale gives wrong contrast."""
        self.config = replace(self.config, scale=scale)

    @torch.no_grad()
    def encode(self, images):
        """images [B, 3, H, W] in [-1, 1] -> moments [B, 2Z, h, h]: mean, then log-variance, unscaled."""
        return self.to_grid(images)

    @staticmethod
    def posterior(moments):
        """moments [B, 2Z, h, h] -> mean and log-variance, each [B, Z, h, h]."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, moments, noise=None, generator=None):
        """moments [B, 2Z, h, h] -> latents [B, L, C]: drawn from the posterior, scaled, merged.

        noise: B*L*C independent numbers; any shape will do. Zeros give the posterior's mean."""
        mean, logvar = self.posterior(moments)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + (0.5 * logvar).exp() * noise.reshape(mean.shape)
        return F.pixel_unshuffle(z * self.config.scale, self.config.merge).flatten(2).mT

    @torch.no_grad()
    def decode(self, latents):
        """latents [B, L, C], scaled -> images [B, 3, H, W], about [-1, 1]."""
        B, L, C = latents.shape
        z = (latents / self.config.scale).mT.reshape(B, C, isqrt(L), isqrt(L))
        return self.to_images(F.pixel_shuffle(z, self.config.merge))

    def loss(self, images, draws=None):
        """-> scalar, reconstruction. draws: as `draw` gives them, drawn when None.

        L1 + L2 + 1e-6 KL to the unit Gaussian. LDM has LPIPS and a GAN instead of L2. LDM's weight of KL is the same,
        but LDM sums the reconstruction error; this code averages it, so KL counts 3HW times more. With config.noise the
        decoder learns to decode imperfect latents, such as stage 2 makes (l-DeTok, 2507.15856, is similar)."""
        mean, logvar = self.posterior(self.to_grid(images))
        posterior_noise, added, strength = self.draw(len(mean), mean.shape[-1]) if draws is None else draws
        z = mean + (0.5 * logvar).exp() * posterior_noise
        if self.config.noise:  # relative to z.std(): the encoder cannot escape the noise by scaling all latents
            z = z + self.config.noise * strength * z.std() * added
        reconstruction = self.to_images(z)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + 1e-6 * kl, reconstruction

    def draw(self, B, h, generator=None):
        """All random numbers of a step on B images: the posterior's noise and an additional noise, each [B, Z, h, h],
        and the strength of the additional one [B, 1, 1, 1]; the last two serve config.noise only."""
        shape, how = (B, self.config.z_channels, h, h), dict(generator=generator, device=self.quant_conv.weight.device)
        return torch.randn(shape, **how), torch.randn(shape, **how), torch.rand(B, 1, 1, 1, **how) ** 2  # mostly weak


def latent_scale(batches):
    """An iterable of moments [n, 2Z, h, h] -> 1 / std of posterior samples, computed from their means and variances."""
    n, total, squares = 0, 0.0, 0.0  # sums of float64
    for moments in batches:
        mean, logvar = (x.double() for x in KL.posterior(moments.cpu()))
        n, total, squares = n + mean.numel(), total + mean.sum(), squares + (mean**2 + logvar.exp()).sum()
    return float((squares / n - (total / n) ** 2) ** -0.5)


# --------------------------------------------------------------------------------- the linear path of small models
# No part of D2C; skip it at first. A small tokenizer is trained briefly, so it starts as a good codec: two linear maps
# from tiles (stride x stride pixels) to the grid and back, set to principal components. The convolutions, whose last
# layers start at zero, learn what the maps lack. With config.lapped a filter across the borders hides the tiles.

def add_linear_path(model, grid_out, grid_in):
    model.patch_in = nn.Conv2d(3, grid_out, model.stride, model.stride)
    model.patch_out = nn.ConvTranspose2d(grid_in, 3, model.stride, model.stride)
    model.register_buffer("border", border_filter(model.stride) if model.config.lapped else None, persistent=False)
    for parameter in (*model.quant_conv.parameters(), *model.decoder.conv_out.parameters()):
        nn.init.zeros_(parameter)


def border_filter(stride):
    """A lapped transform (Malvar & Staelin 1989; Tran and others 2003) as an orthogonal matrix [stride, stride].

    Without it an error of one latent ends in an edge at its tile's border, and a picture shows a grid. The filter acts
    on a row of pixels across a border, n = stride / 2 of each tile, in pairs mirrored at the border. The sums of the
    pairs stay. Their n differences are multiplied by an orthogonal matrix: V on the way to the latents, V.T on the way
    back. V.T turns wave k of DCT-II into wave k of DCT-IV. Wave 0 of DCT-II is a constant: equal differences, an edge.
    Wave 0 of DCT-IV is a quarter of a cosine, 0 at the border: no edge. Example: an error adds e to the left tile, so
    all sums and differences are e. V.T makes them that cosine, sqrt(2) e high, as it keeps their norm. The pixels, (sum
    ± difference) / 2, then fall smoothly: 1.2e in the left tile's middle, e/2 at the border, -0.2e in the right's."""
    n = stride // 2
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    dct2 = torch.cos(torch.pi / n * (i + 0.5) * k) * (2 / n) ** 0.5
    dct2[0] /= 2**0.5
    dct4 = torch.cos(torch.pi / n * (i + 0.5) * (k + 0.5)) * (2 / n) ** 0.5
    one, flip = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64).flip(0)
    butterfly = torch.cat([torch.cat([one, flip], 1), torch.cat([flip, -one], 1)])  # sums; differences, border first
    V = flip @ dct2.T @ dct4 @ flip  # `flip` puts the border last: DCT-IV's waves are 0 at i = n - 1/2
    return (butterfly @ torch.block_diag(one, V) @ butterfly / 2).float()


def lap(images, border, back=False):
    """Applies the border filter across every border between tiles, not at the image's edges; `back` undoes it."""
    if border is None:
        return images
    half, matrix = len(border) // 2, border if back else border.T  # pixels are row vectors: @ border.T filters them
    for _ in range(2):  # across vertical borders, then, transposed, across horizontal ones
        across = images[..., half:-half].unflatten(-1, (-1, 2 * half)) @ matrix            # [..., borders, stride]
        images = torch.cat([images[..., :half], across.flatten(-2), images[..., -half:]], dim=-1).mT
    return images


@torch.no_grad()
def fit_linear_path(model, images, generator=None):
    """Sets the linear path, and VQ's codebook, from images [N, 3, H, W] on the CPU; nearly all in float64.

    The model must be untrained: its convolutions then add nothing, and `to_grid` is the linear path alone."""
    (fit_vq if isinstance(model, VQ) else fit_kl)(model.double(), images.double(), generator)
    model.float()


def fit_vq(vq, images, generator):
    """Channels: d - 1 components, and a 1. VQ normalises; the ratio of a component to the 1 still tells its size."""
    tiles = cut_tiles(vq, images)
    mean, axes = tiles.mean(0), principal_axes(tiles, vq.config.codebook_dim - 1)
    axes /= ((tiles - mean) @ axes.T).norm(dim=1).mean()                          # mean length 1, like the last channel
    set_patch_in(vq, axes, -axes @ mean, constant=1.0)
    z = F.normalize(vq.to_grid(images).flatten(2).mT.flatten(0, 1), dim=1)         # [N*L, d]
    book = z[torch.randperm(len(z), generator=generator)[:vq.config.codebook_size]]
    for _ in range(10):                                                            # spherical k-means
        codes = (z @ book.T).argmax(1)
        # plus 1e-3 of the old vector, so that a vector that no tile chose stays where it was
        book = F.normalize(book * 1e-3 + torch.zeros_like(book).index_add(0, codes, z), dim=1)
    vq.codebook.weight[:len(book)] = book
    set_patch_out(vq, book[(z @ book.T).argmax(1)], tiles)


def fit_kl(kl, images, generator):
    tiles = cut_tiles(kl, images)
    mean, axes = tiles.mean(0), principal_axes(tiles, kl.config.z_channels)
    set_patch_in(kl, axes, -axes @ mean, constant=-4.0)            # log-variance -4: a standard deviation of 0.14
    z = kl.posterior(kl.to_grid(images))[0].to(tiles)
    set_patch_out(kl, z.flatten(2).mT.flatten(0, 1), tiles)


def cut_tiles(model, images):  # [N, 3, H, W] -> [N*h*h, 3*stride^2], filtered, as patch_in sees them
    return F.unfold(lap(images, model.border), model.stride, stride=model.stride).mT.flatten(0, 1)


def principal_axes(tiles, k):
    """The first k principal components of tiles [n, m] -> [k, m], each divided by the root of its standard deviation.

    Dividing by the standard deviation itself (whitening) would make noise-like details as large as the mean colour.
    Without any division, a noise on the latents that is small for the mean colour would hide the details."""
    variance, axes = torch.linalg.eigh(torch.cov(tiles.T))         # ascending
    return (axes / variance.clamp(1e-8) ** 0.25).flip(1)[:, :k].T


def set_patch_in(model, axes, bias, constant):
    """Channels :k become axes [k, 3*stride^2] @ tile + bias [k]; all other channels become `constant`."""
    k, layer = len(axes), model.patch_in
    layer.weight.zero_()
    layer.bias.fill_(constant)
    layer.weight[:k] = axes.view(k, 3, model.stride, model.stride)
    layer.bias[:k] = bias


def set_patch_out(model, z, tiles):
    """The map from z [N*h*h, grid_in] back to the tiles, by least squares."""
    fit = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1), tiles).solution
    model.patch_out.weight.copy_(fit[:-1].view(-1, 3, model.stride, model.stride))
    model.patch_out.bias.copy_(fit[-1].view(3, -1).mean(1))        # the layer has but one bias per colour
