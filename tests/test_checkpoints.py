"""checkpoints.py: our own files, and the official layouts.

The official names are rebuilt here from our modules by renaming the other way round; test_golden.py reads real ones.
"""
import argparse
import os
import pickle
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checkpoints
import sample
from generator import Generator, GeneratorConfig
from presets import PRESETS
from prior import Prior, PriorConfig
from runtime import UserError
from tokenizers import KL, VQ, KLConfig, VQConfig

GOLDEN = Path(__file__).parent / "golden"
TOY = PRESETS["toy"]
SMALL = PriorConfig(dim=64, layers=2, heads=1, vocab=8, grid=4, classes=3)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "file.pt")


def saved(path, **meta):
    model = Prior(SMALL)
    checkpoints.save(path, "prior", SMALL, model.state_dict(), **meta)
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------------------------------------------------- own files

@pytest.mark.parametrize("kind, module, config", [("vq", VQ, TOY.vq), ("kl", KL, TOY.kl), ("prior", Prior, SMALL),
                                                  ("generator", Generator, TOY.generator)])
def test_roundtrip(path, kind, module, config):
    state = module(config).state_dict()
    checkpoints.save(path, kind, config, state, step=7, classes=[[207, "golden retriever"]])
    got, loaded = checkpoints.load(path, kind)
    assert got == config and same(loaded, state)
    module(got).load_state_dict(loaded)
    content = checkpoints.read(path)
    assert content["step"] == 7 and content["classes"] == [[207, "golden retriever"]]


def test_half_precision_loads_as_fp32(path):
    state = {k: v.half() for k, v in Prior(SMALL).state_dict().items()}
    checkpoints.save(path, "prior", SMALL, state)
    loaded = checkpoints.load(path, "prior")[1]
    assert all(v.dtype == torch.float32 and torch.equal(v, state[k].float()) for k, v in loaded.items())


def test_full_disk_leaves_the_old_file(path, tmp_path):
    """A real failure in the middle of writing: no file may grow over 100 kB."""
    state = saved(path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            checkpoints.save(path, "prior", SMALL, {"big": torch.zeros(200_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == ["file.pt"] and same(checkpoints.load(path, "prior")[1], state)


def test_ctrl_c_while_writing_leaves_the_old_file(path, tmp_path, monkeypatch):
    state = saved(path)

    def save(content, f):
        f.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(path, {"state": {}})
    assert os.listdir(tmp_path) == ["file.pt"] and same(checkpoints.load(path, "prior")[1], state)


def test_flipped_byte_is_noticed(path):
    """Anywhere in the file: either it is refused, or the byte was padding and nothing changed."""
    state = saved(path)
    content, refused = Path(path).read_bytes(), 0
    for place in [*range(0, len(content), len(content) // 80), *range(len(content) - 2000, len(content), 100)]:
        Path(path).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1:])
        try:
            assert same(checkpoints.load(path, "prior")[1], state), place
        except UserError:
            refused += 1
    assert refused > 60


def test_truncated_file(path):
    saved(path)
    content = Path(path).read_bytes()
    for n in (0, 1, 100, len(content) // 2, len(content) - 1):
        Path(path).write_bytes(content[:n])
        with pytest.raises(UserError, match="not a PyTorch weights file, or is damaged"):
            checkpoints.load(path, "prior")


def test_changed_number_is_noticed(path):
    """Every part of the content is under the checksum."""
    saved(path, step=1)
    content = checkpoints.read(path)
    for change in ({"step": 2}, {"config": {**content["config"], "dropout": 0.0}},
                   {"state": {**content["state"], "norm.weight": content["state"]["norm.weight"] + 1e-3}}):
        torch.save({**content, **change}, path)
        with pytest.raises(UserError, match="checksum"):
            checkpoints.load(path, "prior")


def test_checksum():
    a = {"x": torch.arange(6.0), "y": {"z": torch.ones(2)}}
    assert checkpoints.checksum(a) == checkpoints.checksum({"y": {"z": torch.ones(2)}, "x": torch.arange(6.0)})
    assert checkpoints.checksum(a) == checkpoints.checksum({**a, "x": torch.arange(12.0)[:6]})
    for other in ({**a, "x": torch.arange(6.0).view(2, 3)}, {**a, "x": torch.arange(6.0).double()},
                  {"x": a["x"], "y": {"w": torch.ones(2)}}, {**a, "n": 1}):
        assert checkpoints.checksum(other) != checkpoints.checksum(a)


# ---------------------------------------------------------------------------------------------------- what is refused

def test_wrong_kind(path):
    saved(path)
    with pytest.raises(UserError, match="holds prior weights where vq is expected"):
        checkpoints.load(path, "vq")


def test_unknown_setting_and_format(path):
    content = {"format": 1, "kind": "prior", "config": {"dim": 64, "colour": 3}, "state": {}}
    checkpoints.write(path, content)
    with pytest.raises(UserError, match="colour"):
        checkpoints.load(path, "prior")
    checkpoints.write(path, {**content, "format": 2})
    with pytest.raises(UserError, match="format 2"):
        checkpoints.load(path, "prior")


def test_absent_file(path):
    with pytest.raises(UserError, match="is not there"):
        checkpoints.load(path, "prior")


FOREIGN = {
    "other_model": {"model": {"conv1.weight": torch.ones(3)}}, "no_tensor": {"a": 1}, "empty": {},
    "list": [torch.ones(1)], "tensor": torch.ones(3), "number_keys": {0: torch.ones(3)},
    "other_format": {"format": "pt", "state_dict": {}}, "format_only": {"format": 1},
    "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-3}]},
}


@pytest.mark.parametrize("kind", checkpoints.CONFIGS)
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file(path, kind, name):
    torch.save(FOREIGN[name], path)
    with pytest.raises(UserError, match="file.pt"):
        checkpoints.load(path, kind)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02garbage", bytes(range(256)) * 20])
def test_garbage(path, content):
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match="not a PyTorch weights file, or is damaged"):
        checkpoints.load(path, "prior")


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_not_run(path, tmp_path, way):
    trace = tmp_path / "was-run"
    content = {"model": {"a": torch.ones(1)}, "x": Attack(f"touch {trace}")}
    if way == "pickle":
        Path(path).write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    for kind in checkpoints.CONFIGS:
        with pytest.raises(UserError, match="could run code|not a PyTorch weights file"):
            checkpoints.load(path, kind)
    assert not trace.exists()


# --------------------------------------------------------------------------------------------------- official layouts

PROJ = (r"(attn\.\d+|mid\.1|attn_1)\.proj\.", r"\1.proj_out.")
OFFICIAL = {  # our names -> theirs
    "vq": [(r"\.levels\.(\d+)\.blocks", r".conv_blocks.\1.res"), (r"\.levels\.", ".conv_blocks."),
           (r"^encoder(.*)resample", r"encoder\1downsample"), (r"^decoder(.*)resample", r"decoder\1upsample"),
           ("shortcut", "nin_shortcut"),
           ("^codebook", "quantize.embedding"), PROJ],
    "prior": [("^class_embedding", "cls_embedding.embedding_table"), ("^code_embedding", "tok_embeddings"),
              (r"^blocks\.", "layers."), (r"\.(wqkv|wo)\.", r".attention.\1."),
              (r"\.(w[123])\.", r".feed_forward.\1.")],
    "generator": [
        ("^class_embedding", "class_emb"), ("^fake_class", "fake_latent"), ("^latent_in", "z_proj"),
        ("^(encoder|decoder)_positions", r"\1_pos_embed_learned"), ("^output_positions", "diffusion_pos_embed_learned"),
        ("^encoder_in_norm", "z_proj_ln"), ("^decoder_in", "decoder_embed"),
        (r"^(\w+_blocks\.\d+)\.(qkv|proj)", r"\1.attn.\2"), (r"^(\w+_blocks\.\d+)\.(fc\d)", r"\1.mlp.\2"),
        (r"head\.net\.time\.", "diffloss.net.time_embed.mlp."), (r"head\.net\.cond\.", "diffloss.net.cond_embed."),
        (r"head\.net\.input\.", "diffloss.net.input_proj."),
        (r"head\.net\.output\.", "diffloss.net.final_layer.linear."),
        (r"head\.net\.output_modulation", "diffloss.net.final_layer.adaLN_modulation.1"),
        (r"head\.net\.blocks\.(\d+)\.norm", r"diffloss.net.res_blocks.\1.in_ln"),
        (r"head\.net\.blocks\.(\d+)\.modulation", r"diffloss.net.res_blocks.\1.adaLN_modulation.1"),
        (r"head\.net\.blocks", "diffloss.net.res_blocks")],
}


def official(kind, state):
    """Our state dict under the official names."""
    if kind == "kl":
        top = max(int(k.split(".")[2]) for k in state if k.startswith("decoder.levels."))
        rules = [(r"\.levels\.(\d+)\.blocks", r".levels.\1.block"), (r"^encoder\.levels", "encoder.down"),
                 (r"^decoder\.levels\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}"), ("shortcut", "nin_shortcut"),
                 (r"down(.*)resample", r"down\1downsample"), (r"up(.*)resample", r"up\1upsample"),
                 (r"mid\.0", "mid.block_1"), (r"mid\.1", "mid.attn_1"), (r"mid\.2", "mid.block_2"), PROJ]
    else:
        rules = OFFICIAL[kind]
    for ours, theirs in rules:
        state = {re.sub(ours, theirs, key): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("kind", checkpoints.CONFIGS)
def test_names_are_those_of_the_recorded_files(kind):
    """`official` undoes the loader's renaming, tensor by tensor."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        recorded = torch.load(GOLDEN / f"{kind}.pt", weights_only=True)["checkpoint"]
    state = checkpoints.load("f", kind, {k: v for k, v in recorded.items() if k not in checkpoints.EMA})[1]
    assert same(official(kind, state), {k: v for k, v in recorded["model"].items() if k != "quantize.codebook_used"})


MODULES = {"vq": VQ, "kl": KL, "prior": Prior, "generator": Generator}
MAR, COMPVIS = GeneratorConfig(fusion="none"), KLConfig(decoder_attention=True, scale=None)
TINY_MAR = replace(MAR, dim=64, depth=2, heads=1, prefix=4, token_dim=8, grid=4, classes=10, head_depth=2,
                   head_width=64)
FULL_SIZE = {  # kind, config, parameters, one official tensor and its shape
    "vq-16": ("vq", VQConfig(), 71_883_403, "decoder.conv_blocks.0.attn.2.proj_out.weight", (512, 512, 1, 1)),
    "kl16": ("kl", KLConfig(), 66_456_019, "encoder.down.4.attn.1.q.weight", (512, 512, 1, 1)),
    "kl-f16": ("kl", COMPVIS, None, "decoder.up.4.attn.2.q.weight", (512, 512, 1, 1)),
    "va-vae": ("kl", replace(COMPVIS, z_channels=32), None, "quant_conv.weight", (64, 64, 1, 1)),
    "c2i_B": ("prior", PriorConfig(), 110_888_448, "layers.11.feed_forward.w2.weight", (768, 2048)),
    "c2i_L": ("prior", PriorConfig(1024, 24, 16), None, "output.weight", (16384, 1024)),
    "c2i_XL": ("prior", PriorConfig(1280, 36, 20, grid=24), None, "layers.35.attention.wqkv.weight", (3840, 1280)),
    "c2i_XXL": ("prior", PriorConfig(1536, 48, 24, grid=24), None, "tok_embeddings.weight", (16384, 1536)),
    "mar_base": ("generator", MAR, 207_924_768, "encoder_pos_embed_learned", (1, 320, 768)),
    "mar_large": ("generator", replace(MAR, dim=1024, depth=16, heads=16, head_depth=8, head_width=1280), 478_326_304,
                  "diffloss.net.res_blocks.7.adaLN_modulation.1.weight", (3840, 1280)),
    "mar_huge": ("generator", replace(MAR, dim=1280, depth=20, heads=16, head_depth=12, head_width=1536), None,
                 "decoder_blocks.19.attn.qkv.weight", (3840, 1280)),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_layouts(name):
    """Names and shapes alone give back the whole config."""
    kind, config, parameters, tensor, shape = FULL_SIZE[name]
    with torch.device("meta"):
        model = MODULES[kind](config)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
    state = model.state_dict()
    theirs = official(kind, state)
    assert theirs[tensor].shape == shape
    got, loaded = checkpoints.load("file.pt", kind, {"model": theirs})
    assert got == config
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in state.items()}


def write_mar(path, **extra):
    """A MAR checkpoint as its training script writes it."""
    torch.manual_seed(0)
    state = Generator(TINY_MAR).state_dict()
    theirs = official("generator", state)
    args = argparse.Namespace(model="mar_base", img_size=256, resume="", eval=False)
    optimizer = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}
    content = {"model": theirs, "model_ema": {k: v + 0.01 for k, v in theirs.items()}, "optimizer": optimizer,
               "epoch": 799, "scaler": {"scale": 65536.0}, "args": args}
    torch.save({**content, **extra}, path)
    return state


def test_mar_file_with_namespace(path):
    state = write_mar(path)
    config, loaded = checkpoints.load(path, "generator")
    assert config == TINY_MAR and same(loaded, {k: v + 0.01 for k, v in state.items()})
    write_mar(path, model_ema=None)
    assert same(checkpoints.load(path, "generator")[1], state)


def test_mar_run_samples(path, copy_run, works, tmp_path):
    """A MAR file beside a tokenizer is a run; class names come from classes.tsv. No VQ or prior is needed."""
    run = copy_run("kl")
    write_mar(os.path.join(run, "generator.pt"))
    Path(run, "classes.tsv").write_text("folder\tid\tname\n" + "".join(f"f{i}\t{i}\tname {i}\n" for i in range(10)))
    out = tmp_path / "a.png"
    works("sample", "--run", run, "--class", "name 7", "--num", 1, "--iterations", 2, "--steps", 2, "--out", out)
    assert out.exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compile(path, prefix):
    state = Prior(SMALL).state_dict()
    torch.save({"model": {prefix + k: v for k, v in official("prior", state).items()}}, path)
    assert same(checkpoints.load(path, "prior")[1], state)


@pytest.mark.parametrize("extra", ["loss.logvar", "foundation_model.blocks.0.weight", "linear_proj.weight"])
def test_compvis_and_vavae(path, extra):
    """Attention in the decoder and parts beside the autoencoder: the file is recognised, the parts are left out."""
    torch.manual_seed(0)
    model = KL(KLConfig(ch=32, ch_mult=(1, 1, 2), z_channels=4, decoder_attention=True, scale=None)).eval()
    torch.save({"state_dict": {**official("kl", model.state_dict()), extra: torch.ones(2)}, "epoch": 3}, path)
    config, state = checkpoints.load(path, "kl")
    assert config == model.config
    loaded = KL(config).eval()
    loaded.load_state_dict(state)
    model.set_scale(0.5), loaded.set_scale(0.5)  # the file does not know it
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(images), model.encode(images))
    latents = torch.randn(1, 16, 4)
    assert torch.equal(loaded.decode(latents), model.decode(latents))


@pytest.mark.parametrize("kind, config", [("vq", VQConfig(32, (1, 2), 32, 16)), ("kl", KLConfig(32, (1, 2), 4)),
                                          ("prior", SMALL), ("generator", TINY_MAR)])
def test_unknown_tensor(path, kind, config):
    state = official(kind, MODULES[kind](config).state_dict())
    torch.save({"model": {**state, "encoder.extra.weight": torch.ones(1)}}, path)
    with pytest.raises(UserError, match="encoder.extra.weight"):
        checkpoints.load(path, kind)


# ------------------------------------------------------------------------------------------------------- as a script

SMALL_VQ, SMALL_KL = VQConfig(32, (1, 2), 32, 16), KLConfig(ch=32, ch_mult=(1, 2), z_channels=4)
WITH_DECODER_ATTENTION = replace(SMALL_KL, decoder_attention=True, scale=None)
OPTIMIZER = {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3}
IMAGE_128 = argparse.Namespace(image_size=128, downsample_size=16)
EXTRAS = {"loss.logvar": torch.ones(1), "foundation_model.blocks.0.weight": torch.ones(2),
          "linear_proj.weight": torch.ones(2)}
FILES = {  # kind, config, the file around the state dict, what the three lines say
    "LlamaGen's VQ": ("vq", SMALL_VQ, lambda s: {"model": {**s, "quantize.codebook_used": torch.ones(9)}},
                      ["LlamaGen's VQ tokenizer", "no EMA in the file", "ch 32, ch_mult (1, 2)",
                       "stride 2, codebook_size 16;", "as vq.pt"]),
    "MAR's KL": ("kl", SMALL_KL, lambda s: {"model": s}, ["MAR's KL tokenizer", "stride 2, z_channels 4, scale 0.2325;",
                                                          "as kl.pt"]),
    "CompVis' KL": ("kl", WITH_DECODER_ATTENTION, lambda s: {"state_dict": {**s, "loss.logvar": torch.ones(1)}},
                    ["CompVis's KL tokenizer", "scale not known, data.py measures it"]),
    "VA-VAE's KL": ("kl", replace(WITH_DECODER_ATTENTION, z_channels=32), lambda s: {"state_dict": {**s, **EXTRAS}},
                    ["VA-VAE's KL tokenizer", "z_channels 32, scale not known, data.py measures it"]),
    "LlamaGen's prior": ("prior", replace(SMALL, grid=16), lambda s: {"model": s, **OPTIMIZER},
                         ["LlamaGen's prior", "dim 64, layers 2, heads 1", "no EMA in the file",
                          "grid 16, pixels 256, vocab 8, classes 3;", "as prior.pt"]),
    "a compiled prior with its arguments": (
        "prior", replace(SMALL, grid=8), lambda s: {"module": {f"_orig_mod.{k}": v for k, v in s.items()},
                                                    "args": IMAGE_128}, ["grid 8, pixels 128"]),
    "a prior's EMA": ("prior", replace(SMALL, grid=16), lambda s: {"model": {k: -v for k, v in s.items()}, "ema": s},
                      ["LlamaGen's prior", "parameters, EMA"]),
    "a bare prior": ("prior", SMALL, lambda s: {**s, "freqs_cis": torch.zeros(17, 8, 2)},
                     ["LlamaGen's prior", "grid 4, pixels 64"]),
    "MAR": ("generator", TINY_MAR, lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s, **OPTIMIZER},
            ["MAR's generator", "parameters, EMA", "fusion none, dim 64, depth 2", "head_depth 2, head_width 64",
             "grid 4, pixels 64, token_dim 8, classes 10;", "as generator.pt"]),
    "MAR under DDP without EMA": ("generator", TINY_MAR, lambda s: {"model": {f"module.{k}": v for k, v in s.items()},
                                                                    "model_ema": None}, ["no EMA in the file"]),
}


@pytest.mark.parametrize("name", FILES)
def test_description_of_official_files(path, works, name):
    """Three lines of every supported layout, small and with what the real files have beside the weights."""
    kind, config, container, words = FILES[name]
    state = MODULES[kind](config).state_dict()
    torch.save(container(official(kind, state)), path)
    said = works("checkpoints", path)
    lines = [line for line in said.strip().split("\n") if not line.startswith("note: ")]
    assert len(lines) == 3 and lines[0].startswith(f"{path}: ")
    assert f"{sum(v.numel() for v in state.values()):,} parameters" in lines[0]
    assert all(word in said for word in words), said
    assert same(checkpoints.load(path, kind)[1], state)


def test_description_of_our_files(toy, works):
    said = [works("checkpoints", f"{toy.run}/{kind}.pt") for kind in checkpoints.CONFIGS]
    for text, word in zip(said, ("VQ tokenizer", "KL tokenizer", "prior", "generator")):
        assert text.count("\n") == 3 and f"this repository's {word}" in text and "parameters, EMA" in text
    scale = checkpoints.load(f"{toy.run}/kl.pt", "kl")[0].scale
    assert "stride 8, codebook_size 64;" in said[0] and f"stride 8, z_channels 8, scale {scale};" in said[1]
    assert "grid 4, vocab 64, classes 10;" in said[2]
    assert "fusion cross_attention" in said[3] and "grid 4, token_dim 8, vocab 64, classes 10;" in said[3]


@pytest.mark.parametrize("name", FOREIGN)
def test_description_refuses_what_is_none(path, script, name):
    torch.save(FOREIGN[name], path)
    result = script("checkpoints", path)
    assert result.code == 1 and path in result.err and not result.out and "Traceback" not in result.err


def test_description_refuses_other_files(toy, path, script, tmp_path):
    Path(path).write_bytes(b"hello")
    for file, words in ((path, "not a PyTorch weights file"), (str(tmp_path), "is a folder"),
                        (str(tmp_path / "x.pt"), "is not there"), (f"{toy.run}/train-2.pt", "holds train-2, not")):
        result = script("checkpoints", file)
        assert result.code == 1 and words in result.err and not result.out, file


def test_half_precision_copy(toy, tmp_path, works):
    works("ship", toy.run, tmp_path / "half")
    for kind in checkpoints.CONFIGS:
        a, b = checkpoints.load(f"{toy.run}/{kind}.pt", kind), checkpoints.load(tmp_path / "half" / f"{kind}.pt", kind)
        assert a[0] == b[0] and same({k: v.half().float() for k, v in a[1].items()}, b[1])
        assert os.path.getsize(tmp_path / "half" / f"{kind}.pt") < 0.6 * os.path.getsize(f"{toy.run}/{kind}.pt")
        content = checkpoints.read(tmp_path / "half" / f"{kind}.pt")  # deflated; stored by torch.save it is larger
        torch.save(content, tmp_path / "stored.pt")
        assert os.path.getsize(tmp_path / "half" / f"{kind}.pt") < 0.95 * os.path.getsize(tmp_path / "stored.pt")
    full, half = (sample.generate(sample.load_run(str(r)), [1, 2]) for r in (toy.run, tmp_path / "half"))
    assert torch.isfinite(half.images.float()).all() and half.images.shape == full.images.shape
