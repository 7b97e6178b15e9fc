"""Tokenizers: an image as discrete codes (VQ) and as continuous latents (KL). Frozen in stages 1 and 2. D2C section 3.

    VQ.encode   images [B, 3, h*f, w*f] in [-1, 1] -> codes [B, L] int64, raster order        L = h*w tokens, stride f
    VQ.decode   codes [B, L]                       -> images [B, 3, h*f, w*f]
    KL.encode   images                             -> moments [B, 2C, h, w]: posterior mean and log-variance
    KL.sample   moments                            -> latents [B, L, C], scaled to about unit variance
    KL.decode   latents [B, L, C]                  -> images

Both are the convolutional autoencoder of latent diffusion (LDM, arXiv 2112.10752). VQ follows LlamaGen (2406.06525),
KL follows the kl-f16 that MAR uses (2406.11838); the defaults are their sizes. `data.py` calls encode, `sample.py`
decode, `train.py --stage 0` loss. Grids are square. The name of this file is that of a Hugging Face package, so
nothing that runs from this folder can import `transformers`.
"""
from dataclasses import dataclass
from math import isqrt

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
    blocks: int = 2                   # residual blocks a level (one more in the decoder)
    unshuffle: int = 1            # small models: pixels of a u x u square become channels, so convolutions start at 1/u
    linear_path: bool = False         # small models: a linear map of patches beside the convolutions, see `Autoencoder`


@dataclass(frozen=True)
class KLConfig:
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    z_channels: int = 16
    encoder_attention: bool = True    # attention at the lowest level, besides the one in the middle
    decoder_attention: bool = False   # MAR's kl16 has none here; CompVis' kl-f16 and VA-VAE do
    scale: float = 0.2325           # 1 / std of the latents. This number is MAR's kl16.ckpt's; stage 0 measures its own
    blocks: int = 2
    unshuffle: int = 1
    linear_path: bool = False


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
    """What VQ and KL share. `dim_in` channels leave the encoder, `dim_out` enter the decoder, on a grid of `stride`.

    With `linear_path` a linear map of each patch runs beside the convolutions, in and out. `fit_linear_path` sets it
    to the principal components of real patches while the convolutions start at zero: training then begins at the
    quality of a PCA codec, where a small convolutional network would arrive after hours.
    """

    def __init__(self, c, dim_in, dim_out, encoder_out, encoder_attention, decoder_attention):
        super().__init__()
        self.config, self.stride = c, c.unshuffle * 2 ** (len(c.ch_mult) - 1)
        self.encoder = Encoder(c, encoder_out, encoder_attention)
        self.quant_conv = nn.Conv2d(encoder_out, dim_in, 1)
        self.post_quant_conv = nn.Conv2d(dim_out, c.z_channels, 1)
        self.decoder = Decoder(c, decoder_attention)
        if c.linear_path:
            self.patch_in = nn.Conv2d(3, dim_in, self.stride, self.stride)
            self.patch_out = nn.ConvTranspose2d(dim_out, 3, self.stride, self.stride)
            for layer in (self.quant_conv, self.decoder.conv_out):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def to_grid(self, images):  # [B, 3, H, W] -> [B, dim_in, h, w]
        z = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.config.unshuffle)))
        return z + self.patch_in(images) if self.config.linear_path else z

    def to_images(self, z):  # [B, dim_out, h, w] -> [B, 3, H, W]
        images = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.unshuffle)
        return images + self.patch_out(z) if self.config.linear_path else images


# -------------------------------------------------------------------------------------------------------------- VQ

class VQ(Autoencoder):
    """Discrete tokenizer: the nearest of K codes on the unit sphere, by cosine similarity."""

    def __init__(self, c: VQConfig):
        super().__init__(c, dim_in=c.codebook_dim, dim_out=c.codebook_dim, encoder_out=c.z_channels,
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

        LlamaGen adds LPIPS and a GAN, whose weights or training this repository does not contain.
        """
        z, codes, e = self._quantize(images)
        with torch.no_grad():
            self.usage.scatter_add_(0, codes.flatten(), torch.ones_like(codes.flatten(), dtype=self.usage.dtype))
        recon = self.to_images(z + (e - z).detach())  # straight-through: the decoder sees e, the encoder its gradient
        return F.mse_loss(recon, images) + F.mse_loss(e, z.detach()) + 0.25 * F.mse_loss(z, e.detach()), recon

    @torch.no_grad()
    def restart_dead_codes(self, images, generator):
        """Moves codes that were not used since the last call onto encoded vectors of `images`; returns which moved."""
        dead = (self.usage == 0).nonzero().flatten()
        z = F.normalize(self.to_grid(images), dim=1).flatten(2).mT.flatten(0, 1)  # [B*L, d]
        dead = dead[:len(z)]
        self.codebook.weight[dead] = z[torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)]
        self.usage.zero_()
        return dead


# -------------------------------------------------------------------------------------------------------------- KL

class KL(Autoencoder):
    """Continuous tokenizer: a Gaussian posterior per position. `sample` and `decode` apply the scale, nothing else."""

    def __init__(self, c: KLConfig):
        super().__init__(c, dim_in=2 * c.z_channels, dim_out=c.z_channels, encoder_out=2 * c.z_channels,
                         encoder_attention=c.encoder_attention, decoder_attention=c.decoder_attention)

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
        """moments [B, 2C, h, w] -> latents [B, L, C] drawn from the posterior, times cfg.scale. noise [B, C, h, w]."""
        mean, logvar = self.posterior(moments)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        z = mean + (0.5 * logvar).exp() * noise
        return z.flatten(2).mT * self.config.scale

    @torch.no_grad()
    def decode(self, latents):
        """latents [B, L, C], scaled -> images [B, 3, H, W], about [-1, 1]."""
        B, L, C = latents.shape
        return self.to_images((latents / self.config.scale).mT.reshape(B, C, isqrt(L), isqrt(L)))

    def loss(self, images, noise=None):
        """-> scalar, reconstruction. L1 + L2 + 1e-6 KL to the unit Gaussian. LDM adds LPIPS and a GAN.

        The number is LDM's, but beside its L1, summed over pixels and colours, it weighs 3HW times less than here.
        """
        moments = self.to_grid(images)
        mean, logvar = self.posterior(moments)
        z = self.sample(moments, noise) / self.config.scale
        recon = self.to_images(z.mT.reshape(mean.shape))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return F.l1_loss(recon, images) + F.mse_loss(recon, images) + 1e-6 * kl, recon


# ------------------------------------------------------------------------------------------------------ linear path

@torch.no_grad()
def fit_linear_path(model: VQ | KL, images, generator=None):
    """Sets the linear path (and VQ's codebook) from images [N, 3, H, W]: principal components in, least squares out.

    For a new model on the CPU, whose convolutions still add nothing. Component k is divided by the square root of its
    standard deviation: whitening would give noise-like details the weight of the mean colour, no scaling at all would
    drown them. VQ spends one of its d dimensions on a constant, so that the projection to the unit sphere keeps the
    brightness of a patch.
    """
    f, vq = model.stride, isinstance(model, VQ)
    patches = F.unfold(images, f, stride=f).mT.flatten(0, 1)                       # [N*L, 3*f*f]
    mean = patches.mean(0)
    power, axes = torch.linalg.eigh(torch.cov(patches.T))                          # ascending
    k = model.config.codebook_dim - 1 if vq else model.config.z_channels
    axes = (axes / power.clamp(1e-8) ** 0.25).flip(1)[:, :k].T                     # [k, 3*f*f]
    if vq:
        axes /= ((patches - mean) @ axes.T).norm(dim=1).mean()                     # about as long as the constant
    weight, bias = model.patch_in.weight.zero_(), model.patch_in.bias.zero_()
    weight[:k] = axes.view(k, 3, f, f)
    bias[:k] = -axes @ mean
    bias[k:] = 1.0 if vq else -4.0                                                 # the constant | log-variance
    z = model.to_grid(images).flatten(2).mT.flatten(0, 1)[:, :model.patch_out.in_channels]
    if vq:
        z = F.normalize(z, dim=1)
        book = z[torch.randperm(len(z), generator=generator)[:model.config.codebook_size]]
        for _ in range(10):                                                        # spherical k-means
            codes = (z @ book.T).argmax(1)
            book = F.normalize(book * 1e-3 + torch.zeros_like(book).index_add(0, codes, z), dim=1)
        model.codebook.weight[:len(book)] = book
        z = book[(z @ book.T).argmax(1)]
    ones = torch.ones(len(z), 1)
    fit = torch.linalg.lstsq(torch.cat([z, ones], 1), patches).solution            # [dim_out + 1, 3*f*f]
    model.patch_out.weight.copy_(fit[:-1].view(-1, 3, f, f))
    model.patch_out.bias.copy_(fit[-1].view(3, -1).mean(1))                    # one bias a colour is what the layer has
