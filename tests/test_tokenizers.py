"""Both tokenizers: sizes and shapes, the order of positions, the one place of the scale, and that they learn."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from data import to_float, toy_picture
from test_diffloss import on_meta
from tokenizers import KL, VQ, KLConfig, VQConfig, fit_linear_path, lap, latent_scale

SMALL = dict(ch=32, ch_mult=(1, 1), blocks=1)
LINEAR = dict(ch=32, ch_mult=(1, 1, 1), blocks=1, unshuffle=2, linear_path=True)  # stride 8
VQ_SMALL = VQConfig(**SMALL, z_channels=32, codebook_size=64)
KL_SMALL = KLConfig(**SMALL, z_channels=4)
VQ_LINEAR = VQConfig(**LINEAR, z_channels=16, codebook_size=64)
KL_LINEAR = KLConfig(**LINEAR, z_channels=8, scale=1.0)


def make(config):
    torch.manual_seed(0)
    return (VQ if isinstance(config, VQConfig) else KL)(config)


def toys(n, size=32):
    random = np.random.default_rng(0)
    return to_float(np.stack([np.asarray(toy_picture(i % 10, random, size)) for i in range(n)]).transpose(0, 3, 1, 2))


def mean_latents(kl, images):
    moments = kl.encode(images)
    return kl.sample(moments, noise=torch.zeros_like(moments.chunk(2, 1)[0]))


def psnr(a, b):
    return float(10 * torch.log10(4 / F.mse_loss(a, b)))


def test_parameter_counts():
    with torch.device("meta"):
        assert sum(p.numel() for p in VQ(VQConfig()).parameters()) == 71_883_403
        assert sum(p.numel() for p in KL(KLConfig()).parameters()) == 66_456_019


@pytest.mark.parametrize("changes", [
    {}, dict(ch_mult=(1, 2, 2)), dict(blocks=2), dict(unshuffle=2), dict(linear_path=True),
    dict(ch_mult=(2,), unshuffle=4, linear_path=True)])
def test_shapes(changes):
    vq, kl, images = make(replace(VQ_SMALL, **changes)), make(replace(KL_SMALL, **changes)), toys(2)
    assert vq.stride == kl.stride
    h = 32 // vq.stride
    codes = vq.encode(images)
    assert codes.shape == (2, h * h) and codes.dtype == torch.int64
    moments = kl.encode(images)
    assert moments.shape == (2, 8, h, h)
    latents = kl.sample(moments, generator=torch.Generator().manual_seed(0))
    assert latents.shape == (2, h * h, 4)
    for out in (vq.decode(codes), kl.decode(latents), vq.loss(images)[1], kl.loss(images)[1]):
        assert out.shape == images.shape and out.isfinite().all()
    assert not (vq.decode(codes).requires_grad or kl.decode(latents).requires_grad or moments.requires_grad)


@pytest.mark.parametrize("attention", [(True, False), (True, True), (False, False)])
def test_kl_attention_is_optional(attention):
    encoder, decoder = attention
    kl = make(replace(KL_SMALL, encoder_attention=encoder, decoder_attention=decoder))
    assert [bool(level.attn) for level in kl.encoder.levels] == [False, encoder]    # the lowest resolution only
    assert [bool(level.attn) for level in kl.decoder.levels] == [decoder, False]
    assert mean_latents(kl, torch.zeros(1, 3, 8, 8)).shape == (1, 16, 4)


def test_meta_device():
    for config in (VQ_SMALL, VQ_LINEAR, KL_SMALL, KL_LINEAR):
        with torch.device("meta"):
            model, images = make(config), torch.empty(2, 3, 32, 32)
        with on_meta():
            model.loss(images)[0].backward()
            code = model.encode(images)
            assert model.decode(code if isinstance(model, VQ) else model.sample(code)).shape == images.shape


# --------------------------------------------------------------------------------------------- positions and scale

def test_raster_order():
    """On the linear path, where patches are tokens: a changed patch changes one token, a changed token one patch."""
    vq, kl, images = make(VQ_LINEAR), make(KL_LINEAR), toys(40)
    fit_linear_path(vq, images, torch.Generator().manual_seed(0))
    fit_linear_path(kl, images)
    row, column = 1, 2
    patch = (slice(None), slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
    one, place = images[:1].clone(), 4 * row + column
    one[patch] = -one[patch].flip(2)
    for before, after in ((vq.encode(images[:1])[..., None], vq.encode(one)[..., None]),
                          (mean_latents(kl, images[:1]), mean_latents(kl, one))):
        assert (before != after).any(-1).nonzero().tolist() == [[0, place]]
    codes, latents = vq.encode(images[:1]), mean_latents(kl, images[:1])
    codes[0, place], latents[0, place] = (codes[0, place] + 1) % 64, latents[0, place] + 1
    for before, after in ((vq.decode(vq.encode(images[:1])), vq.decode(codes)),
                          (kl.decode(mean_latents(kl, images[:1])), kl.decode(latents))):
        change = (before - after).abs() > 1e-6
        assert change[patch].any() and change.sum() == change[patch].sum()


def test_scale_is_applied_once():
    images, noise = toys(2), torch.randn(2, 4, 16, 16)
    one, official = make(replace(KL_SMALL, scale=1.0)), make(KL_SMALL)
    draws = one.draw(2, 16)
    assert KLConfig().scale == 0.2325
    moments = one.encode(images)
    assert torch.equal(official.encode(images), moments)  # moments are unscaled
    latents = one.sample(moments, noise)
    torch.testing.assert_close(official.sample(moments, noise), 0.2325 * latents)
    picture = official.decode(official.sample(moments, noise))
    torch.testing.assert_close(picture, one.decode(latents), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(official.loss(images, draws)[0], one.loss(images, draws)[0])


def test_latent_scale():
    """1 / std of latents, from their moments: as measured on many draws; the KL writes it to its config."""
    kl, moments = make(replace(KL_SMALL, scale=None)), torch.randn(50, 8, 4, 4) + 1
    scale = latent_scale(moments.split(7))
    kl.set_scale(scale)
    assert kl.config == replace(KL_SMALL, scale=scale)
    latents = torch.cat([kl.sample(moments) for _ in range(100)])
    assert float(latents.std()) == pytest.approx(1, rel=0.01)


def test_merged_latents():
    """merge x merge positions make one latent; raster order inside and outside; decoding undoes it."""
    one, four = (make(replace(KL_LINEAR, scale=1.0, merge=p)) for p in (1, 2))
    images = toys(2)
    four.load_state_dict(one.state_dict())
    assert four.config.token_dim == 4 * one.config.token_dim and torch.equal(one.encode(images), four.encode(images))
    a, b = mean_latents(one, images), mean_latents(four, images)                      # [2, 16, C], [2, 4, 4C]
    a = a.view(2, 2, 2, 2, 2, -1).permute(0, 1, 3, 5, 2, 4).reshape(b.shape)          # rows and columns of the squares
    assert torch.equal(a, b)
    torch.testing.assert_close(four.decode(b), one.decode(mean_latents(one, images)))


def test_lapped_path_has_no_edges():
    """The border filter is orthogonal and undone by itself; an error of one latent ends in no edge."""
    kl, tiled, images = make(replace(KL_LINEAR, lapped=True)), make(KL_LINEAR), toys(40)
    for model in (kl, tiled):
        fit_linear_path(model, images)
    assert lap(images, kl.border).norm() == pytest.approx(float(images.norm()), rel=1e-5)
    torch.testing.assert_close(lap(lap(images, kl.border), kl.border, back=True), images, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lap(images, kl.border), images, atol=0.1)
    step = {}
    for name, model in (("lapped", kl), ("tiled", tiled)):
        z = mean_latents(model, images)
        change = model.decode(z + 0.4 * torch.randn_like(z)) - model.decode(z)        # 32 pixels, 4 x 4 tiles of 8
        d = change.diff(dim=-1).abs().mean((0, 1, 2))
        step[name] = float(d[7::8].mean() / d.mean())
    assert step["lapped"] < 1.6 and step["tiled"] > 2.5, step


def test_noised_latents_in_training():
    """config.noise adds noise in standard deviations of the latents, `strength` of it per image."""
    kl, images = make(replace(KL_SMALL, noise=0.5)), toys(2)
    draws = posterior, added, strength = kl.draw(2, 16)
    none = posterior, added, torch.zeros(2, 1, 1, 1)
    assert torch.equal(kl.loss(images, none)[0], make(KL_SMALL).loss(images, none)[0])
    z, seen = kl.posterior(kl.to_grid(images))[0], []
    kl.to_images = lambda x: seen.append(x) or torch.zeros_like(images)
    kl.loss(images, draws), kl.loss(images, none)
    want = 0.5 * strength * seen[1].std() * added
    torch.testing.assert_close(seen[0] - seen[1], want, rtol=1e-4, atol=1e-5)
    assert z.shape == seen[0].shape and 0 <= float(strength.min()) and float(strength.max()) < 1
    assert all(len(x) == 2 for x in draws) and not torch.equal(posterior, added)


def test_posterior():
    kl, mean = make(replace(KL_SMALL, scale=1.0)), torch.randn(1, 4, 2, 2)
    moments = lambda logvar: torch.cat([mean, torch.full_like(mean, logvar)], dim=1)
    sample = lambda logvar: kl.sample(moments(logvar), torch.ones_like(mean)).mT.reshape(mean.shape)
    torch.testing.assert_close(sample(math.log(4.0)), mean + 2)     # the second half is the log-variance
    torch.testing.assert_close(sample(1000.0), mean + math.exp(10))  # clamped to [-30, 20]
    assert torch.equal(sample(-1000.0), sample(-30.0))
    seeded = lambda: kl.sample(moments(0.0), generator=torch.Generator().manual_seed(0))
    assert torch.equal(seeded(), seeded()) and not torch.equal(seeded(), kl.sample(moments(0.0)))


# ------------------------------------------------------------------------------------------------------------ loss

def test_codes_are_nearest_and_decoded_normalised():
    vq, images = make(VQ_SMALL), toys(2)
    z, codes, e = vq._quantize(images)
    book = F.normalize(vq.codebook.weight, dim=1)
    rows = z.flatten(2).mT                                                            # [B, L, d]
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 256))
    torch.testing.assert_close(torch.cdist(rows, book.expand(2, -1, -1)).amin(-1), (rows - book[codes]).norm(dim=-1),
                               rtol=1e-3, atol=1e-3)
    assert torch.equal(e.flatten(2).mT, book[codes])
    picture = vq.decode(codes)
    with torch.no_grad():
        vq.codebook.weight *= torch.rand(64, 1) + 1                                   # lengths do not matter
    torch.testing.assert_close(vq.decode(codes), picture, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vq.loss(images)[1], picture, rtol=1e-4, atol=1e-5)     # the decoder sees the code, not z


def test_vq_loss():
    vq, images = make(VQ_SMALL), toys(2)
    loss, recon = vq.loss(images)
    z, codes, e = vq._quantize(images)
    torch.testing.assert_close(loss, F.mse_loss(recon, images) + 1.25 * F.mse_loss(z, e))
    assert vq.usage.sum() == 512 and torch.equal(vq.usage.nonzero().flatten(), codes.unique())
    assert "usage" not in vq.state_dict()
    weights = (vq.quant_conv.weight, vq.codebook.weight)
    slopes = lambda loss: torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    straight, book = slopes(F.mse_loss(recon, images))
    assert straight.any() and book is None  # the reconstruction teaches the encoder, past the codebook
    book = slopes(loss)[1]
    assert torch.equal(book.any(1).nonzero().flatten(), codes.unique())


def test_kl_loss():
    kl, images = make(KL_SMALL), toys(2)
    draws = kl.draw(2, 16)
    noise, (loss, recon) = draws[0], kl.loss(images, draws)
    mean, logvar = kl.encode(images).chunk(2, 1)
    divergence = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3)).mean()
    pixels = (recon - images).abs().mean() + (recon - images).pow(2).mean()
    torch.testing.assert_close(recon, kl.decode(kl.sample(kl.encode(images), noise)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((loss - pixels) * 1e6, divergence, rtol=0.05, atol=1.0)  # of 1e-6, few digits are left


@pytest.mark.parametrize("config", [VQ_SMALL, KL_SMALL])
def test_overfits_two_images(config):
    model, images = make(config), toys(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(images)[0]
        loss.backward()
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0] and silent == []


# ----------------------------------------------------------------------------------------------------- linear path

@pytest.mark.parametrize("config, least", [(VQ_LINEAR, 15), (KL_LINEAR, 20)])
def test_linear_path_is_a_codec_at_once(config, least):
    model, images = make(config), toys(60)
    code = model.encode if isinstance(model, VQ) else lambda x: mean_latents(model, x)
    before = psnr(model.decode(code(images)), images)
    fit_linear_path(model, images, torch.Generator().manual_seed(0))
    after = psnr(model.decode(code(images)), images)
    flat = psnr(images.mean((2, 3), keepdim=True).expand_as(images), images)
    assert after > max(before, flat, least) + 1
    if isinstance(model, VQ):
        assert len(code(images).unique()) > 32
    else:
        assert code(images).mean((0, 1)).abs().max() < 1e-3  # principal components are centred


def test_restart_moves_dead_codes_only():
    vq, images = make(VQ_SMALL), toys(4)
    vq.loss(images)
    used, before = vq.usage > 0, vq.codebook.weight.detach().clone()
    assert 0 < used.sum() < 64
    dead = vq.restart_dead_codes(images, torch.Generator().manual_seed(0))
    moved = (vq.codebook.weight != before).any(1)
    assert torch.equal(moved, ~used) and torch.equal(dead, moved.nonzero().flatten()) and not vq.usage.any()
    z = vq._quantize(images)[0].flatten(2).mT.flatten(0, 1)
    nearest = (F.normalize(vq.codebook.weight[moved], dim=1) @ z.T).amax(1)
    torch.testing.assert_close(nearest, torch.ones_like(nearest))  # onto vectors that the encoder makes
    vq.usage.zero_()
    dead = vq.restart_dead_codes(images[:1, :, :8, :8], torch.Generator().manual_seed(0))
    assert len(dead) == 16  # no more than the picture has places
