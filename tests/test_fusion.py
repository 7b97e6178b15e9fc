"""How codes reach the generator: every fusion's promises, and what each does with them."""
from dataclasses import replace

import pytest
import torch

from fusion import FUSIONS, make_fusion
from generator import GeneratorConfig
from test_diffloss import on_meta, wake

B, L, D, P, K = 3, 16, 32, 4, 20
WITH_CODES = [name for name, fusion in FUSIONS.items() if fusion.reads_codes]


def config(fusion, **changes):
    c = GeneratorConfig(fusion, dim=D, depth=2, heads=2, prefix=P, grid=4, classes=5, vocab=K, code_dim=24,
                        queries=2, qformer_width=16, qformer_layers=2, qformer_heads=2)
    return replace(c, **changes)


def make(fusion):
    torch.manual_seed(0)
    return wake(make_fusion(config(fusion)))


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randint(K, (B, L)), torch.randn(B, D), torch.tensor([False, True, False])


def everything(condition):
    """All that the generator sees of a condition, per image."""
    return torch.cat([x.flatten(1) for x in condition if x is not None], dim=1)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_shapes(fusion, batch):
    model = make(fusion)
    prefix, context, mask_codes = model(*batch)
    assert prefix.shape == (B, model.prefix_rows, D)
    assert all(x is None or x.shape == (B, L, D) for x in (context, mask_codes))
    with torch.device("meta"):
        model = make_fusion(config(fusion))
    with on_meta():
        assert model(*(x.to("meta") for x in batch)).prefix.shape == prefix.shape


@pytest.mark.parametrize("fusion", WITH_CODES)
def test_codes_matter_and_so_does_their_order(fusion, batch):
    model, (codes, token, is_null) = make(fusion), batch
    seen = everything(model(codes, token, is_null))
    other = codes.clone()
    other[:, 5] = (codes[:, 5] + 1) % K
    swapped = codes.clone()
    codes[:, 3], codes[:, 9] = 1, 2
    swapped[:, 3], swapped[:, 9] = 2, 1
    change = (everything(model(other, token, is_null)) - seen).abs().amax(1)
    order = (everything(model(swapped, token, is_null)) - everything(model(codes, token, is_null))).abs().amax(1)
    for d in (change, order):
        assert d[0] > 1e-4 and d[2] > 1e-4 and d[1] == 0  # a null class implies fake codes


@pytest.mark.parametrize("fusion", WITH_CODES)
def test_fake_codes_are_learned_and_the_table_is_frozen(fusion, batch):
    model = make(fusion)
    everything(model(*batch)).pow(2).sum().backward()
    assert model.embedding.weight.grad is None and not model.embedding.weight.requires_grad
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    model.zero_grad()
    everything(model(*batch[:2], torch.zeros(B, dtype=torch.bool))).pow(2).sum().backward()
    assert not model.fake_code.grad.any()  # nobody was null


def test_embedding_is_equation_4(batch):
    model, (codes, _, is_null) = make("cross_attention"), batch
    h = model.embed(codes, is_null)
    rows = model.embedding.weight[codes] + model.positions
    rows[1] = model.fake_code + model.positions[0]
    torch.testing.assert_close(h, rows @ model.project.weight.T + model.project.bias)


def test_table_of_the_prior():
    """Taken over up to its scale, and frozen all the same."""
    model, prior = make("cross_attention"), 0.02 * torch.randn(K, 24)
    table = model.embedding.weight
    assert table.std().item() == pytest.approx(1, abs=0.1)  # without a prior: random, of the same size
    model.copy_table(prior)
    assert table.std().item() == pytest.approx(1, abs=1e-4) and not table.requires_grad
    torch.testing.assert_close(table * prior.std(), prior)


def test_which_fusions_read_codes():
    assert set(FUSIONS) - set(WITH_CODES) == {"none"}


def test_class_rows(batch):
    token = batch[1][:, None]
    for fusion in FUSIONS:
        prefix = make(fusion)(*batch).prefix
        rows = range(2, P) if fusion == "qformer" else range(P)
        assert all(torch.equal(prefix[:, i:i + 1], token) for i in rows)
        others = [i for i in range(prefix.shape[1]) if i not in rows]
        assert not torch.isclose(prefix[:, others], token).all(-1).any()  # queries or codes


def test_where_embedded_codes_go(batch):
    """One embedding; the fusions differ in the place it takes: position i in row i, a null image's fake code too."""
    for fusion, place in (("prefix", lambda c: c.prefix[:, P:]), ("cross_attention", lambda c: c.context),
                          ("mask_tokens", lambda c: c.mask_codes)):
        model = make(fusion)
        assert torch.equal(place(model(*batch)), model.embed(batch[0], batch[2]))
        assert model.prefix_rows == (P + L if fusion == "prefix" else P)


def test_qformer_reads_all_codes_into_different_queries(batch):
    model = make("qformer").qformer
    h = torch.randn(1, L, D, requires_grad=True)
    queries = model(h)
    assert (queries[0, 0] - queries[0, 1]).abs().max() > 1e-2
    queries[0, 0].sum().backward()
    assert h.grad[0].abs().amax(-1).min() > 0


def test_qformer_without_its_encoder(batch):
    """D2C's Table 3: as many queries that read the codes, of their neighbours independent, by the decoder alone."""
    torch.manual_seed(0)
    whole = make_fusion(config("qformer")).qformer
    model = wake(make_fusion(config("qformer", qformer_encoder=False))).qformer
    assert len(whole.encoder) == len(model.decoder) == 2 and len(model.encoder) == 0
    h = torch.randn(1, L, D, requires_grad=True)
    queries = model(h)
    assert queries.shape == (1, 2, D)
    queries.sum().backward()
    assert (h.grad.abs().sum(-1) > 0).all()  # each code is read
    shuffled = torch.randperm(L)
    torch.testing.assert_close(model(h[:, shuffled]), queries)  # and nothing but its value, of which position is a part


def test_cross_attention():
    """softmax(q k / sqrt(d)) v per head, by hand; each row on its own."""
    layer = wake(make("cross_attention").make_cross_attention(D, 2))
    x, y = torch.randn(B, 5, D), torch.randn(B, L, D)
    a = layer.attention
    q = a.q(torch.nn.functional.layer_norm(x, (D,), layer.norm.weight, layer.norm.bias, 1e-6)).view(B, 5, 2, 16)
    k, v = a.kv(y).view(B, L, 2, 2, 16).unbind(2)
    weights = torch.einsum("bthd,buhd->bhtu", q, k).div(16**0.5).softmax(-1)
    want = a.proj(torch.einsum("bhtu,buhd->bthd", weights, v).reshape(B, 5, D))
    got = layer(x, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer(x[:, 2:4], y), got[:, 2:4])
    assert all(make(f).make_cross_attention(D, 2) is None for f in FUSIONS if f != "cross_attention")


@pytest.mark.parametrize("fusion", WITH_CODES)
def test_other_numbers_of_codes(fusion, batch):
    """Codes may have a grid of their own. mask_tokens adds to each token the codes of its place, and no others."""
    side = 8 if fusion == "mask_tokens" else 6  # of the codes; the tokens are 4 x 4
    model, codes = wake(make_fusion(config(fusion, code_grid=side))), torch.randint(K, (B, side**2))
    fused = model(codes, *batch[1:])
    assert fused.prefix.shape[1] == (P + side**2 if fusion == "prefix" else P)
    assert fused.context is None or fused.context.shape == (B, side**2, D)
    if fusion != "mask_tokens":
        return
    for row, column in ((0, 1), (7, 2), (3, 7)):
        other = codes.clone()
        other[0, row * side + column] = (codes[0, row * side + column] + 1) % K
        changed = (model(other, *batch[1:]).mask_codes - fused.mask_codes).abs().sum(-1).nonzero().tolist()
        assert changed == [[0, row // 2 * 4 + column // 2]]
    for refused in (6, 2, 12):  # no whole number of codes per token; fewer codes than tokens; 9 does not divide D = 32
        with pytest.raises(ValueError, match="k x k codes per token"):
            make_fusion(config(fusion, code_grid=refused))


def test_refusals(batch):
    for fusion in WITH_CODES:
        with pytest.raises(ValueError, match="codes"):
            make(fusion)(None, *batch[1:])
    make("none")(None, *batch[1:])
    with pytest.raises(ValueError, match="unknown"):
        make_fusion(config("attention"))
    with pytest.raises(ValueError, match="prefix"):
        make_fusion(config("qformer", queries=5))
