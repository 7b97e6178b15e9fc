"""The discrete prior: its cache, its positions, its guidance, and the draws that make a picture its own."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import prior
from prior import Prior, PriorConfig, filter_logits, pick, rope_table, rotate
from test_diffloss import on_meta, wake

CONFIG = PriorConfig(dim=32, layers=2, heads=2, vocab=40, grid=4, classes=5)
B, L, NULL = 3, 16, CONFIG.classes


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Prior(CONFIG)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)  # opinions strong enough to differ
    return model.eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randint(CONFIG.vocab, (B, L)), torch.tensor([0, 3, 4])


def generators(n):
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def test_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in Prior(PriorConfig()).parameters()) == 110_888_448
    assert [PriorConfig(dim=d).ffn_dim for d in (1024, 1280, 1536)] == [2816, 3584, 4096]  # LlamaGen L, XL, XXL


def test_meta_device():
    with torch.device("meta"):
        model, codes, classes = Prior(CONFIG), torch.zeros(B, L, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
        uniform = torch.empty(B, L)
    with on_meta():
        assert model(codes, classes).shape == (B, L + 1, CONFIG.vocab)
        model.loss(codes, classes).backward()
        assert model.generate(classes, cfg=2.0, top_k=3, top_p=0.9).shape == (B, L)
        assert model.generate(classes, top_k=1).shape == model.resample(codes, classes, uniform).shape == (B, L)


# ------------------------------------------------------------------------------------------------------- positions

def test_class_token_has_no_key_and_no_query(model):
    table = rope_table(4, 16)
    x = torch.randn(2, 2, L + 1, 16)
    y = rotate(x, table)
    assert not y[:, :, 0].any()
    torch.testing.assert_close(y[:, :, 1:].norm(dim=-1), x[:, :, 1:].norm(dim=-1))  # the others only turn
    # so the first code gives the class token weight 1 / (1 + e^s), whatever the class token's key would have said
    block, x = model.blocks[0], torch.randn(1, 2, CONFIG.dim)
    q, k, v = block.wqkv(x).view(2, 3, 2, 16).unbind(1)                                # each [T, H, 16]
    s = ((q[1] * k[1]).sum(-1) / 4)[:, None]                                           # turning both changes nothing
    y = (v[0] + s.exp() * v[1]) / (1 + s.exp())
    torch.testing.assert_close(block.attend(x, model.rope[:2])[0, 1], block.wo(y.flatten()))


def test_attention_knows_distances_in_the_plane():
    """The product of a query and a key depends on rows and columns apart, in the halves of the channels."""
    q, k = torch.randn(2, 1, 1, 1, 16)
    table = rope_table(4, 16)
    q, k = (rotate(x.expand(1, 1, L + 1, 16), table)[0, 0, 1:].view(4, 4, 16) for x in (q, k))
    torch.testing.assert_close(q[0, 1] @ k[2, 2], q[1, 0] @ k[3, 1])
    assert (q[0, 1] @ k[2, 2] - q[0, 1] @ k[1, 3]).abs() > 1e-3
    assert torch.equal(q[0, 0, :8], q[0, 3, :8]) and torch.equal(q[0, 0, 8:], q[3, 0, 8:])  # half row, half column
    frequencies = torch.tensor([1, 10000**-0.25, 10000**-0.5, 10000**-0.75])
    angles = torch.cat([2 * frequencies, 3 * frequencies])
    row2_column3 = table[1 + 4 * 2 + 3]
    torch.testing.assert_close(row2_column3, torch.stack([angles.cos(), angles.sin()], dim=-1))


@pytest.mark.parametrize("i", [0, 7, L - 1])
def test_causal(model, batch, i):
    codes, classes = batch
    changed = codes.clone()
    changed[:, i] = (changed[:, i] + 1) % CONFIG.vocab
    a, b = model(codes, classes), model(changed, classes)
    torch.testing.assert_close(a[:, :i + 1], b[:, :i + 1])  # logits i predict code i and may not know it
    assert ((a - b)[:, i + 1:].abs().amax(-1) > 1e-3).all()


# -------------------------------------------------------------------------------------------------------- training

def test_loss(model, batch):
    codes, classes = batch
    assert Prior(CONFIG).loss(codes, classes).item() == pytest.approx(math.log(CONFIG.vocab), abs=1e-5)
    none, every = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    log_p = model(codes, classes)[:, :L].log_softmax(-1).gather(2, codes[..., None])
    torch.testing.assert_close(model.loss(codes, classes, none), -log_p.mean())
    null = model.loss(codes, torch.full_like(classes, NULL), none)
    assert torch.equal(model.loss(codes, classes, every), null) and abs(null + log_p.mean()) > 1e-3
    torch.testing.assert_close(model.loss(codes, classes), -log_p.mean())  # no image is dropped unasked
    for share in (0.0, 0.3, 1.0):
        model.config = replace(CONFIG, class_drop=share)
        assert float(model.draw(4000).float().mean()) == pytest.approx(share, abs=0.05)


def test_dropout_only_in_training(model, batch):
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    for embedded, blocks in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):  # either place drops
        model.config = replace(CONFIG, dropout=embedded)
        for block in model.blocks:
            block.dropout = blocks
        assert torch.equal(model(*batch), model(*batch)) == (embedded == blocks)


def test_every_parameter_learns(batch):
    model = wake(Prior(CONFIG))  # the output layer starts at zero and would pass nothing on
    model.loss(*batch, drop=torch.tensor([True, False, False])).backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []
    assert model.class_embedding.weight.grad.any(dim=1).tolist() == [False, False, False, True, True, True]


def test_resample(model, batch):
    codes, classes = (x.repeat(14, *[1] * (x.ndim - 1)) for x in batch)  # 42, more than a chunk
    uniform = torch.rand(42, L)
    want = pick(model(codes, classes)[:, :L], uniform)
    assert torch.equal(model.resample(codes, classes, uniform), want) and not torch.equal(want, codes)


def test_mixture(model, batch):
    """True codes with the given share, else resampled ones."""
    codes, classes = (x.repeat(40, *[1] * (x.ndim - 1)) for x in batch)
    uniform = torch.rand(2, *codes.shape)
    drawn = model.resample(codes, classes, uniform[1])
    assert torch.equal(model.mixture(codes, classes, 1, uniform), codes)
    assert torch.equal(model.mixture(codes, classes, 0, uniform), drawn)
    mixed = model.mixture(codes, classes, 0.3, uniform)
    assert torch.equal(mixed, torch.where(uniform[0] < 0.3, codes, drawn))
    assert float((uniform[0] < 0.3).float().mean()) == pytest.approx(0.3, abs=0.05)


# -------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_cache_and_guidance(model, batch, monkeypatch, cfg):
    """The logits of every step, with cached keys and values, are those of one uncached pass over the codes drawn."""
    classes, seen = batch[1], []
    monkeypatch.setattr(prior, "filter_logits", lambda logits, k, p: seen.append(logits) or filter_logits(logits, k, p))
    codes = model.generate(classes, cfg=cfg, temperature=0.7, generator=torch.Generator().manual_seed(0))
    logits, null = model(codes, classes), model(codes, torch.full_like(classes, NULL))
    want = ((null + cfg * (logits - null)) / 0.7)[:, :L]
    torch.testing.assert_close(torch.stack(seen, 1), want, rtol=1e-4, atol=1e-4)
    assert (seen[0] - null[:, 0]).abs().max() > 0.1  # else the class, and so guidance, would mean nothing


def test_likeliest_codes(model, batch):
    classes = batch[1]
    codes = model.generate(classes, cfg=2.0, top_k=1)
    logits, null = model(codes, classes), model(codes, torch.full_like(classes, NULL))
    assert torch.equal(codes, (null + 2.0 * (logits - null))[:, :L].argmax(-1))
    assert torch.equal(codes, model.generate(classes, cfg=2.0, top_p=1e-9))
    assert torch.equal(codes, model.generate(classes, cfg=2.0, temperature=1e-4))


def test_given_codes_stay(model, batch):
    """They stand at their places, and the codes drawn after them are those of a model that has seen them."""
    codes, classes = batch
    given = torch.where(torch.rand(B, L) < 0.5, codes, -1)
    out = model.generate(classes, cfg=2.0, top_k=1, given=given)
    cond, null = (model(out, y)[:, :-1] for y in (classes, torch.full((B,), NULL)))
    assert torch.equal(out, torch.where(given < 0, (2 * cond - null).argmax(-1), codes))
    draw = lambda **how: model.generate(classes, generator=generators(B), **how)
    assert torch.equal(draw(given=torch.full((B, L), -1)), draw()) and torch.equal(draw(given=codes), codes)


def test_nothing_to_guide(model):
    null = torch.full((B,), NULL)
    plain, guided = (model.generate(null, cfg=cfg, generator=generators(B)) for cfg in (1.0, 3.0))
    assert torch.equal(plain, guided)


def test_a_picture_does_not_depend_on_its_batch(model):
    classes = torch.arange(7) % CONFIG.classes
    together = model.generate(classes, cfg=2.0, generator=generators(7))
    alone = [model.generate(classes[i:i + 1], cfg=2.0, generator=[g]) for i, g in enumerate(generators(7))]
    assert torch.equal(together, torch.cat(alone)) and len(together.unique(dim=0)) == 7
    assert torch.equal(together[:5], model.generate(classes[:5], cfg=2.0, generator=generators(5)))


def test_every_code_has_a_number_of_its_own():
    """A new prior finds all codes equally likely: its draws are its uniform numbers, in steps of 1/K."""
    codes = Prior(CONFIG).eval().generate(torch.arange(B), cfg=2.0, generator=generators(B))
    uniform = torch.stack([torch.rand(L, generator=g) for g in generators(B)])
    assert torch.equal(codes, (uniform * CONFIG.vocab).long())


def test_draw_follows_the_probabilities():
    p = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    uniform = torch.arange(8000) / 8000
    counts = F.one_hot(pick(p.log().expand(8000, -1), uniform), 6).sum(0)
    assert counts.tolist() == [0, 4000, 0, 1000, 3000, 0]
    logits = torch.randn(500, 1000) * 5
    filtered = filter_logits(logits, top_k=20)
    for u in (0.0, 1 - 2**-24):  # the smallest and the largest number that torch.rand gives
        codes = pick(filtered, torch.full((500,), u))
        assert filtered.gather(1, codes[:, None]).isfinite().all()
    p = logits[0, :50].softmax(-1)
    counts = pick(p.log().expand(20000, -1), torch.rand(20000)).bincount(minlength=50)
    assert ((counts - 20000 * p).abs() < 5 * (20000 * p).sqrt() + 5).all()


def test_filters():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = lambda **how: filter_logits(logits, **how).isfinite()[0].tolist()
    assert kept() == kept(top_k=9) == [True] * 4
    assert kept(top_k=2) == [False, True, False, True] and kept(top_k=1) == [False, True, False, False]
    assert kept(top_p=0.3) == [False, True, False, False]
    assert kept(top_p=0.65) == kept(top_p=0.5) == [False, True, False, True]  # who carries the sum over p stays
    assert kept(top_p=0.75) == [False, True, True, True]
