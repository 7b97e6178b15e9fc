"""What a GPU would find wrong, found without one: dtypes under bf16 autocast, and tensors on the wrong device.

bf16. All stages and sampling run under bf16 autocast on the CPU. A tensor whose dtype does not fit fails there as it
would on a GPU.

Devices. FakeGPU treats PyTorch's meta device, whose tensors have no values, as if it were a GPU. It refuses every read
of a value, because the host would wait for the GPU, and every tensor or generator that names no device.

tests/test_cuda.py has the tests that need a real GPU.
"""
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import fast
import sample
import train
from diffloss import DiffusionHead, HeadConfig
from fusion import FUSIONS
from generator import Generator
from prior import Prior, PriorConfig
from runtime import World
from test_generator import B, C, CONFIG, L, batch, generators, make, relative  # noqa: F401 (batch is a fixture)
from test_tokenizers import KL_LINEAR, KL_SMALL, VQ_LINEAR, VQ_SMALL
from test_tokenizers import make as make_tokenizer
from test_tokenizers import toys
from test_train import command, log
from tokenizers import KL

every_fusion = pytest.mark.parametrize("fusion", FUSIONS)
META, FAKE_SEED = torch.device("meta"), 271828182845


# ------------------------------------------------------------------------------------------------- bf16 on the CPU

def bf16(device=None):
    """In the place of runtime.autocast, which keeps the CPU in fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def dtypes(model):
    """-> a dictionary that every later call of a Linear layer of `model` fills: its name to its results' dtypes."""
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, x, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    return seen


def assert_head_in_fp32(seen):
    """All of the head computes in fp32; the layers around it in bf16, else the test shows nothing."""
    head = {name for name in seen if name.startswith("head.")}
    assert len(head) > 5 and all(seen[name] == {torch.float32} for name in head)
    assert all(seen[name] == {torch.bfloat16} for name in seen.keys() - head) and len(seen) > len(head)


@every_fusion
def test_generator_in_bf16(fusion, batch):
    """Loss, gradients and sampling, plain and fast: near fp32, and the head in fp32."""
    model, (latents, classes, codes, _) = make(fusion), batch
    draws, seen = model.draw(B, uniform=0.3), dtypes(model)
    plain = lambda: model.loss(latents, classes, codes, draws.mask, draws.t, draws.noise, draws.drop)
    quick = lambda: fast.loss(model, latents, classes, codes, draws)
    draw = lambda loop: loop(model, classes, codes, 4, 3, 2.0, generator=generators(B), t_max=900)
    want, drawn = plain().item(), draw(Generator.generate)
    seen.clear()
    with bf16():
        losses = plain(), quick()
        samples = draw(Generator.generate), draw(fast.generate)
    assert_head_in_fp32(seen)
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=0.01)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
                   if p.grad is not None)
    for x in samples:
        assert x.dtype == torch.float32 and relative(x, drawn) < 0.2


def test_prior_in_bf16():
    """Loss, gradients, resampling, and both loops, which draw the same codes but where rounding decides."""
    torch.manual_seed(0)
    model = Prior(PriorConfig(dim=64, layers=2, heads=2, vocab=40, grid=4, classes=5)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.3)
    codes, classes, uniform = torch.randint(40, (B, L)), torch.arange(B), torch.rand(2, B, L)
    want = model.loss(codes, classes).item()
    with bf16():
        loss = model.loss(codes, classes, torch.tensor([True, False, False]))
        near = model.loss(codes, classes)
        mixed = model.mixture(codes, classes, 0.5, uniform)
        drawn = [loop(classes, 2.0, top_k=9, top_p=0.9, generator=generators(B))
                 for loop in (model.generate, partial(fast.generate_codes, model))]
    loss.backward()
    assert loss.dtype == torch.float32 and near.item() == pytest.approx(want, rel=0.01)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert mixed.shape == codes.shape and (drawn[0] == drawn[1]).float().mean() > 0.5


@pytest.mark.parametrize("config", [VQ_SMALL, VQ_LINEAR, KL_SMALL, KL_LINEAR])
def test_tokenizers_in_bf16(config):
    """Losses and gradients, encoding and decoding."""
    model, images = make_tokenizer(config), toys(2)
    draws = (model.draw(2, 32 // model.stride),) if isinstance(model, KL) else ()
    want = model.loss(images, *draws)[0].item()
    with bf16():
        loss, reconstruction = model.loss(images, *draws)
        latents = model.sample(model.encode(images)) if draws else model.encode(images)
        assert model.decode(latents).shape == reconstruction.shape == images.shape
        if not draws:  # the nearest vector is found in fp32
            assert {x.dtype for x in model._quantize(images)} == {torch.float32, torch.int64}
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want, rel=0.03)
    assert latents.dtype == (torch.float32 if draws else torch.int64)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_every_stage_and_sampling_in_bf16(toy, copy_run, works, monkeypatch, tmp_path):
    """The scripts: three steps of each stage with pictures, on codes that the prior resamples, then sample.py."""
    run = copy_run()
    monkeypatch.setattr(train, "autocast", bf16)
    monkeypatch.setattr(sample, "autocast", bf16)
    for stage, more in ((0, ("--batch", 8)), (1, ()), (2, ("--condition", "mixed:0.5"))):
        where = run if stage else str(tmp_path / "tokenizers")  # the cache belongs to the tokenizers of the toy run
        works(*command(toy, stage, where, 3, *more, "--grid-every", 3, "--fresh"))
        assert all(r["loss"] is not None and r["skipped"] == 0 for r in log(where, stage))
    args = "sample", "--run", run, "--class", 3, "--num", 2, "--iterations", 3, "--steps", 4
    for more in ((), ("--plain",)):
        works(*args, *more, "--out", tmp_path / "a.png")
    works(*args, "--out", tmp_path / "b.png", "--like", tmp_path / "a.png")


# ------------------------------------------------------------------------------------------------------ a fake GPU

class FakeGPU(TorchDispatchMode):
    """The meta device as a GPU, for code under `with`. A meta tensor by itself refuses .item(), bool, int, .cpu(), and
    selection by a mask. This class also refuses copies from the host, and tensors and generators of another device.
    """

    def __init__(self, copies=False):
        super().__init__()
        self.active, self.copies = True, copies  # copies: those from the host are allowed, as for a batch of data

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copy = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if not self.active or copy and self.copies:
            return out
        given, made = devices(args), devices([out])
        if copy:
            assert len({x.type for x in given + made}) == 1, f"{func} copies from the host, which waits"
        elif given:
            mixed = {x.type for x in devices(args, scalars=False)}  # a GPU takes a scalar of the host
            assert len(mixed) < 2, f"{func} mixes devices {mixed}"
        else:
            generator = (kwargs or {}).get("generator")  # one of the host says that the tensor is for the host
            named = [META] if generator is None else lives_on(generator)
            assert not made or made == named, f"{func} makes a tensor on {made}, not {named}"
        return out


def devices(values, scalars=True):
    """The devices of the tensors among values, and of those in lists among them."""
    every = [x for v in values for x in (v if isinstance(v, (list, tuple)) else [v])]
    return [x.device for x in every if isinstance(x, torch.Tensor) and (scalars or x.ndim)]


def numbers(n=None):
    """A generator of the fake GPU, known by its seed, or a list of n. PyTorch has no generator for meta tensors."""
    return torch.Generator().manual_seed(FAKE_SEED) if n is None else [numbers() for _ in range(n)]


def lives_on(generator):
    return [META if generator.initial_seed() == FAKE_SEED else generator.device]


@contextmanager
def fake_gpu(**options):
    """Code run in here takes the meta device for a GPU, as FakeGPU says."""
    def tensor(values, *args, device=None, **kwargs):  # its copy from the host is hidden from FakeGPU
        assert device is None or torch.device(device).type == "cpu", f"torch.tensor({values}) copies from the host"
        return make_tensor(values, *args, device=device, **kwargs)

    make_tensor = torch.tensor
    with pytest.MonkeyPatch.context() as patch, FakeGPU(**options) as gpu:
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # knows no meta device
        patch.setattr(torch, "tensor", tensor)
        yield gpu


@pytest.mark.parametrize("mistake", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: int(x[0]), lambda x: x.cpu(), lambda x: x.tolist(),
    lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.zeros(3), lambda x: torch.arange(3),
    lambda x: x + torch.zeros(3), lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
    lambda x: torch.tensor(2.0, device=x.device), lambda x: x.new_tensor([1.0]).to("cpu"),
    lambda x: torch.rand(3, generator=torch.Generator(), device=x.device),
    lambda x: torch.rand(3, generator=numbers())])
def test_fake_gpu_refuses(mistake):
    x = torch.empty(3, device=META)
    with fake_gpu():
        x.sum() + 2.0 * torch.rand(3, generator=numbers(), device=META)  # nothing wrong with these
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError, AttributeError)):
            mistake(x)


def test_fake_gpu_refuses_copies_from_the_host():
    host = torch.zeros(3)
    with fake_gpu(), pytest.raises(AssertionError, match="copies from the host"):
        host.to(META)
    with fake_gpu(copies=True):
        assert host.to(META).is_meta


def conditions():
    """latents, classes and codes of B images on the fake GPU."""
    return (torch.empty(B, L, C, device=META), torch.zeros(B, dtype=torch.int64, device=META),
            torch.zeros(B, L, dtype=torch.int64, device=META))


@every_fusion
def test_generator_on_a_fake_gpu(fusion):
    """Draws, loss and gradients of a training step; sampling with every option that does not depend on a picture."""
    with META:
        model, (latents, classes, codes) = Generator(replace(CONFIG, fusion=fusion)), conditions()
    steps = [2, 3]
    with fake_gpu():
        draws = model.draw(2 * B, numbers(), uniform=0.4).part(slice(B, 2 * B))
        fast.loss(model, latents, classes, codes, draws).backward()
        x = fast.generate(model, classes, codes, 2, steps, 3.0, generator=numbers(B), t_max=900, cfg_from=1.5,
                          null=fast.prepare_null(model), watch=lambda x: None)
        assert x.shape == latents.shape and x.is_meta
        assert fast.generate(model, classes, codes, 1, 2, 1.0, "constant", 0.9, t_max=900).shape == latents.shape


def test_head_on_a_fake_gpu():
    with META:
        head, x, z = DiffusionHead(HeadConfig(C, 8, 2, 32)), torch.empty(6, C), torch.empty(6, 8)
    with fake_gpu():
        head.loss(x, z).sum().backward()
        t, noise = torch.zeros(4, 6, dtype=torch.int64, device=META), torch.empty(4, 6, C, device=META)
        assert head.loss(x, z, t, noise).shape == (4, 6)
        assert head.sample(z, z, 2.0, 3, generator=numbers()).shape == x.shape
        assert fast.sample_head(head, z, z, 2.0, 3, generator=numbers()).shape == x.shape
        assert fast.sample_head(head, z, steps=3, temperature=0.9).shape == x.shape


def test_prior_on_a_fake_gpu():
    with META:
        model = Prior(PriorConfig(dim=64, layers=2, heads=2, vocab=40, grid=4, classes=5))
        _, classes, codes = conditions()
        uniform = torch.empty(2, B, L)
    with fake_gpu():
        model.loss(codes, classes, model.draw(2 * B, numbers())[:B]).backward()
        assert model.mixture(codes, classes, 0.5, uniform).shape == codes.shape
        for loop in (model.generate, partial(fast.generate_codes, model)):
            assert loop(classes, 2.0, 0.9, 3, 0.9, numbers(B), given=codes, watch=lambda: None).shape == codes.shape
            assert loop(classes, generator=numbers()).is_meta


def test_tokenizers_on_a_fake_gpu():
    for config in (VQ_LINEAR, replace(KL_LINEAR, merge=2, noise=0.5)):
        with META:
            model, images = make_tokenizer(config), torch.empty(2, 3, 32, 32)
        with fake_gpu():
            if isinstance(model, KL):
                draws = [x[:2] for x in model.draw(4, 32 // model.stride, numbers())]
                model.loss(images, draws)[0].backward()
                assert model.decode(model.sample(model.encode(images), generator=numbers())).shape == images.shape
            else:
                model.loss(images)[0].backward()
                assert model.decode(model.encode(images)).shape == images.shape


class TwoSteps(Exception):
    """Ends train.py at its second step: what follows writes files, which meta tensors cannot."""


@pytest.mark.parametrize("stage, more", [(0, ()), (1, ()), (2, ("--condition", "mixed:0.5")), (2, ("--accumulate", 2))])
def test_training_loop_on_a_fake_gpu(toy, copy_run, script, monkeypatch, stage, more):
    """train.py's own loop: a step reads no value from the device, from the copy of its batch to its EMA."""
    run, steps, load = copy_run(*("vq", "kl", "prior")[:stage + 1] if stage else ()), [], checkpoints.load_model
    trains, gpu = train.STAGES[stage], SimpleNamespace()
    to, forward = trains.to, trains.forward

    def to_fake_gpu(self, device):  # all models were built and loaded on the CPU, where their checksums can be read
        for model in self.frozen.values():
            model.to(device)
        return to(self, device)

    def forward_on_fake_gpu(self, *args):
        gpu.active = True
        return forward(self, *args)

    def step_unless(bad, optimizer):  # in the place of the optimizer's step, which PyTorch lacks for meta tensors
        steps.append(bad.device)
        if len(steps) == 2:
            raise TwoSteps

    def fake_rng(device, *key):
        return numbers() if torch.device(device).type == "meta" else rng(device, *key)

    rng = train.rng
    monkeypatch.setattr(train, "setup", lambda device: World(META))
    monkeypatch.setattr(train, "step_unless", step_unless)
    monkeypatch.setattr(train, "rng", fake_rng)
    monkeypatch.setattr(checkpoints, "load_model", lambda path, kind, device: load(path, kind, "cpu"))
    monkeypatch.setattr(trains, "to", to_fake_gpu)
    monkeypatch.setattr(trains, "forward", forward_on_fake_gpu)
    with fake_gpu(copies=True) as gpu:
        gpu.active = False
        result = script(*command(toy, stage, run, 9, *more, "--log-every", 9))
    assert steps == [META] * 2, result.err
