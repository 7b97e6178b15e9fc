"""Everything that runs on a CUDA GPU, compared with the CPU. Where there is no GPU, every test here is skipped.

    python -m pytest -m cuda

It takes a few minutes on one GPU; where there are two, it also trains on both. Each comparison prints its error beside
the bound. All other test runs hide the GPUs (conftest.py), because the other tests are written for the CPU.

    D2C_TEST_DEVICE=cpu python -m pytest -m cuda      # a rehearsal: the CPU takes the place of the GPU

The rehearsal shows that the tests themselves are free of mistakes. It skips what only CUDA has: graphs, memory, NCCL.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from statistics import mean

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_map_only

import diffloss
import fast
import runtime
import sample
import test_golden
from conftest import ROOT
from diffloss import DiffusionHead, HeadConfig
from faults import Watch
from fusion import FUSIONS
from generator import Generator, GeneratorConfig, masked_counts
from presets import PRESETS
from prior import Prior, PriorConfig
from test_diffloss import wake
from test_train import command, log, losses
from tokenizers import KL, VQ, KLConfig, VQConfig

DEVICE = torch.device(os.environ.get("D2C_TEST_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason=(
    "needs a CUDA GPU; there, run python -m pytest -m cuda"))]
cuda_only = pytest.mark.skipif(not CUDA, reason="only CUDA has this")
compiles = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "gcc")), reason="torch.compile needs a C compiler")
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)

# Bounds of relative errors ||a - b|| / ||b||, in fp32 without TF32 (`exact`) against the CPU.
FP32, LOOP = 1e-4, 3e-4   # forward and backward passes; sampling loops, whose first reverse steps amplify rounding
# The bounds below are guesses from a CPU; no GPU has run these tests yet. To measure them, run this file on a GPU, set
# each bound to twice the largest error that the tests print beside it, and replace this comment by the name of the GPU.
BF16_LOSS, BF16_GRADIENT, BF16_LATENTS = 0.01, 0.03, 0.05   # bf16 and TF32 as in training, against fp32 on the CPU
BF16_TOKENIZER = 0.4                  # the gradient of a tokenizer: bf16 moves some codes of VQ to another vector
COMPILED, SAME_CURVE = 1e-3, 0.02     # compiled blocks against eager ones; losses of one training run in two ways
PIXELS = 0.5                          # mean difference of two pictures, in levels of 255
PEAK_GB, PEAK_DEVIATION = 36, 0.2     # a training step of D2C-B, a pass of 32 images: computed (docs/speed.md)

VQ_CONFIG = VQConfig(ch=64, ch_mult=(1, 2), z_channels=64, codebook_size=64)  # few codes: rounding decides about none
KL_CONFIG = KLConfig(ch=64, ch_mult=(1, 2), decoder_attention=True)
PRIOR_CONFIG = PriorConfig(dim=192, layers=4, heads=3, vocab=512, grid=8, classes=10)
CONFIG = dict(dim=192, depth=3, heads=3, prefix=8, token_dim=16, grid=8, classes=10, head_depth=3, head_width=256,
              batch_mul=2, dropout=0.0, vocab=512, code_dim=192, queries=4, qformer_width=128, qformer_layers=2,
              qformer_heads=2)
B, L, C = 4, 64, 16


def relative(a, b):
    a, b = (x.detach().double().cpu() for x in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.fixture
def check(capsys, request):
    """check(what, error, bound): prints the error; at its end the test fails if an error was not below its bound."""
    def check(what, error, bound):
        with capsys.disabled():
            print(f"\n    {request.node.name}: {what}: {error:.1e}, bound {bound:.1e} ", end="", flush=True)
        if not error < bound:
            failed.append(f"{what}: {error:.2e}, {bound:.0e} allowed")
    failed = []
    yield check
    assert not failed, "; ".join(failed)


@contextmanager
def exact():
    """fp32 everywhere: no TF32, and no autocast in sample.py."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (diffloss, fast):
            patch.setattr(module, "tf32", lambda allowed=True: nullcontext())
        patch.setattr(sample, "autocast", lambda device: nullcontext())
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


def autocast():
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)


def to_device(values):
    """Moves all tensors in nested lists and dictionaries to the GPU."""
    return tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), values)


# ------------------------------------------------------------------------------------------------------- components
# Each function returns a model with random weights, a function of it and of tensors that is its loss, and the tensors.

def tokenizer(config):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    if isinstance(config, VQConfig):
        return VQ(config), lambda vq, x: vq.loss(x)[0], [images]
    kl = KL(config)
    return kl, lambda kl, x, *draws: kl.loss(x, draws)[0], [images, *kl.draw(2, 32 // kl.stride)]


def prior():
    tensors = [torch.randint(512, (B, L)), torch.arange(B), torch.arange(B) == 1]  # codes, classes, drop
    return Prior(PRIOR_CONFIG), Prior.loss, tensors


def head():
    tensors = [torch.randn(500, C), torch.randn(500, 192), torch.randint(1000, (500,)), torch.randn(500, C)]
    return DiffusionHead(HeadConfig(C, 192, 3, 256)), lambda head, *tensors: head.loss(*tensors).mean(), tensors


def make_generator(fusion):
    torch.manual_seed(0)
    return wake(Generator(GeneratorConfig(fusion, **CONFIG)), 0.02)


def given():
    """latents, classes, one of them null, and codes."""
    return [torch.randn(B, L, C), torch.tensor([0, 5, 9, 10]), torch.randint(512, (B, L))]


def generator(fusion, form):
    model = make_generator(fusion)
    draws = model.draw(B, uniform=0.3)
    plain = lambda m, x, y, q, drop, mask, t, noise: m.loss(x, y, q, mask, t, noise, drop)
    quick = lambda m, x, y, q, *numbers: fast.loss(m, x, y, q, type(draws)(*numbers, None, None, draws.masked))
    return model, plain if form == "plain" else quick, [*given(), *draws[:4]]


COMPONENTS = {
    "VQ": lambda: tokenizer(VQ_CONFIG), "VQ, linear path": lambda: tokenizer(PRESETS["toy"].vq),
    "KL": lambda: tokenizer(KL_CONFIG), "KL, linear path": lambda: tokenizer(PRESETS["toy"].kl),
    "prior": prior, "head": head,
    **{f"{fusion}, {form}": lambda fusion=fusion, form=form: generator(fusion, form)
       for fusion in FUSIONS for form in ("plain", "fast")}}


def loss_and_gradient(model, loss, tensors, device):
    """-> the loss, and the gradient of all parameters as one vector, computed on a device."""
    model = deepcopy(model).to(device)
    value = loss(model, *(x.to(device) for x in tensors))
    value.backward()
    assert value.dtype == torch.float32 and value.device.type == device.type
    return value, torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", COMPONENTS)
def test_forward_and_backward(name, check):
    torch.manual_seed(0)
    model, loss, tensors = COMPONENTS[name]()
    component = wake(model, 0.02), loss, tensors
    want, slopes = loss_and_gradient(*component, torch.device("cpu"))
    with exact():
        got, gradient = loss_and_gradient(*component, DEVICE)
    check("fp32 loss", relative(got, want), FP32)
    check("fp32 gradient", relative(gradient, slopes), FP32)
    with autocast():
        got, gradient = loss_and_gradient(*component, DEVICE)
    check("bf16 loss", relative(got, want), BF16_LOSS)
    check("bf16 gradient", relative(gradient, slopes), BF16_TOKENIZER if name[:2] in ("VQ", "KL") else BF16_GRADIENT)


def test_tokenizers_encode_and_decode(check):
    torch.manual_seed(0)
    images = torch.rand(B, 3, 32, 32) * 2 - 1
    vq, kl = wake(VQ(VQ_CONFIG)), wake(KL(KL_CONFIG))
    codes, moments, latents = vq.encode(images), kl.encode(images), torch.randn(B, 256, 16)
    on_gpu = [deepcopy(m).to(DEVICE) for m in (vq, kl)]
    with exact():
        check("codes that differ", (on_gpu[0].encode(images.to(DEVICE)).cpu() != codes).float().mean().item(), 0.01)
        check("decoded codes", relative(on_gpu[0].decode(codes.to(DEVICE)), vq.decode(codes)), FP32)
        check("moments", relative(on_gpu[1].encode(images.to(DEVICE)), moments), FP32)
        check("decoded latents", relative(on_gpu[1].decode(latents.to(DEVICE)), kl.decode(latents)), FP32)


def test_head_computes_in_fp32():
    """Under autocast: every layer of the head in the loss and in both samplers; the blocks around it are in bf16."""
    model, (latents, classes, codes), seen = make_generator("qformer").to(DEVICE), to_device(given()), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, x, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    with autocast():
        fast.loss(model, latents, classes, codes, model.draw(B, uniform=0.5)).backward()
        for loop in (Generator.generate, fast.generate):
            assert loop(model, classes, codes, 2, 2, 2.0).dtype == torch.float32
    in_head = {name: kinds for name, kinds in seen.items() if name.startswith("head.")}
    assert len(in_head) > 10 and all(kinds == {torch.float32} for kinds in in_head.values())
    assert seen["encoder_blocks.0.qkv"] == seen["decoder_blocks.2.fc2"] == {torch.bfloat16}


@pytest.mark.parametrize("test", ["vq", "kl", "prior_forward", "prior_greedy", "generator_forward", "head_loss",
                                  "head_net", "head_sample", "decoding_loop"])
def test_golden_vectors(test, tmp_path, monkeypatch):
    """test_golden.py with models and recorded tensors on the GPU, whose convolutions round more than the CPU's."""
    models = {"prior": (Prior, dict(heads=4, grid=4)), "generator": (Generator, dict(heads=4))}
    read = test_golden.golden
    kind = None if test in ("vq", "kl") else "prior" if test.startswith("prior") else "generator"
    monkeypatch.setattr(test_golden, "golden", lambda name: to_device(read(name)))
    monkeypatch.setattr(test_golden, "FORWARD", FP32)
    with exact(), torch.device(DEVICE):  # models are built where new tensors are
        argument = test_golden.official(tmp_path, kind, kind, models[kind][0], **models[kind][1]) if kind else tmp_path
        getattr(test_golden, f"test_{test}")(argument)


def test_inception_features(check, tmp_path):
    """fid.py's features, logits and resizes, with random weights."""
    from inception import Inception
    from rule_inception import rule_weights
    torch.save(rule_weights(), tmp_path / "rule.pth")
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for resize in ("tf1", "torch"):
        model = Inception(str(tmp_path / "rule.pth"), resize)
        want = model(images)
        got = model.to(DEVICE, memory_format=torch.contiguous_format)(images.to(DEVICE))
        for name in want:
            check(f"{resize}, {name}", relative(got[name], want[name]), FP32)


# --------------------------------------------------------------------------------------------------------- sampling

def draw(loop, model, device=DEVICE, cfg=3.0, **options):
    """Latents of four images after 8 iterations of 10 steps; every device gets the same orders and noise."""
    torch.manual_seed(1)
    _, classes, codes = given()
    counts, orders = [L] + masked_counts(L, 8), torch.rand(B, L).argsort(1)
    noise = [torch.randn(11, B * (a - b), C).to(device) for a, b in zip(counts, counts[1:])]
    return loop(model, classes.to(device), codes.to(device), 8, 10, cfg, orders=orders.to(device), noise=noise,
                **options)


@every_fusion
def test_sampling(fusion, check):
    """The CPU's latents: plain and fast in fp32, and fast in bf16 as sample.py calls it."""
    model = make_generator(fusion)
    want = draw(fast.generate, model, torch.device("cpu"))
    model.to(DEVICE)
    with exact():
        check("plain", relative(draw(Generator.generate, model), want), LOOP)
        check("fast", relative(draw(fast.generate, model), want), LOOP)
    with autocast():
        check("bf16", relative(draw(fast.generate, model), want), BF16_LATENTS)


@cuda_only
@every_fusion
def test_graphs(fusion):
    """CUDA graphs give the eager result to the bit: when they record, when they replay, and with changed weights."""
    model, graphs = make_generator(fusion).to(DEVICE), fast.Graphs()
    with torch.inference_mode(), autocast():
        for cfg in (3.0, 2.0, 1.0):
            assert torch.equal(draw(fast.generate, model, cfg=cfg, graphs=graphs), draw(fast.generate, model, cfg=cfg))
        for p in model.head.parameters():
            p.mul_(1.01)
        assert torch.equal(draw(fast.generate, model, graphs=graphs), draw(fast.generate, model))


@compiles
def test_compiled_blocks(check, monkeypatch):
    model = make_generator("cross_attention").to(DEVICE)
    monkeypatch.setattr(fast, "run_block", fast.run_block)  # compile_blocks replaces it
    with exact():
        want = draw(fast.generate, model)
        fast.compile_blocks()
        check("compiled", relative(draw(fast.generate, model), want), COMPILED)


def test_codes():
    """The prior draws the same codes on both devices and by both loops, but for those that rounding decides."""
    torch.manual_seed(0)
    model, numbers = wake(Prior(PRIOR_CONFIG)), torch.rand(B, L)
    with pytest.MonkeyPatch.context() as patch, exact():
        for module in ("prior", "fast"):
            patch.setattr(f"{module}.uniform_numbers", lambda B, L, generator, device: numbers.to(device))
        want = fast.generate_codes(model, torch.arange(B), 2.0)
        model.to(DEVICE)
        for loop in (Prior.generate, fast.generate_codes):
            codes = loop(model, torch.arange(B, device=DEVICE), 2.0)
            assert (codes.cpu() == want).all(1).sum() >= B - 1  # codes that follow another code differ too


def picture(works, path, *flags):
    """sample.py's picture of weights/tiny, [H, W, 3]."""
    works("sample", "--class", "207", "--num", 4, "--out", path, *flags)
    return torch.from_numpy(np.array(Image.open(path))).float()


def test_sample_script(works, tmp_path, check, monkeypatch):
    """sample.py --device cuda draws the CPU's picture, if the CPU draws the random numbers of both."""
    on_host = lambda f: lambda *shape, generator=None, device=None: f(*shape, generator=generator).to(device)
    with monkeypatch.context() as patch, exact():
        patch.setattr(sample, "rng", lambda device, *key: runtime.rng("cpu", *key))
        for name in ("rand", "randn"):
            patch.setattr(torch, name, on_host(getattr(torch, name)))
        want = picture(works, tmp_path / "cpu.png", "--device", "cpu")
        for more in ((), ("--plain",)):
            got = picture(works, tmp_path / "gpu.png", "--device", DEVICE, *more)
            check(f"levels {' '.join(more)}", (got - want).abs().mean().item(), PIXELS)
    ours = picture(works, tmp_path / "own.png", "--device", DEVICE)
    assert ours.std() > 20  # bf16, and the GPU's own numbers: another picture, and not an empty one
    if CUDA:
        assert torch.equal(picture(works, tmp_path / "graphs.png", "--device", DEVICE, "--graphs"), ours)


# --------------------------------------------------------------------------------------------------------- training

@pytest.fixture
def train(toy, works, two_ranks, tmp_path):
    """train(stage, way, steps, *flags) -> the run and its losses; way: python, or a number of ranks under torchrun."""
    def train(stage, way, steps, *flags, run=None):
        run = run or str(tmp_path / f"run-{len(os.listdir(tmp_path))}")
        os.makedirs(run, exist_ok=True)
        for kind in ("vq", "kl", "prior")[:(0, 2, 3)[stage]]:
            shutil.copy(f"{toy.run}/{kind}.pt", run)
        args = *command(toy, stage, run, steps, *flags), "--device", DEVICE
        works(*args) if way == "python" else two_ranks(*args, ranks=way)
        return run, losses(run, stage)
    return train


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_trains(stage, train, check):
    """The loss falls in 20 steps. torchrun, --shard (NCCL also on one GPU) and two GPUs give the same losses."""
    ways = [(1,)] + [(1, "--shard")] * (stage > 0)
    if not CUDA or torch.cuda.device_count() > 1:
        ways += [(2,)] + [(2, "--shard")] * (stage > 0)
    batch = "--batch", (64, 16, 16)[stage]  # stage 0 begins at a good fit: more images, so that few steps show a fall
    _, want = train(stage, "python", 20, *batch)
    assert mean(want[-5:]) < mean(want[:5]), want
    for ranks, *flags in ways:
        _, got = train(stage, ranks, 20, *batch, *flags)
        check(f"{ranks} {' '.join(flags)}", relative(torch.tensor(got), torch.tensor(want)), SAME_CURVE)


@pytest.mark.parametrize("flags", [("--recompute",), ("--accumulate", 2), pytest.param(("--compile",),
                                                                                                  marks=compiles)])
def test_flags_of_training_keep_the_losses(flags, train, check):
    _, want = train(2, "python", 4, "--condition", "resampled")
    _, got = train(2, "python", 4, "--condition", "resampled", *flags)
    check(flags[0], relative(torch.tensor(got), torch.tensor(want)), SAME_CURVE)


def test_resumes_after_sigterm(toy, train, tmp_path):
    """A real process gets the signal, saves and ends; the same command goes on from that step."""
    run, _ = train(2, "python", 1, run=str(tmp_path / "run"))
    args = map(str, (*command(toy, 2, run, 100_000), "--device", DEVICE))
    script = f"{ROOT / next(args)}.py"
    process = subprocess.Popen([sys.executable, script, *args], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(log(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    step = log(run)[-1]["step"]
    assert process.returncode == 128 + signal.SIGTERM and f"stopped after step {step}" in said.replace(",", ""), said
    train(2, "python", step + 2, run=run)
    assert [r["step"] for r in log(run)[-3:]] == [step, step + 1, step + 2] and all(losses(run))


@contextmanager
def no_waiting():
    """-> a function that switches on, or off, an error for everything that makes the host wait for the GPU."""
    mode = torch.cuda.set_sync_debug_mode if CUDA else lambda mode: None
    try:
        yield lambda on: mode("error" if on else "default")
    finally:
        mode("default")


@pytest.mark.parametrize("stage, flags", [(0, ()), (1, ()), (2, ("--condition", "resampled")), (2, ("--accumulate", 2)),
                                          (2, ("--recompute",))])
def test_steps_never_wait_for_the_gpu(stage, flags, train):
    """From the end of the third optimizer step to the end of the ninth; logs, saves and pictures may wait."""
    seen = []
    with no_waiting() as forbid:
        def after_step(*_):
            seen.append(1)
            forbid(3 <= len(seen) < 9)
        hook = register_optimizer_step_post_hook(after_step)
        try:
            train(stage, "python", 12, *flags, "--log-every", 12)
        finally:
            hook.remove()
    assert len(seen) == 12


@every_fusion
def test_sampling_never_waits_for_the_gpu(fusion):
    """From the end of the first iteration to the end of the last, at a second call: the first copies constants."""
    model, (_, classes, codes) = make_generator(fusion).to(DEVICE), to_device(given())
    with torch.inference_mode(), autocast(), no_waiting() as forbid:
        for forbidden in (False, True):
            fast.generate(model, classes, codes, 8, 5, 3.0, watch=lambda x: forbid(forbidden))


def test_drawing_codes_never_waits_for_the_gpu():
    model, classes = Prior(PRIOR_CONFIG).to(DEVICE).eval(), torch.arange(B, device=DEVICE)
    with torch.inference_mode(), autocast(), no_waiting() as forbid:
        for forbidden in (False, True):
            fast.generate_codes(model, classes, 2.0, 0.9, 100, 0.9, watch=lambda: forbid(forbidden))


def test_ddp_on_nccl(tmp_path):
    """What several ranks use, in a group of one: collectives, DDP, and the two groups of Watch."""
    dist.init_process_group("nccl" if CUDA else "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        world, x = runtime.World(torch.device("cuda:0" if CUDA else "cpu"), 0, 2), torch.arange(3.0, device=DEVICE)
        runtime.agree({"a": 1}, "a value"), runtime.barrier(), runtime.broadcast(x)
        assert runtime.all_mean(x).tolist() == [0, 1, 2] and runtime.gather("a") == ["a"]
        model = nn.Linear(3, 1).to(DEVICE)
        spread = runtime.spread(model, nn.ModuleDict({"a": deepcopy(model)}), world, False, ())
        spread(x).sum().backward()
        assert model.weight.grad.tolist() == [[0, 1, 2]]
        watch, one = Watch(world), torch.ones((), device=DEVICE)
        assert watch.bad(one, [one]) == 0 and watch.bad(one * float("nan"), [one]) == 1
        assert watch.report() == (1.0, 1, 1) and watch.asked_to_stop() == 0
        watch.close()
    finally:
        dist.destroy_process_group()


@cuda_only
def test_peak_memory(check):
    """One training step of D2C-B on 32 images takes about the computed memory."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 1.3e9 * PEAK_GB:
        pytest.skip(f"needs {1.3 * PEAK_GB:.0f} GB of GPU memory that is free")
    with torch.device(DEVICE):
        frozen, model = Prior(PRESETS["d2c-b"].prior).eval(), Generator(PRESETS["d2c-b"].generator)
        codes, classes = torch.randint(16384, (32, 256)), torch.randint(1000, (32,))
        latents = torch.randn(32, 256, 16)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer, ema = torch.optim.AdamW(learning, lr=1e-6, fused=True), [p.detach().clone() for p in learning]
    for _ in range(2):  # Adam's moments exist from the first step on
        torch.cuda.reset_peak_memory_stats()
        draws = model.draw(32, uniform=0.5)
        with autocast():
            drawn = frozen.mixture(codes, classes, 0.0, draws.code_uniform)
            fast.loss(model, latents, classes, drawn, draws).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, learning, 1e-4)
    peak = torch.cuda.max_memory_allocated() / 1e9
    check(f"{peak:.1f} GB instead of {PEAK_GB}", abs(peak / PEAK_GB - 1), PEAK_DEVIATION)
