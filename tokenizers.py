"""Tokenizers: an image as discrete codes (VQ) and as continuous latents (KL). Frozen in stages 1 and 2. D2C section 3.

    VQ.encode   images [B, 3, h*f, w*f] in [-1, 1] -> codes [B, L] int64, raster order        L = h*w codes, stride f
    VQ.decode   codes [B, L]                       -> images [B, 3, h*f, w*f]
    KL.encode   images                             -> moments [B, 2C, h, w]: posterior mean and log-variance
    KL.sample   moments                            -> latents [B, L, C], scaled to about unit variance
    KL.decode   latents [B, L, C]                  -> images

With the official files f is 16: an image of 256 x 256 pixels is 256 codes and 256 latents. Grids are square.

Both are the convolutional autoencoder of latent diffusion (LDM, 2112.10752). VQ follows LlamaGen (2406.06525), KL
follows the kl-f16 that MAR uses (2406.11838); the defaults are their sizes. `data.py` calls encode, `sample.py`
calls decode, `train.py --stage 0` calls loss.

The way of the latent scale. The generator wants latents of unit variance. `latent_scale` measures 1 / std on images:
stage 0 at its end (the number goes into kl.pt), data.py when it makes a cache. KL.sample multiplies by config.scale,
KL.decode divides by it; nothing else does. MAR's kl16.ckpt has 0.2325. A file with another scale than its training
gives grey or garish pictures, so a generator's file repeats the scale of its training.

This file has the name of a Hugging Face package, so code that runs from this folder cannot import `transformers`.
"""
from dataclasses import dataclass, replace
from math import isqrt
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class VQConfig:
    ch: int = 128                     # channels at the highest resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)  # times ch, per level; each level but the last halves the resolution
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    blocks: int = 2                   # residual blocks per level (one more in the decoder)
    unshuffle: int = 1                # small models: squares of u x u pixels become channels, convolutions start at 1/u
    linear_path: bool = False         # small models: a linear map of tiles beside the convolutions, see Autoencoder
    lapped: bool = False              # of the linear path: tiles that overlap


@dataclass(frozen=True)
class KLConfig:
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    z_channels: int = 16
    encoder_attention: bool = True    # attention at the lowest level, besides the one in the middle
    decoder_attention: bool = False   # MAR's kl16 has none here; CompVis' kl-f16 and VA-VAE do
    scale: float | None = 0.2325      # 1 / std of the latents of MAR's kl16.ckpt; None: not measured yet
    blocks: int = 2
    unshuffle: int = 1
    linear_path: bool = False
    lapped: bool = False
    patch: int = 1                    # patch x patch positions make one latent of patch^2 z_channels (MAR's patch_size)
    noise: float = 0.0                # training: the most noise added to latents, in their standard deviations

    @property
    def token_dim(self):  # C
        return self.z_channels * self.patch**2


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
    """Residual blocks at one resolution, each followed by attention if asked, then a change of resolution."""

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


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as in LDM: a symmetric pad shifts the image


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(c):
    return nn.Sequential(ResBlock(c, c), AttnBlock(c), ResBlock(c, c))


class Encoder(nn.Module):
    """[B, 3u^2, H/u, W/u] -> [B, out, h, w]. `levels` run from the highest resolution to the lowest."""

    def __init__(self, c, out, attention):
        super().__init__()
        widths, last = [c.ch * m for m in c.ch_mult], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(3 * c.unshuffle**2, c.ch, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(([c.ch] + widths)[i], w, c.blocks, attention and i == last, Downsample(w) if i < last else None)
            for i, w in enumerate(widths))
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, z, h, w] -> [B, 3u^2, H/u, W/u]. `levels` run from the lowest resolution to the highest."""

    def __init__(self, c, attention):
        super().__init__()
        widths, last = [c.ch * m for m in reversed(c.ch_mult)], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(c.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0])
        self.levels = nn.ModuleList(
            Level(([widths[0]] + widths)[i], w, c.blocks + 1, attention and i == 0, Upsample(w) if i < last else None)
            for i, w in enumerate(widths))
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 3 * c.unshuffle**2, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """What VQ and KL share: images -> `encoded` channels on a grid of `stride` pixels; `decoded` channels -> images.

    With `linear_path` a linear map of each tile of stride x stride pixels runs beside the convolutions, in and out.
    `fit_linear_path` sets the map to the principal components of real tiles while the convolutions start at zero:
    training then begins at the quality of a PCA codec, where a small convolutional network would arrive after hours.
    """

    def __init__(self, c, encoded, decoded, encoder_out, encoder_attention, decoder_attention):
        super().__init__()
        self.config, self.stride = c, c.unshuffle * 2 ** (len(c.ch_mult) - 1)
        self.encoder = Encoder(c, encoder_out, encoder_attention)
        self.quant_conv = nn.Conv2d(encoder_out, encoded, 1)
        self.post_quant_conv = nn.Conv2d(decoded, c.z_channels, 1)
        self.decoder = Decoder(c, decoder_attention)
        if c.linear_path:
            self.patch_in = nn.Conv2d(3, encoded, self.stride, self.stride)
            self.patch_out = nn.ConvTranspose2d(decoded, 3, self.stride, self.stride)
            for layer in (self.quant_conv, self.decoder.conv_out):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
            if c.lapped:
                self.register_buffer("border", border_filter(self.stride), persistent=False)

    def to_grid(self, images):  # [B, 3, H, W] -> [B, encoded, h, w]
        z = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.unshuffle)))
        return z + self.patch_in(self.lap(images)) if self.config.linear_path else z

    def to_images(self, z):  # [B, decoded, h, w] -> [B, 3, H, W]
        images = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.unshuffle)
        return images + self.lap(self.patch_out(z), back=True) if self.config.linear_path else images

    def lap(self, images, back=False):
        """Applies the border filter across every border between tiles, in rows and in columns; `back` undoes it."""
        if not self.config.lapped:
            return images
        half, matrix = self.stride // 2, self.border if back else self.border.T
        for _ in range(2):  # along rows, then, transposed, along columns
            across = images[..., half:-half].unflatten(-1, (-1, 2 * half)) @ matrix        # [..., borders, stride]
            images = torch.cat([images[..., :half], across.flatten(-2), images[..., -half:]], dim=-1).mT
        return images

    def tiles(self, images):  # [N, 3, H, W] -> [N*L, 3*stride^2], what patch_in sees of each tile
        return F.unfold(self.lap(images), self.stride, stride=self.stride).mT.flatten(0, 1)

    def set_patch_in(self, axes, bias, constant):
        """The first k channels become the map axes [k, 3*stride^2] with bias [k]; the others are a constant."""
        k = len(axes)
        self.patch_in.weight.zero_()[:k] = axes.view(k, 3, self.stride, self.stride)
        self.patch_in.bias.fill_(constant)[:k] = bias

    def set_patch_out(self, z, tiles):
        """The map from z [N*L, decoded] back to the tiles, by least squares."""
        fit = torch.linalg.lstsq(torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1), tiles).solution
        self.patch_out.weight.copy_(fit[:-1].view(-1, 3, self.stride, self.stride))
        self.patch_out.bias.copy_(fit[-1].view(3, -1).mean(1))     # the layer has one bias per colour


def principal_axes(tiles, k):
    """The first k principal components of tiles [n, d] -> [k, d], each divided by the square root of its deviation.

    Dividing by the deviation itself (whitening) would give noise-like details the weight of the mean colour; without
    any division the mean colour would drown the details.
    """
    variance, axes = torch.linalg.eigh(torch.cov(tiles.T))         # ascending
    return (axes / variance.clamp(1e-8) ** 0.25).flip(1)[:, :k].T


def border_filter(stride):
    """An orthogonal matrix [stride, stride] for the pixels around a border between two tiles, half on each side.

    A tile after this filter holds a smooth window of twice its width: tile by tile, any orthogonal transform becomes a
    lapped orthogonal transform (Malvar & Staelin 1989, in the time-domain form of Tran, Liang & Tu 2003). An error of
    one tile's latent then fades out over its neighbours, where it would end in an edge, and pictures show no grid.
    """
    n = stride // 2
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    dct2 = torch.cos(torch.pi / n * (i + 0.5) * k) * (2 / n) ** 0.5
    dct2[0] /= 2**0.5
    dct4 = torch.cos(torch.pi / n * (i + 0.5) * (k + 0.5)) * (2 / n) ** 0.5
    one, flip = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64).flip(0)
    butterfly = torch.cat([torch.cat([one, flip], 1), torch.cat([flip, -one], 1)])         # sums, and differences
    rotation = torch.block_diag(one, flip @ dct2.T @ dct4 @ flip)                          # of the differences only
    return (butterfly @ rotation @ butterfly / 2).float()


# -------------------------------------------------------------------------------------------------------------- VQ

class VQ(Autoencoder):
    """Discrete tokenizer: the nearest of K codes on the unit sphere, by cosine similarity."""

    def __init__(self, c: VQConfig):
        super().__init__(c, encoded=c.codebook_dim, decoded=c.codebook_dim, encoder_out=c.z_channels,
                         encoder_attention=True, decoder_attention=True)
        self.codebook = nn.Embedding(c.codebook_size, c.codebook_dim)
        nn.init.uniform_(self.codebook.weight, -1, 1)
        self.codebook.weight.data = F.normalize(self.codebook.weight.data, dim=1)
        self.register_buffer("usage", torch.zeros(c.codebook_size), persistent=False)  # since the last restart

    def _quantize(self, images):
        """-> unit vectors [B, d, h, w], codes [B, L], code vectors [B, d, h, w]. fp32: cosines near 1 tie in bf16."""
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

        LlamaGen adds LPIPS, whose weights cannot be shipped, and a GAN; this repository has neither.
        """
        z, codes, e = self._quantize(images)
        with torch.no_grad():
            self.usage.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=self.usage.dtype))
        recon = self.to_images(z + (e - z).detach())  # straight-through: the decoder sees e, the encoder its gradient
        return F.mse_loss(recon, images) + F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach()), recon

    @torch.no_grad()
    def restart_dead_codes(self, images, generator):
        """Moves codes that no image used since the last call onto encoded vectors of `images`; returns those codes."""
        dead = (self.usage == 0).nonzero().flatten()
        z = F.normalize(self.to_grid(images), dim=1).flatten(2).mT.flatten(0, 1)  # [B*L, d]
        dead = dead[:len(z)]
        self.codebook.weight[dead] = z[torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)]
        self.usage.zero_()
        return dead


    @torch.no_grad()
    def fit_linear_path(self, images, generator=None):
        """Sets linear path and codebook from images [N, 3, H, W]. One of the d dimensions is a constant: the projection
        to the unit sphere would lose the brightness of a tile without it. For a new model on the CPU.
        """
        tiles = self.tiles(images)
        mean, axes = tiles.mean(0), principal_axes(tiles, self.config.codebook_dim - 1)
        axes /= ((tiles - mean) @ axes.T).norm(dim=1).mean()                       # about as long as the constant
        self.set_patch_in(axes, -axes @ mean, constant=1.0)
        z = F.normalize(self.to_grid(images).flatten(2).mT.flatten(0, 1), dim=1)   # [N*L, d]
        book = z[torch.randperm(len(z), generator=generator)[:self.config.codebook_size]]
        for _ in range(10):                                                        # spherical k-means
            codes = (z @ book.T).argmax(1)
            book = F.normalize(book * 1e-3 + torch.zeros_like(book).index_add(0, codes, z), dim=1)
        self.codebook.weight[:len(book)] = book
        self.set_patch_out(book[(z @ book.T).argmax(1)], tiles)


# -------------------------------------------------------------------------------------------------------------- KL

class KLDraws(NamedTuple):
    """The random numbers of one training step for B images."""
    posterior: torch.Tensor  # [B, C, h, h]
    strength: torch.Tensor   # [B, 1, 1, 1] in [0, 1), of the noise
    noise: torch.Tensor      # [B, C, h, h]

    def rows(self, rows):
        """The draws of some of the images, a slice."""
        return KLDraws(*(x[rows] for x in self))


class KL(Autoencoder):
    """Continuous tokenizer: a Gaussian posterior per position. C is z_channels in moments, token_dim in latents."""

    def __init__(self, c: KLConfig):
        super().__init__(c, encoded=2 * c.z_channels, decoded=c.z_channels, encoder_out=2 * c.z_channels,
                         encoder_attention=c.encoder_attention, decoder_attention=c.decoder_attention)

    def set_scale(self, scale):
        """The latents' measured 1 / std (`latent_scale`). It is a part of the config, so that files carry it."""
        self.config = replace(self.config, scale=scale)

    @torch.no_grad()
    def encode(self, images):
        """images [B, 3, H, W] in [-1, 1] -> moments [B, 2C, h, w]: mean, then log-variance, unscaled."""
        return self.to_grid(images)

    @staticmethod
    def posterior(moments):
        """moments [B, 2C, h, w] -> mean and log-variance, each [B, C, h, w]."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, moments, noise=None, generator=None):
        """moments [B, 2C, h, w] -> latents [B, L, C]: drawn from the posterior, scaled, patches merged.

        noise: as many numbers as latents, of any shape; zeros give the posterior's mean.
        """
        mean, logvar = self.posterior(moments)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + (0.5 * logvar).exp() * noise.reshape(mean.shape)
        return F.pixel_unshuffle(z * self.config.scale, self.config.patch).flatten(2).mT

    @torch.no_grad()
    def decode(self, latents):
        """latents [B, L, C], scaled -> images [B, 3, H, W], about [-1, 1]."""
        B, L, C = latents.shape
        z = (latents / self.config.scale).mT.reshape(B, C, isqrt(L), isqrt(L))
        return self.to_images(F.pixel_shuffle(z, self.config.patch))

    def draw(self, B, h, generator=None) -> KLDraws:
        """Draws what a training step on B images with h positions per side needs, on the model's device."""
        device, shape = self.quant_conv.weight.device, (B, self.config.z_channels, h, h)
        normal = lambda: torch.randn(shape, generator=generator, device=device)
        return KLDraws(normal(), torch.rand(B, 1, 1, 1, generator=generator, device=device), normal())

    def loss(self, images, draws: KLDraws | None = None):
        """-> scalar, reconstruction. L1 + L2 + 1e-6 KL to the unit Gaussian. LDM adds LPIPS and a GAN.

        The number 1e-6 is LDM's. It stands beside means over pixels and colours here, beside sums in LDM, so it weighs
        3HW times more here. With config.noise the decoder reads noised latents (after l-DeTok, 2507.15856): it learns
        to make a picture of a latent that is not quite right, as a generator's are.
        """
        mean, logvar = self.posterior(self.to_grid(images))
        draws = self.draw(len(mean), mean.shape[-1]) if draws is None else draws
        z = mean + (0.5 * logvar).exp() * draws.posterior
        if self.config.noise:
            z = z + self.config.noise * draws.strength * z.std() * draws.noise
        reconstruction = self.to_images(z)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + 1e-6 * kl, reconstruction

    @torch.no_grad()
    def fit_linear_path(self, images, generator=None):
        """Sets the linear path from images [N, 3, H, W]. For a new model on the CPU."""
        tiles = self.tiles(images)
        mean, axes = tiles.mean(0), principal_axes(tiles, self.config.z_channels)
        self.set_patch_in(axes, -axes @ mean, constant=-4.0)       # log-variance -4: a standard deviation of 0.14
        z = self.posterior(self.to_grid(images))[0].to(tiles)
        self.set_patch_out(z.flatten(2).mT.flatten(0, 1), tiles)


def latent_scale(batches):
    """1 / std of latents drawn from moments: an iterable of [n, 2C, h, w] -> float. Sums in float64."""
    n = total = squares = 0.0
    for moments in batches:
        mean, logvar = (x.double() for x in KL.posterior(moments.cpu()))
        n, total, squares = n + mean.numel(), total + mean.sum(), squares + (mean**2 + logvar.exp()).sum()
    return float((squares / n - (total / n) ** 2) ** -0.5)
