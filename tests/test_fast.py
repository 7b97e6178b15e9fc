"""fast.py: the same results as the plain loops, for every fusion, every option and every way to lay out the work."""
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fast
from diffloss import tf32
from fusion import FUSIONS
from generator import Generator, masked_counts
from prior import Prior, PriorConfig
from test_diffloss import C as HEAD_C, D, N, head, on_meta  # noqa: F401 (head is a fixture)
from test_generator import B, C, CONFIG, L, NULL, batch, generators, make, relative  # noqa: F401 (batch is a fixture)

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


# ------------------------------------------------------------------------------------------------------- generator

@every_fusion
@pytest.mark.parametrize("cfg, schedule", [(3.0, "linear"), (3.0, "constant"), (1.0, "linear")])
def test_generate(fusion, cfg, schedule, batch):
    model, (_, classes, codes, _) = make(fusion), batch
    orders = torch.rand(B, L).argsort(1)
    counts = [L] + masked_counts(L, 4)
    noise = [torch.randn(6, B * (a - b), C) for a, b in zip(counts, counts[1:])]
    how = classes, codes, 4, 5, cfg, schedule, 0.9, orders, noise
    want = model.generate(*how)
    assert relative(fast.generate(model, *how), want) < 3e-4
    assert relative(fast.generate(model, *how, null=fast.prepare_null(model)), want) < 3e-4


@every_fusion
def test_generate_with_every_option(fusion, batch):
    """Annealed steps, guidance from an iteration on, kept tokens, generators, pictures of every iteration."""
    model, (known, classes, codes, mask) = make(fusion), batch
    how = dict(iterations=4, steps=[5, 4, 2, 1], cfg=3.0, cfg_from=1.8, t_max=900, start=(known, mask == 0))
    films = [], []
    want = model.generate(classes, codes, generator=generators(B), watch=films[0].append, **how)
    got = fast.generate(model, classes, codes, generator=generators(B), watch=films[1].append, **how)
    assert relative(got, want) < 3e-4 and torch.equal(got[mask == 0], known[mask == 0])
    assert len(films[1]) == 4 and all(relative(b, a) < 3e-4 for a, b in zip(*films))


@every_fusion
def test_other_number_of_codes(fusion, batch):
    side = 8 if fusion == "mask_tokens" else 6
    model, codes = make(fusion, code_grid=side), torch.randint(20, (B, side**2))
    want = model.generate(batch[1], codes, 3, 4, generator=generators(B))
    assert relative(fast.generate(model, batch[1], codes, 3, 4, generator=generators(B)), want) < 3e-4


@every_fusion
def test_loss(fusion, batch):
    """Loss and gradients of Generator.loss with the same draws; the head sees masked tokens only."""
    model, (latents, classes, codes, _) = make(fusion).train(), batch
    draws, both = model.draw(B, uniform=0.3)._replace(drop=torch.tensor([True, False, False])), []
    plain = lambda: model.loss(latents, classes, codes, draws.mask, draws.t, draws.noise, draws.drop)
    for loss in (plain, lambda: fast.loss(model, latents, classes, codes, draws)):
        model.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        both.append((value.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (a, plain), (b, ours) = both
    assert b == pytest.approx(a, rel=1e-5) and plain.keys() == ours.keys()
    assert all(relative(ours[n], g) < 1e-4 for n, g in plain.items() if g.norm() > 1e-6)


@every_fusion
def test_last_block_answers_for_some_rows(fusion, batch):
    """All rows are its keys and values all the same."""
    model, (_, classes, codes, _) = make(fusion), batch
    block, prepared = model.decoder_blocks[-1], fast.prepare(model, classes, codes)
    x = torch.randn(B, model.fusion.prefix_rows + L, CONFIG.dim)
    every = block(x, model.fuse(classes, codes).context)
    for a, b in ((0, L), (6, 7), (3, 11)):
        torch.testing.assert_close(fast.run_block(block, x, prepared.decoder[-1], slice(a, b)), every[:, a:b])


@every_fusion
def test_no_waiting_for_the_device(fusion):
    """On meta tensors, which have no values to wait for."""
    with torch.device("meta"):
        model, latents = Generator(replace(CONFIG, fusion=fusion)), torch.empty(B, L, C)
        classes, codes = torch.zeros(B, dtype=torch.int64), torch.zeros(B, L, dtype=torch.int64)
    with on_meta():
        fast.loss(model, latents, classes, codes, model.draw(B, uniform=0.4)).backward()
        assert fast.generate(model, classes, codes, iterations=4, steps=3).shape == (B, L, C)


def test_compiled_blocks(batch, monkeypatch):
    """compile_blocks replaces the function that generate calls."""
    calls, plain = [], fast.run_block
    monkeypatch.setattr(fast, "run_block", plain)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: lambda *a, **k: (calls.append(1), f(*a, **k))[1])
    fast.compile_blocks()
    fast.generate(make(), batch[1], None, 4, 2)
    assert len(calls) == 4 * 2 * CONFIG.depth


# ------------------------------------------------------------------------------------------------------------- head

@pytest.mark.parametrize("rows", [1, 5 * N, 1000])
@pytest.mark.parametrize("cfg, steps, t_max", [(3.0, 10, 999), (1.0, 1, 999), (0.5, 7, 950)])
def test_sample_head(head, rows, cfg, steps, t_max, monkeypatch):
    """However many steps share an adaLN product: one, two and a half, or all."""
    z, z_null, noise = torch.randn(N, D), torch.randn(N, D), torch.randn(steps + 1, N, HEAD_C)
    monkeypatch.setattr(fast, "ROWS", rows)
    how = z, z_null, cfg, steps, 0.9, noise, None, t_max
    want = head.sample(*how)
    assert (fast.sample_head(head, *how) - want).norm() < 3e-4 * want.norm()
    seeded = lambda sample: sample(z, steps=3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(seeded(lambda *a, **k: fast.sample_head(head, *a, **k)), seeded(head.sample),
                               rtol=1e-3, atol=1e-3)


def test_sample_head_in_fp32_under_autocast(head):
    z, noise = torch.randn(N, D), torch.randn(6, N, HEAD_C)
    want = fast.sample_head(head, z, z.flip(0), 2.0, 5, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast.sample_head(head, z, z.flip(0), 2.0, 5, noise=noise), want)


def test_same_layers_may_use_tf32(head):
    """The plain head decides which layers may round to TF32. Outside of both forms the flag is on."""
    allowed = []
    for name, layer in head.net.named_modules():
        if isinstance(layer, nn.Linear):
            note = lambda *_, name=name: allowed.append((name, torch.backends.cuda.matmul.allow_tf32))
            layer.register_forward_hook(note)
    z, noise = torch.randn(2, N, D), torch.randn(4, N, HEAD_C)
    calls = (lambda: head.sample(*z, 3.0, 3, 1.0, noise), lambda: fast.sample_head(head, *z, 3.0, 3, 1.0, noise),
             lambda: fast.head_net(head.net, z[0])(torch.randn(2, N, HEAD_C), torch.randint(1000, (2, N)), z[0]))
    found = []
    for call in calls:
        with tf32():
            call()
        found.append(set(allowed))
        allowed.clear()
    assert found[0] == found[1] == found[2]
    assert {name.split(".")[0] for name, rounds in found[0] if rounds} == {"blocks"}


def test_graphs(head):
    """Recorded once per key, replayed with new inputs. No GPU: here a replay computes again, into the same output."""
    class Replayed(fast.Graphs):
        def record(self, function, inputs):
            out = function(*inputs)
            return lambda: out.copy_(function(*inputs)), out

    def call(graphs, cfg, seed, rows=N):
        g = torch.Generator().manual_seed(seed)
        z, z_null = torch.randn(rows, D, generator=g), torch.randn(rows, D, generator=g)
        return fast.sample_head(head, z, z_null, cfg, 5, generator=g, graphs=graphs)

    calls = (2.0, 0), (3.0, 1), (1.0, 2), (3.0, 3, N - 1), (2.0, 0)
    graphs = Replayed()
    assert all(torch.equal(call(graphs, *c), call(None, *c)) for c in calls)
    assert len(graphs.recorded) == 3  # guided, not guided, fewer rows


# ------------------------------------------------------------------------------------------------------------ prior

@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_generate_codes(cfg):
    torch.manual_seed(0)
    model = Prior(PriorConfig(dim=32, layers=2, heads=2, vocab=40, grid=4, classes=5)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    classes, calls = torch.tensor([0, 3, NULL]), []
    given = torch.where(torch.rand(3, L) < 0.3, torch.randint(40, (3, L)), -1)
    for how in (dict(), dict(temperature=0.7, top_k=9, top_p=0.9), dict(given=given)):
        want = model.generate(classes, cfg, generator=generators(3), **how)
        got = fast.generate_codes(model, classes, cfg, generator=generators(3), watch=lambda: calls.append(1), **how)
        assert torch.equal(got, want)
    assert len(calls) == 3 * L
    with torch.device("meta"):
        model, classes = Prior(model.config), torch.zeros(3, dtype=torch.int64)
    with on_meta():
        assert fast.generate_codes(model, classes, 2.0, top_k=3, top_p=0.9).shape == (3, L)


@pytest.mark.parametrize("bias", (False, True))
def test_products_of_few_rows(bias):
    """The copied weights give what the layer gives; new weights need a new FewRows; a small layer is not copied."""
    torch.manual_seed(0)
    layer, small, linear = nn.Linear(1024, 512, bias=bias), nn.Linear(16, 8, bias=bias), fast.FewRows()
    with torch.no_grad():
        for shape in ((1,), (2,), (3,), (8, 1), (9,), (4, 6), (48, 1), (64,), (65,)):
            x = torch.randn(*shape, 1024)
            y = linear(layer, x)
            torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
            assert y.is_contiguous() and y.shape == (*shape, 512)
            assert torch.equal(linear(small, x[..., :16]), small(x[..., :16]))
        assert list(linear.copies) == [layer] * fast.ONEDNN
        layer.weight.mul_(2)
        torch.testing.assert_close(fast.FewRows()(layer, x[:4]), layer(x[:4]), rtol=1e-5, atol=1e-5)
