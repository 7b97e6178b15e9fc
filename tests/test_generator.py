"""The masked generator: its sizes, what it may and may not see, its loss, and the iterative decoder."""
import math
from dataclasses import replace

import pytest
import torch

from diffloss import T
from fusion import FUSIONS
from generator import Generator, GeneratorConfig, masked_counts, mask_ratio
from presets import PRESETS
from prior import Prior
from test_diffloss import on_meta, wake

CONFIG = GeneratorConfig("none", dim=32, depth=2, heads=2, prefix=4, token_dim=3, grid=4, classes=5, head_depth=2,
                         head_width=32, batch_mul=2, dropout=0.0, vocab=20, code_dim=24, queries=2, qformer_width=16,
                         qformer_layers=1, qformer_heads=2)
B, L, C, NULL = 3, 16, 3, CONFIG.classes
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
with_codes = pytest.mark.parametrize("fusion", [name for name, fusion in FUSIONS.items() if fusion.reads_codes])


def make(fusion="none", **changes):
    torch.manual_seed(0)
    return wake(Generator(replace(CONFIG, fusion=fusion, **changes)))


@pytest.fixture
def batch():
    """latents, classes, codes, and a mask of ten of sixteen positions, other ones in each image."""
    torch.manual_seed(1)
    mask = (torch.rand(B, L).argsort(1) < 10).float()
    return torch.randn(B, L, C), torch.tensor([0, 3, NULL]), torch.randint(20, (B, L)), mask


def relative(a, b):
    return float((a - b).norm() / b.norm())


def generators(n):
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    with torch.device("meta"):
        assert count(Generator(GeneratorConfig("none"))) == 207_924_768
        large = GeneratorConfig("none", dim=1024, depth=16, heads=16, head_depth=8, head_width=1280)
        assert count(Generator(large)) == 478_326_304
        for name, millions in (("d2c-b", 362), ("d2c-b-cross", 389), ("d2c-l", 633),  # Table 1 of the paper
                               ("discon-b", 333), ("discon-l", 603), ("mixar-b", 332)):  # our own reading
            p = PRESETS[name]
            assert p.generator.token_dim == p.kl.z_channels
            assert round((count(Prior(p.prior)) + count(Generator(p.generator))) / 1e6) == millions, name


@every_fusion
def test_meta_device(fusion):
    with torch.device("meta"):
        model, latents, mask = Generator(replace(CONFIG, fusion=fusion)), torch.empty(B, L, C), torch.empty(B, L)
        classes, codes = torch.zeros(B, dtype=torch.int64), torch.zeros(B, L, dtype=torch.int64)
    with on_meta():
        fused = model.fuse(classes, codes)
        assert fused.prefix.shape == (B, model.fusion.prefix_rows, CONFIG.dim)
        encoded = torch.empty(B, model.fusion.prefix_rows + 6, CONFIG.dim)
        for block in [*model.encoder_blocks, *model.decoder_blocks]:
            assert block(encoded.to("meta"), fused.context).shape == encoded.shape
        draws = model.draw(B, uniform=0.5)
        assert draws.mask.shape == mask.shape and draws.noise.shape == (CONFIG.batch_mul, B, L, C)


# ------------------------------------------------------------------------------------------------- what it may see

@every_fusion
def test_masked_latents_do_not_leak(fusion, batch):
    model, (latents, classes, codes, mask) = make(fusion), batch
    z = model.hidden(latents, classes, codes, mask)
    masked, visible = latents.clone(), latents.clone()
    masked[mask == 1] += 1
    assert torch.equal(model.hidden(masked, classes, codes, mask), z)
    visible[torch.arange(B), mask.argmin(1)] += 1
    assert ((model.hidden(visible, classes, codes, mask) - z).abs().amax(-1) > 1e-6).all()


def encode(model, latents, classes, codes, mask):
    """The encoder's rows of the visible latents, in raster order [B, V, D]."""
    P = model.fusion.prefix_rows
    visible = torch.cat([torch.ones(len(mask), P), 1 - mask], dim=1).bool()
    return model.encode(latents, model.fuse(classes, codes), visible)[:, P:]


def test_a_mask_hides_equally_many(batch):
    model, (latents, classes, _, mask) = make(), batch
    mask[1, mask[1].argmin()] = 1
    for use in (model.hidden, model.loss):
        with pytest.raises(ValueError, match="equally many"):
            use(latents, classes, None, mask)


@every_fusion
def test_condition(fusion, batch):
    model, (latents, classes, codes, mask) = make(fusion), batch
    z = model.hidden(latents, classes, codes, mask)
    other = (z - model.hidden(latents, torch.tensor([1, 3, NULL]), codes, mask)).abs().amax((1, 2))
    assert other[0] > 1e-3 and not other[1:].any()
    null = model.hidden(latents, torch.full((B,), NULL), codes, mask)
    assert ((null - z)[:2].abs().amax((1, 2)) > 1e-3).all() and torch.equal(null[2], z[2])
    moved = (z - model.hidden(latents, classes, (codes + 1) % 20, mask)).abs().amax(-1)     # [B, L]
    assert (moved[:2] > 1e-5).all() if model.fusion.reads_codes else not moved.any()
    assert not moved[2].any()  # a null class implies fake codes


def test_codes_enter_at_their_place(batch):
    """prefix: in encoder and decoder. mask_tokens: in the decoder alone, and only those of masked positions."""
    latents, classes, codes, mask = batch
    seen, masked = codes.clone(), codes.clone()
    seen[mask == 0], masked[mask == 1] = (codes[mask == 0] + 1) % 20, (codes[mask == 1] + 1) % 20
    for fusion, encoder, decoder in (("prefix", [True, True], [True, True]),
                                     ("mask_tokens", [False, False], [False, True])):
        model = make(fusion)
        for use, want in ((encode, encoder), (Generator.hidden, decoder)):
            x = use(model, latents, classes, codes, mask)
            assert [not torch.equal(use(model, latents, classes, c, mask), x) for c in (seen, masked)] == want


def test_where_latents_go(batch):
    """z is in raster order, and encode's rows are the visible ones in raster order: by moving an image's rows about."""
    model, (latents, classes, _, mask) = make(), batch
    encoded, z = encode(model, latents, classes, None, mask), model.hidden(latents, classes, None, mask)
    for b in range(B):
        seen = (mask[b] == 0).nonzero().flatten()
        changed = latents.clone()
        changed[b, seen[2]] += 5
        change = (encode(model, changed, classes, None, mask) - encoded)[b].norm(dim=1)
        assert change.argmax() == 2
    move = torch.randperm(L)  # the same picture, told in another order, with its positions
    for table in (model.encoder_positions, model.decoder_positions, model.output_positions):
        table.data[:, -L:] = table.data[:, -L:][:, move]
    moved = model.hidden(latents[:, move], classes, None, mask[:, move])
    torch.testing.assert_close(moved, z[:, move], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ loss

@every_fusion
def test_loss_is_the_mean_over_masked_tokens(fusion, batch):
    model, (latents, classes, codes, mask) = make(fusion), batch
    t, noise = torch.randint(T, (2, B, L)), torch.randn(2, B, L, C)
    z = model.hidden(latents, classes, codes, mask)
    rows = [model.head.loss(latents[mask == 1], z[mask == 1], t[m][mask == 1], noise[m][mask == 1]) for m in range(2)]
    loss = model.loss(latents, classes, codes, mask, t, noise)
    torch.testing.assert_close(loss, torch.cat(rows).mean())
    drop = torch.tensor([True, False, False])  # loses class and codes together
    other = model.hidden(latents, classes.masked_fill(drop, NULL), codes, mask)
    at = mask == 1
    rows = [model.head.loss(latents[at], other[at], t[m][at], noise[m][at]) for m in range(2)]
    dropped = model.loss(latents, classes, codes, mask, t, noise, drop)
    torch.testing.assert_close(dropped, torch.cat(rows).mean())
    assert abs(float((dropped - loss).detach())) > 1e-5


@pytest.mark.parametrize("mask_min, fewest", [(0.7, 12), (0.4, 7)])  # ceil(0.7 * 16) = 12
def test_draws_of_a_training_step(mask_min, fewest):
    """70 to 100 % masked, equally many per image and in an order per image; M draws, all timesteps; 10% dropped."""
    model = make(mask_min=mask_min, class_drop=0.3)
    drawn = [model.draw(B) for _ in range(50)]
    counts = [d.masked for d in drawn]
    assert min(counts) == fewest and max(counts) == 16
    assert all(d.mask.sum(1).tolist() == [d.masked] * B for d in drawn)
    assert any(not torch.equal(d.mask[0], d.mask[1]) for d in drawn)
    t = torch.cat([d.t for d in drawn], dim=1)
    assert t.shape == (2, 50 * B, L) and t.min() < 20 and t.max() > T - 20 and abs(t.float().mean() - T / 2) < 25
    assert float(torch.cat([model.draw(500).drop for _ in range(4)]).float().mean()) == pytest.approx(0.3, abs=0.04)
    d = drawn[0]
    assert d.noise.shape == (2, B, L, C) and d.posterior_noise.shape == (B, L, C) and d.code_uniform.shape == (2, B, L)
    assert all(float(x.mean()) == pytest.approx(0, abs=0.2) for x in (d.noise, d.posterior_noise))


def test_draws_follow_seed_and_rows():
    """A generator and a host number fix a step; a rank's rows are those of the whole batch."""
    model, seeded = make(), lambda: torch.Generator().manual_seed(5)
    a, b = (model.draw(6, seeded(), 0.3) for _ in range(2))
    assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))
    assert model.draw(6, seeded(), 0.9).masked != a.masked
    some = a.part(slice(2, 4))
    assert torch.equal(some.drop, a.drop[2:4]) and torch.equal(some.mask, a.mask[2:4])
    assert torch.equal(some.t, a.t[:, 2:4]) and torch.equal(some.noise, a.noise[:, 2:4])
    assert torch.equal(some.posterior_noise, a.posterior_noise[2:4])
    assert torch.equal(some.code_uniform, a.code_uniform[:, 2:4])
    assert some.masked == a.masked


def test_loss_draws_what_is_not_given(batch, monkeypatch):
    model, (latents, classes, _, mask), seen = make(), batch, []
    monkeypatch.setattr(model.head, "loss", lambda x, z, t, noise: seen.append((x, t, noise)) or z.sum() * 0)
    model.loss(latents, classes, None)
    model.loss(latents, classes, None, mask)
    (x, t, noise), (y, _, _) = seen
    assert t.shape == (2, len(x)) and noise.shape == (2, *x.shape) and len(x) >= 12 * B and len(y) == 10 * B


@pytest.mark.parametrize("low", [0.7, 0.3])
def test_mask_ratio(low):
    """Normal(1, 0.25) truncated to [low, 1]: the quantile function gives back its quantiles, mean and density."""
    ratios = torch.tensor([mask_ratio((i + 0.5) / 2000, low) for i in range(2000)], dtype=torch.float64)
    assert low <= ratios.min() < low + 0.01 and 0.999 < ratios.max() <= 1 and (ratios.diff() > 0).all()
    x = torch.linspace(low, 1.0, 3001, dtype=torch.float64)
    density = (-((x - 1) / 0.25) ** 2 / 2).exp()
    assert ratios.mean() == pytest.approx(float((x * density).sum() / density.sum()), abs=1e-3)
    assert (ratios < 0.85).double().mean() == pytest.approx(float(density[x < 0.85].sum() / density.sum()), abs=1e-3)
    assert math.isclose(mask_ratio(0.0, low), low) and math.ceil(mask_ratio(1 - 2**-24, low) * 256) == 256


@every_fusion
def test_every_parameter_learns(fusion, batch):
    model, (latents, classes, codes, mask) = make(fusion), batch
    model.train()
    model.loss(latents, classes, codes, mask).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == (["fusion.embedding.weight"] if model.fusion.reads_codes else [])  # the prior's table is frozen
    assert model.class_embedding.weight.grad.any(dim=1).tolist() == [True, False, False, True, False]
    prefix = [True] * model.fusion.prefix_rows  # and each position where it was seen, masked, or both
    assert model.encoder_positions.grad.any(2)[0].tolist() == prefix + (mask == 0).any(0).tolist()
    assert model.decoder_positions.grad.any(2)[0].tolist() == prefix + [True] * L
    assert model.output_positions.grad.any(2)[0].tolist() == (mask == 1).any(0).tolist()


def test_dropout_only_in_training(batch):
    model, (latents, classes, _, mask) = make(dropout=0.1), batch
    z = lambda: model.hidden(latents, classes, None, mask)
    assert torch.equal(z(), z())
    model.train()
    assert not torch.equal(z(), z())


@with_codes
def test_the_condition_is_learned(fusion):
    """Pictures of one colour that their code tells: other codes raise the loss, and draw the other picture."""
    model, g = make(fusion, depth=1).train(), torch.Generator().manual_seed(0)
    colors, classes = torch.randn(20, C, generator=g), torch.zeros(32, dtype=torch.int64)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def pictures():
        codes = torch.randint(20, (32, 1), generator=g).expand(-1, L)
        return colors[codes] + 0.1 * torch.randn(32, L, C, generator=g), codes
    for _ in range(150):
        latents, codes = pictures()
        model.loss(latents, classes, codes).backward()
        optimizer.step(), optimizer.zero_grad()
    (latents, codes), model, other = pictures(), model.eval(), lambda x: x.roll(1, 0)
    mask, t, noise = torch.ones(32, L), torch.randint(T, (2, 32, L)), torch.randn(2, 32, L, C)
    loss = lambda codes: model.loss(latents, classes, codes, mask, t, noise).item()
    assert loss(codes) < loss(other(codes)) - 0.1
    draw = lambda codes: model.generate(classes, codes, 4, 10, 1.0, generator=generators(32), t_max=950)
    distance = lambda codes: float((draw(codes) - other(latents)).square().mean())
    assert distance(other(codes)) < 0.5 * distance(codes)


# -------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("grid", [4, 8, 16])
@pytest.mark.parametrize("iterations", ["1", "2", "L//4", "L"])
def test_every_latent_is_drawn_once(grid, iterations, monkeypatch):
    """A head that numbers its rows: each number comes back, at the place and in the iteration of the image's order."""
    n = eval(iterations, {"L": grid**2})
    model, calls = make(grid=grid, depth=1, token_dim=1), []

    def number(z, z_null, *rest, **how):
        assert z_null is None  # cfg 1 skips the null branch
        calls.append(len(z))
        return sum(calls[:-1]) + torch.arange(len(z)).float()[:, None]
    monkeypatch.setattr(model.head, "sample", number)
    orders = torch.stack([torch.randperm(grid**2) for _ in range(2)])
    x = model.generate(torch.tensor([0, 1]), None, n, 1, cfg=1.0, orders=orders)[..., 0]
    assert torch.equal(x.flatten().sort().values, torch.arange(2 * grid**2).float())
    masked, first = [grid**2] + masked_counts(grid**2, n), 0
    for before, after in zip(masked, masked[1:]):
        for b in range(2):  # rows batch-major, then raster order
            places = orders[b, after:before].sort().values
            assert x[b, places].tolist() == list(range(first, first + len(places)))
            first += len(places)
    with pytest.raises(ValueError, match="iterations"):
        model.generate(torch.tensor([0]), None, grid**2 + 1)


@pytest.mark.parametrize("L", [16, 64, 256])
def test_masked_counts(L):
    for n in (1, 2, math.isqrt(L), L // 4, L - 1, L):
        counts = masked_counts(L, n)
        assert len(counts) == n and counts[-1] == 0 and all(a > b for a, b in zip([L] + counts, counts))
        cosine = [math.floor(L * math.cos(math.pi / 2 * (k + 1) / n)) for k in range(n - 1)]
        assert all(m <= c for m, c in zip(counts, cosine))
        if n <= math.isqrt(L):  # so few that the cosine alone draws one or more each time
            assert counts[:-1] == cosine
    assert masked_counts(L, L) == list(range(L - 1, -1, -1))  # one at a time


def test_steps_of_each_iteration(batch):
    """Annealed steps, and no null branch while guidance is below cfg_from."""
    model, (_, classes, codes, _) = make("cross_attention"), batch
    heads = []
    sample = model.head.sample
    model.head.sample = lambda z, z_null, cfg, steps, *rest, **how: (
        heads.append((steps, z_null is not None)), sample(z, z_null, cfg, steps, *rest, **how))[1]
    steps = [5, 4, 2, 1]
    some = model.generate(classes, codes, 4, steps, 3.0, generator=generators(B), cfg_from=1.5)
    assert heads == [(5, False), (4, True), (2, True), (1, True)]  # guidance 1.25, 1.6, 2.3, 2.9
    every = model.generate(classes, codes, 4, steps, 3.0, generator=generators(B))
    none = model.generate(classes, codes, 4, steps, 1.0, generator=generators(B))
    assert 1e-2 < relative(some, every) < relative(none, every)


@every_fusion
def test_kept_latents(fusion, batch):
    """The model sees them from the first iteration on and never changes them: generate, written out once more."""
    model, (known, classes, codes, mask) = make(fusion), batch
    orders, keep = torch.rand(B, L).argsort(1), mask == 0
    counts = [10] + masked_counts(10, 4)
    noise = [torch.randn(6, B * (a - b), C) for a, b in zip(counts, counts[1:])]
    latents, mask, null = known * keep[..., None], (~keep).float(), torch.full((B,), NULL)
    rank = (orders.argsort(1) + L * keep).argsort(1).argsort(1)  # in the order, kept ones last
    seen = []
    for k, after in enumerate(counts[1:]):
        now = (rank < after).float()
        new = (mask - now) == 1
        z, z_null = (model.hidden(latents, y, codes, mask)[new] for y in (classes, null))
        scale = 1 + (3.0 - 1) * (L - max(after, 1)) / L
        latents[new] = model.head.sample(z, z_null, scale, 5, 0.9, noise[k], t_max=900)
        mask = now
        seen.append(latents.clone())
    watched = []
    got = model.generate(classes, codes, 4, 5, 3.0, "linear", 0.9, orders, noise, t_max=900, start=(known, keep),
                         watch=watched.append)
    assert relative(got, latents) < 3e-4 and torch.equal(got[keep], known[keep])
    assert len(watched) == 4 and all(relative(a, b) < 3e-4 for a, b in zip(watched, seen))


def test_what_may_be_kept(batch):
    model, (known, classes, _, mask) = make(), batch
    keep = mask == 0
    for iterations in (1, 10):  # of the ten that are not kept
        out = model.generate(classes, None, iterations, 2, 2.0, start=(known, keep))
        assert torch.equal(out[keep], known[keep]) and not torch.isclose(out[~keep], known[~keep]).all(-1).any()
    with pytest.raises(ValueError, match="the 10 tokens to draw"):
        model.generate(classes, None, 11, 2, start=(known, keep))
    keep[0] = False
    with pytest.raises(ValueError, match="equally many"):
        model.generate(classes, None, 2, 2, start=(known, keep))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_guidance_schedule(schedule, batch, monkeypatch):
    model, scales = make(), []

    def sample(z, z_null, cfg, *rest, **how):
        scales.append(cfg)
        return torch.zeros(len(z), C)
    monkeypatch.setattr(model.head, "sample", sample)
    model.generate(batch[1], None, 4, 1, 3.0, schedule)
    want = [1 + 2 * (16 - m) / 16 for m in (14, 11, 6, 1)] if schedule == "linear" else [3.0] * 4  # 16 cos(pi/8 (k+1))
    assert scales == pytest.approx(want)
    with pytest.raises(ValueError, match="schedule"):
        model.generate(batch[1], None, 4, schedule="cosine")


@with_codes
def test_guidance(fusion, batch):
    model, codes, null = make(fusion), batch[2], torch.full((B,), NULL)
    run = lambda classes, codes, cfg: model.generate(classes, codes, 4, 5, cfg, "constant", generator=generators(B))
    plain = run(null, codes, 1.0)
    assert relative(run(null, codes, 3.0), plain) < 3e-4                   # both branches say the same
    assert relative(run(null, (codes + 1) % 20, 3.0), plain) < 3e-4        # null class, fake codes
    classes = torch.tensor([0, 1, 2])
    assert relative(run(classes, codes, 3.0), run(classes, codes, 1.0)) > 1e-2
    assert relative(run(classes, (codes + 1) % 20, 1.0), run(classes, codes, 1.0)) > 1e-2


@every_fusion
def test_a_picture_does_not_depend_on_its_batch(fusion):
    model, classes, codes = make(fusion), torch.arange(7) % 5, torch.randint(20, (7, L))
    together = model.generate(classes, codes, 4, 5, 2.0, generator=generators(7))
    for i, g in enumerate(generators(7)):
        alone = model.generate(classes[i:i + 1], codes[i:i + 1], 4, 5, 2.0, generator=[g])
        assert relative(alone[0], together[i]) < 3e-4
        assert relative(together[i - 1], together[i]) > 0.1  # other pictures


def test_one_seed_draws_orders_and_noise():
    model, classes = make(), torch.tensor([0, 0])
    a, b = (model.generate(classes, None, 4, 5, 1.0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b) and relative(a[0], a[1]) > 0.1
    calls = []
    model.generate(classes, None, 4, 5, watch=calls.append)
    assert len(calls) == 4
