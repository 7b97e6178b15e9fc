"""The diffusion head: against a sampler and a loss written out from the papers, and on a distribution that is known."""
import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffloss import T, DiffusionHead, HeadConfig, Schedule, spaced_timesteps

N, C, D = 6, 3, 8


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of several devices: meta kernels do not always notice what CUDA would refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim}
        assert len(devices) < 2, f"{func} mixes devices {devices}"
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta():
    """Code run in here on meta tensors fails where it leaves a tensor on the CPU, or waits for a value: a host sync."""
    with pytest.MonkeyPatch.context() as patch, OneDevice():
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no meta device
        yield


def wake(model, std=0.1):
    """Gives the layers that start at zero something to say."""
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=std)
    return model.eval()


@pytest.fixture
def head():
    torch.manual_seed(0)
    return wake(DiffusionHead(HeadConfig(token_dim=C, cond_dim=D, depth=2, width=32)))


def alpha_bar(t):
    """Cosine schedule in float64, from its definition, as a product of clipped steps. t = -1 is clean."""
    f = lambda i: math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return math.prod(1 - min(1 - f(i + 1) / f(i), 0.999) for i in range(t + 1))


@torch.no_grad()
def from_the_papers(head, z, z_null, cfg, steps, temperature, noise, t_max=T - 1):
    """DiffusionHead.sample by other formulas: as official code computes it, with guidance state and noise twice."""
    kept = spaced_timesteps(steps, t_max)
    abar = torch.tensor([alpha_bar(t) for t in kept], dtype=torch.float64)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / previous
    posterior = beta * (1 - previous) / (1 - abar)
    posterior[0] = posterior[1] if steps > 1 else beta[0]
    at = lambda values, i: values[i].float()[:, None]                                 # one coefficient per row
    both = lambda a: torch.cat([a, a]) if z_null is not None else a
    z, x, kept = z if z_null is None else torch.cat([z, z_null]), both(noise[0]), torch.tensor(kept)
    for k, index in enumerate(reversed(range(steps))):
        i = torch.full((len(x),), index)
        eps, v = head.net(x, kept[i], z).chunk(2, dim=-1)
        if z_null is not None:
            cond, null = eps.chunk(2)
            eps = both(null + cfg * (cond - null))
        f = (v + 1) / 2
        logvar = f * at(beta.log(), i) + (1 - f) * at(posterior.log(), i)
        x0 = at((1 / abar).sqrt(), i) * x - at((1 / abar - 1).sqrt(), i) * eps
        mean = at(beta * previous.sqrt() / (1 - abar), i) * x0
        mean = mean + at((1 - previous) * (1 - beta).sqrt() / (1 - abar), i) * x
        x = mean + (i != 0)[:, None] * (0.5 * logvar).exp() * both(noise[k + 1]) * temperature
    return x[:len(noise[0])]


@pytest.mark.parametrize("steps, t_max, cfg, temperature", [
    (1, 999, 1.0, 1.0), (2, 999, 3.0, 1.0), (25, 999, 1.0, 0.9), (25, 950, 3.0, 0.9), (10, 9, 0.5, 1.0)])
def test_sample_is_that_of_the_papers(head, steps, t_max, cfg, temperature):
    z, z_null, noise = torch.randn(N, D), torch.randn(N, D), torch.randn(steps + 1, N, C)
    kept = spaced_timesteps(steps, t_max)
    assert all(abs(t - i * t_max / max(steps - 1, 1)) < 0.5001 for i, t in enumerate(kept))
    want = from_the_papers(head, z, z_null if cfg != 1 else None, cfg, steps, temperature, noise, t_max)
    got = head.sample(z, z_null, cfg, steps, temperature, noise, t_max=t_max)
    assert (got - want).norm() < 3e-4 * want.norm()


def test_sample_details(head):
    z, z_null, noise = torch.randn(N, D), torch.randn(N, D), torch.randn(6, N, C)
    x = head.sample(z, steps=5, noise=noise)
    assert torch.equal(x, head.sample(z, z_null, 1.0, 5, noise=noise))                       # cfg 1: no guidance
    same = head.sample(z, z.clone(), 3.0, 5, noise=noise)                                    # nothing to guide
    torch.testing.assert_close(x, same, rtol=1e-3, atol=1e-3)
    assert torch.equal(x, head.sample(z, steps=5, noise=torch.cat([noise[:5], noise[:1]])))  # last slab unused
    assert not torch.allclose(x, head.sample(z, steps=5, noise=torch.cat([noise[:4], noise[:2]])))
    seeded = lambda: torch.Generator().manual_seed(7)
    assert torch.equal(head.sample(z, steps=5, generator=seeded()), head.sample(z, steps=5, generator=seeded()))


def test_tf32_in_hidden_layers_only(head):
    """x, the last layer and what leads to them stay in fp32."""
    seen = {}
    for name, module in head.net.named_modules():
        if isinstance(module, nn.Linear):
            look = lambda *_, name=name: seen.update({name: torch.backends.cuda.matmul.allow_tf32})
            module.register_forward_pre_hook(look)
    head.net(torch.randn(N, C), torch.arange(N), torch.randn(N, D))
    hidden = {n for n, allowed in seen.items() if allowed}
    assert hidden == {n for n in seen if n.startswith("blocks.")} and "output" in seen and "input" in seen
    assert not torch.backends.cuda.matmul.allow_tf32


def test_timesteps():
    assert spaced_timesteps(1) == [0] and spaced_timesteps(1000) == list(range(1000))
    assert len(set(spaced_timesteps(100, 950))) == 100 and spaced_timesteps(100, 950)[-1] == 950
    for steps, t_max in ((0, 999), (1001, 999), (11, 9)):
        with pytest.raises(ValueError):
            spaced_timesteps(steps, t_max)
    s = Schedule()
    assert s.abar[999] == pytest.approx(2.4e-9, rel=0.02) and s.min_logvar[0] == s.min_logvar[1]
    assert all(low <= high + 1e-9 for low, high in zip(s.min_logvar[1:], s.max_logvar[1:]))


def test_time_embedding(head):
    """Cosines, then sines, of the timestep at frequencies from 1 down to almost 1/10000."""
    head.net.time = nn.Identity()
    y = head.net.embed_time(torch.tensor([0, 700]))
    assert y[0].tolist() == [1.0] * 128 + [0.0] * 128
    for i in (0, 64, 127):
        angle = 700 * 10000 ** (-i / 128)
        want = torch.tensor([math.cos(angle), math.sin(angle)])
        torch.testing.assert_close(y[1, [i, 128 + i]], want, rtol=1e-3, atol=1e-4)


class ExactNet(nn.Module):
    """Says exactly which noise leads from x0 to x_t. Stands in for HeadNet."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def forward(self, x_t, t, z):
        abar = torch.tensor([alpha_bar(int(i)) for i in t]).float()[:, None]
        return torch.cat([(x_t - abar.sqrt() * self.x0) / (1 - abar).sqrt(), torch.zeros_like(x_t)], dim=1)


@pytest.mark.parametrize("steps, t_max", [(1, 999), (10, 999), (10, 950)])
def test_exact_noise_gives_back_x0(head, steps, t_max):
    x0 = torch.randn(N, C)
    head.net = ExactNet(x0)
    x = head.sample(torch.zeros(N, D), steps=steps, t_max=t_max)
    torch.testing.assert_close(x, x0, rtol=1e-3, atol=1e-3)
    t = torch.tensor([1, 2, 100, 500, 900, 950])
    assert head.loss(x0, torch.zeros(N, D), t).max() < 0.1  # only the variance, v = 0, is not the best one


# ------------------------------------------------------------------------------------------------------------ loss

def parts(head, x, z, t, noise):
    """The network's noise, and the two Gaussians of the bound: q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t); t > 0."""
    a, previous = (torch.tensor([alpha_bar(int(i) - d) for i in t], dtype=torch.float64)[:, None] for d in (0, 1))
    beta = 1 - a / previous
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    eps, v = head.net(x_t.float(), t, z).double().chunk(2, dim=1)
    posterior = beta * (1 - previous) / (1 - a)
    mean = lambda x0: (beta * previous.sqrt() * x0 + (1 - previous) * (1 - beta).sqrt() * x_t) / (1 - a)
    variance = (beta.log() * (v + 1) / 2 + posterior.log() * (1 - v) / 2).exp()
    x0 = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    return eps, Normal(mean(x.double()), posterior.sqrt()), Normal(mean(x0), variance.sqrt())


def test_loss_is_noise_error_plus_bound(head):
    t = torch.tensor([1, 2, 50, 400, 700, 900])
    x, z, noise = torch.randn(N, C), torch.randn(N, D), torch.randn(N, C)
    eps, q, p = parts(head, x, z, t, noise)
    want = ((eps - noise) ** 2).mean(1) + kl_divergence(q, p).mean(1) / math.log(2)
    torch.testing.assert_close(head.loss(x, z, t, noise).double(), want, rtol=2e-3, atol=1e-4)


def test_loss_at_t0_is_a_discretised_likelihood(head):
    x = torch.tensor([[-1.0, 0.0, 1.0], [0.5, -0.5, 0.25]])
    z, noise, t = torch.randn(2, D), 0.5 * torch.randn(2, C), torch.zeros(2, dtype=torch.int64)
    a, s = alpha_bar(0), Schedule()
    x_t = math.sqrt(a) * x + math.sqrt(1 - a) * noise
    eps, v = head.net(x_t, t, z).chunk(2, dim=1)
    mean = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
    share = (v + 1) / 2  # of the posterior's variance at index 1, there being none at index 0
    p = Normal(mean.double(), (0.5 * (share * s.max_logvar[0] + (1 - share) * s.min_logvar[1])).exp().double())
    below, above = p.cdf(x - 1 / 255), 1 - p.cdf(x + 1 / 255)
    below, above = below.where(x > -0.999, 0), above.where(x < 0.999, 0)  # the outermost bins have no far side
    want = ((eps - noise) ** 2).mean(1) - (1 - below - above).log().mean(1) / math.log(2)
    torch.testing.assert_close(head.loss(x, z, t, noise).double(), want, rtol=0.02, atol=0.02)  # tanh for the CDF


def test_many_draws_of_a_row(head):
    """t [M, N]: as M calls, also where M * N is more than there are timesteps."""
    for M in (2, 300):
        x, z, t, noise = torch.randn(N, C), torch.randn(N, D), torch.randint(T, (M, N)), torch.randn(M, N, C)
        want = torch.stack([head.loss(x, z, t[m], noise[m]) for m in range(M)])
        torch.testing.assert_close(head.loss(x, z, t, noise), want)


def test_bound_does_not_train_the_noise(head):
    """The gradient on eps is that of the squared error alone; v gets one from the bound alone."""
    class Said(nn.Module):
        def forward(self, x_t, t, z):
            return said
    said = torch.randn(N, 2 * C, requires_grad=True)
    head.net, noise = Said(), torch.randn(N, C)
    head.loss(torch.randn(N, C), torch.randn(N, D), torch.tensor([0, 1, 10, 100, 500, 999]), noise).sum().backward()
    torch.testing.assert_close(said.grad[:, :C], 2 / C * (said[:, :C] - noise))
    assert (said.grad[:, C:] != 0).any(dim=1).all()


def test_new_head_predicts_nothing():
    head = DiffusionHead(HeadConfig(C, D, 2, 32))
    assert not head.net(torch.randn(N, C), torch.arange(N), torch.randn(N, D)).any()
    noise = torch.randn(N, C)
    loss = head.loss(torch.randn(N, C), torch.randn(N, D), torch.full((N,), 500), noise)
    assert ((loss - noise.pow(2).mean(1)) > 0).all()  # the bound of v = 0


def test_rows_do_not_see_each_other(head):
    x, z, noise, t = torch.randn(N, C), torch.randn(N, D), torch.randn(N, C), torch.arange(N) * 99
    alone = torch.cat([head.loss(x[i:i + 1], z[i:i + 1], t[i:i + 1], noise[i:i + 1]) for i in range(N)])
    torch.testing.assert_close(head.loss(x, z, t, noise), alone)


def test_fp32_under_autocast(head):
    x, z, t, noise = torch.randn(N, C), torch.randn(N, D), torch.arange(N) * 150, torch.randn(6, N, C)
    want, drawn = head.loss(x, z, t, noise[0]), head.sample(z, z.flip(0), 2.0, 5, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.net(x, t, z).dtype == torch.bfloat16  # else this test shows nothing
        got = head.loss(x, z, t, noise[0])
        assert got.dtype == torch.float32 and torch.equal(got, want)
        assert torch.equal(head.sample(z, z.flip(0), 2.0, 5, noise=noise), drawn)
        assert head.loss(x.bfloat16(), z.bfloat16(), t).dtype == torch.float32


def test_meta_device():
    with torch.device("meta"):
        head, x, z = DiffusionHead(HeadConfig(C, D, 2, 32)), torch.empty(N, C), torch.empty(N, D)
    with on_meta():
        assert head.net(x, torch.empty(N, dtype=torch.int64, device="meta"), z).shape == (N, 2 * C)
        assert head.loss(x, z).shape == (N,)
        assert head.sample(z, z, cfg=2.0, steps=3).shape == (N, C)


def test_learns_a_gaussian():
    """Tokens of mean +-2 by condition and standard deviation 0.5 in one channel, 1 in the other."""
    torch.manual_seed(0)
    head, std = DiffusionHead(HeadConfig(token_dim=2, cond_dim=1, depth=2, width=64)), torch.tensor([0.5, 1.0])
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 500)
        z = torch.randint(2, (256, 1)) * 2.0 - 1
        optimizer.zero_grad()
        head.loss(2 * z + std * torch.randn(256, 2), z).mean().backward()
        optimizer.step()
    for sign in (-1.0, 1.0):
        x = head.sample(torch.full((2000, 1), sign), steps=50, t_max=950)
        torch.testing.assert_close(x.mean(0), torch.full((2,), 2 * sign), rtol=0, atol=0.2)
        torch.testing.assert_close(x.std(0), std, rtol=0.2, atol=0)
