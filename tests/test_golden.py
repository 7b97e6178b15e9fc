"""Agreement with the official code: its recorded inputs and outputs, through our loaders (CPU, fp32).

The tolerance is relative, ||a-b|| / ||b||: 1e-5 for forwards, 3e-4 for sampling loops, whose first reverse steps
amplify rounding some hundred times (a float64 replay of the official code differs by 3e-5). Codes and indices are
equal.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoints
from diffloss import T, Schedule, spaced_timesteps
from generator import Generator
from prior import Prior, filter_logits
from tokenizers import KL, VQ

GOLDEN = Path(__file__).parent / "golden"
FORWARD, LOOP = 1e-5, 3e-4


def close(a, b, tolerance):
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).norm() / b.norm())
    assert error < tolerance, f"relative error {error:.2e}, {tolerance:.0e} allowed"


def golden(name):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def official(tmp_path, name, kind, module, **config):
    """The recorded checkpoint's raw weights, written as an official file and read back by our loader."""
    g = golden(name)
    torch.save({k: v for k, v in g["checkpoint"].items() if k not in checkpoints.EMA}, tmp_path / f"{kind}.pt")
    c, state = checkpoints.load(str(tmp_path / f"{kind}.pt"), kind)
    model = module(replace(c, **config))
    model.load_state_dict(state)
    return g, model.eval()


def test_vq(tmp_path):
    g, vq = official(tmp_path, "vq", "vq", VQ)
    assert (vq.config.ch, vq.config.ch_mult, vq.config.z_channels, vq.config.codebook_size) == (32, (1, 2), 32, 64)
    assert torch.equal(vq.encode(g["image"]), g["indices"])
    close(vq.decode(g["indices"]), g["decoded"], FORWARD)


def test_kl(tmp_path):
    g, kl = official(tmp_path, "kl", "kl", KL)
    assert kl.config.scale == 0.2325 and kl.config.encoder_attention and not kl.config.decoder_attention
    moments = kl.encode(g["image"])
    close(moments, g["moments"], FORWARD)
    latents = kl.sample(moments, noise=torch.zeros_like(g["mean"]))
    close(latents, g["mean"].flatten(2).mT * 0.2325, FORWARD)
    close(kl.sample(moments, noise=torch.ones_like(g["mean"])) - latents, g["std"].flatten(2).mT * 0.2325, FORWARD)
    close(kl.decode(latents), g["decoded_mean"], FORWARD)


@pytest.fixture
def prior(tmp_path):
    return official(tmp_path, "prior", "prior", Prior, heads=4, grid=4)


def test_prior_forward(prior):
    g, model = prior
    close(model(g["tokens"], g["classes"]), g["logits"], FORWARD)
    close(model(g["tokens"], torch.full_like(g["classes"], model.config.classes)), g["logits_null_class"], FORWARD)


def test_prior_greedy(prior):
    g, model = prior
    assert torch.equal(model.generate(g["classes"], cfg=1.0, top_k=1), g["greedy_cfg1"])
    assert torch.equal(model.generate(g["classes"], cfg=2.5, top_k=1), g["greedy_cfg2_5"])


def test_prior_filters():
    g = golden("prior")
    for name, want in g["filtered"].items():
        k, p = (float(part.split("=")[1]) for part in name.split(","))
        assert torch.equal(filter_logits(g["filter_input"], int(k), p), want), name


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_prior_containers(tmp_path, container):
    state = {**golden("prior")["checkpoint"]["model"], "freqs_cis": torch.zeros(17, 8, 2)}
    torch.save({container: state, "args": argparse.Namespace(x=1)} if container else state, tmp_path / "prior.pt")
    config, loaded = checkpoints.load(str(tmp_path / "prior.pt"), "prior")
    assert (config.dim, config.layers, config.grid, config.classes) == (64, 2, 4, 10)
    Prior(config).load_state_dict(loaded)


@pytest.fixture
def generator(tmp_path):
    return official(tmp_path, "generator", "generator", Generator, heads=4)


def test_generator_forward(generator):
    g, model = generator
    visible = torch.cat([torch.ones(len(g["mask"]), model.fusion.prefix_rows), 1 - g["mask"]], dim=1).bool()
    close(model.encode(g["tokens"], model.fuse(g["classes"], None), visible), g["encoder_out"], FORWARD)
    close(model.hidden(g["tokens"], g["classes"], None, g["mask"]), g["z"], FORWARD)
    close(model.hidden(g["tokens"], torch.full_like(g["classes"], 10), None, g["mask"]), g["z_null_class"], FORWARD)


def test_head_loss(generator):
    g, model = generator
    x, z = g["tokens"].flatten(0, 1), g["z"].flatten(0, 1)
    close(model.head.loss(x, z, g["loss_t"], g["loss_noise"]), g["loss_per_token"], FORWARD)
    mask = g["mask"].flatten()
    close((g["loss_per_token"] * mask).sum() / mask.sum(), g["loss"], FORWARD)
    t, noise = g["loss_t"].view(1, 3, 16), g["loss_noise"].view(1, 3, 16, 4)
    close(model.loss(g["tokens"], g["classes"], None, g["mask"], t, noise), g["loss"], FORWARD)


def test_head_net(generator):
    g, model = generator
    abar = torch.tensor(Schedule().abar)[g["loss_t"]][:, None]
    x_t = (abar.sqrt() * g["tokens"].flatten(0, 1).double() + (1 - abar).sqrt() * g["loss_noise"].double()).float()
    close(model.head.net(x_t, g["loss_t"], g["z"].flatten(0, 1)), g["net_out"], FORWARD)


def test_schedule():
    g = golden("schedule")
    s, kept = Schedule(), spaced_timesteps(100)
    close(torch.tensor(s.beta, dtype=torch.float64), g["betas"], 1e-9)
    close(torch.tensor(s.abar, dtype=torch.float64), g["alphas_cumprod"], 1e-12)
    assert kept == g["respaced_100"].tolist() and len(s.abar) == T
    close(torch.tensor(Schedule(kept).beta, dtype=torch.float64), g["respaced_betas_100"], 1e-9)


def test_head_sample(generator):
    g, model = generator
    for name in ("head_sample", "head_sample_cfg"):
        r = g[name]
        got = model.head.sample(r["z"], r.get("z_null"), r["cfg"], 100, r["temperature"], r["noise"])
        close(got, r["out"], LOOP)


def test_decoding_loop(generator):
    g, model = generator
    r = g["loop"]
    got = model.generate(g["classes"], None, r["num_iter"], 100, r["cfg"], r["cfg_schedule"], r["temperature"],
                         g["orders"], r["noise"])
    close(got, r["tokens"], LOOP)
    r = g["loop_nocfg"]
    got = model.generate(g["classes"], None, r["num_iter"], 100, 1.0, "linear", r["temperature"], g["orders"],
                         r["noise"])
    close(got, r["tokens"], LOOP)
