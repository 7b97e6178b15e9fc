"""Files: atomic, self-describing, checksummed; and all that is known about the layouts of official weights.

    save(path, kind, config, state, **meta)      writes one of ours
    newest(path) -> dict                         the training state at `path`, or the one kept before it
    load(path, kind, ema=True) -> config, state  reads ours or an official one; state fits our module of that config
    load_model(path, kind, device) -> module     the same as a module, frozen and in eval mode, with `about`: its meta
    read(path) -> dict                           the raw content of a file, safely

A run directory holds {vq,kl,prior,generator}.pt. Any of the four may be an official file under that name:

    vq         LlamaGen vq_ds16_c2i.pt
    kl         MAR kl16.ckpt, CompVis kl-f16, VA-VAE (f16, 32 channels)
    prior      LlamaGen c2i_{B,L,XL,XXL}: {"model"}, {"module"}, {"state_dict"} or bare
    generator  MAR checkpoint-last.pth, with {"model", "model_ema", "args": Namespace}

The layout is recognised from the keys and the sizes from the shapes, never from the file's name. Nothing is unpickled
but tensors, plain containers and argparse.Namespace. As a script it copies a run in half precision, for shipping:

    python checkpoints.py runs/tiny weights/tiny
"""
import argparse
import csv
import hashlib
import os
import pickle
import re
from dataclasses import asdict, fields
from itertools import count as count_from

import torch

from fusion import FUSIONS
from generator import Generator, GeneratorConfig
from prior import Prior, PriorConfig
from runtime import UserError, barrier, is_first, print0, run_script, write_file
from tokenizers import KL, VQ, KLConfig, VQConfig

FORMAT = 1
CONFIGS = {"vq": VQConfig, "kl": KLConfig, "prior": PriorConfig, "generator": GeneratorConfig}
MODULES = {"vq": VQ, "kl": KL, "prior": Prior, "generator": Generator}


# ------------------------------------------------------------------------------------------------------- own files

def checksum(state: dict) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors in a nested dict, 16 hex digits."""
    digest = hashlib.sha256()

    def visit(name, value):
        if isinstance(value, dict):
            for k in sorted(value, key=str):
                visit(f"{name}/{k}", value[k])
        elif isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}".encode())

    visit("", state)
    return digest.hexdigest()[:16]


def write(path: str, content: dict, kept: str | None = None):
    """Writes a torch file with a checksum; `kept` as in `write_file`."""
    content = {**content, "checksum": checksum(content)}
    write_file(path, lambda f: torch.save(content, f), kept)


def save(path: str, kind: str, config, state: dict, **meta):
    """Writes weights of `kind` with their config. meta: plain values (classes, step, sampling, ...)."""
    state = {k: v.detach().clone() for k, v in state.items()}
    write(path, {"format": FORMAT, "kind": kind, "config": asdict(config), "state": state, **meta})


def read(path: str) -> dict:
    """The content of a torch file. Refuses, with a sentence, what is absent, no such file, damaged, or carries code."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there; train it (train.py) or put an official file under this name.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAR keeps its arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in ("Unsupported global", "Unsupported class", "GLOBAL")):
            what = "holds more than tensors and plain values, which could run code, and is refused"
            raise UserError(f"{path} {what}.") from None
        raise UserError(f"{path} is not a PyTorch weights file, or is damaged; get it again.") from None
    except Exception:  # a flipped bit can make the zip reader and the unpickler raise almost anything
        raise UserError(f"{path} is not a PyTorch weights file, or is damaged; get it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of weights.")
    if "format" in content:
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']}, this code reads {FORMAT}; update one of them.")
        if content.get("checksum") != checksum({k: v for k, v in content.items() if k != "checksum"}):
            raise UserError(f"{path} is damaged: its checksum does not fit its content; get it again.")
    return content


def previous(path: str) -> str:
    """The name under which the training state before the newest is kept: train-2.pt -> train-2.previous.pt."""
    return path.removesuffix(".pt") + ".previous.pt"


def newest(path: str) -> dict | None:
    """The training state `path`; the previous one where that is damaged or gone; None where there is neither."""
    files = [file for file in (path, previous(path)) if os.path.exists(file)]
    for file in files:
        try:
            content = read(file)
            break
        except UserError as error:
            if file == files[-1]:
                raise
            print0(f"note: {error} Going on from {files[-1]}, the one before it.")
    else:
        content = None
    barrier()  # every rank has read
    if content is None:
        return None
    if file != files[0] and is_first():  # out of the way, lest the next save keep it in the place of the good one
        os.replace(files[0], f"{files[0]}.damaged")
    return content


def set_aside(paths: list):
    """Moves files, where there are any, into the first of the folders before-1, before-2, ... that is not there yet."""
    if paths := [p for p in paths if os.path.exists(p)]:
        folders = (os.path.join(os.path.dirname(paths[0]), f"before-{i}") for i in count_from(1))
        folder = next(f for f in folders if not os.path.exists(f))
        try:
            os.mkdir(folder)
            for p in paths:
                os.replace(p, os.path.join(folder, os.path.basename(p)))
        except OSError as error:
            raise UserError(f"cannot move {paths[0]} to {folder}: {error.strerror}.") from None
        print0(f"{', '.join(map(os.path.basename, paths))} moved to {folder}")


def load(path: str, kind: str, ema: bool = True):
    """-> (config, state_dict in fp32) for our module of `kind`: vq, kl, prior or generator.

    ema: of an official generator file take `model_ema` where it has one, else `model`. Our own files hold one set of
    weights, the EMA where one was trained, and ignore the flag.
    """
    return parse(path, kind, read(path), ema)


def load_model(path: str, kind: str, device="cpu"):
    """-> our module with the weights of `path`, frozen, in eval mode; `about` holds what else our files say."""
    content = read(path)
    config, state = parse(path, kind, content)
    model = MODULES[kind](config)
    wanted = model.state_dict()
    for key in [*wanted, *state]:
        if key not in state or key not in wanted or state[key].shape != wanted[key].shape:
            raise UserError(f"{path} is no whole {kind} of its sizes: see the tensor {key!r}; get the file again.")
        if not torch.isfinite(state[key]).all():
            raise UserError(f"{path} holds values that are not finite, in {key!r}; it is damaged or was trained badly.")
    model.load_state_dict(state)
    own = content if "format" in content else {}
    model.about = {k: v for k, v in own.items() if k not in ("format", "kind", "config", "state", "checksum")}
    model = model.eval().requires_grad_(False).to(device)
    return model.to(memory_format=torch.channels_last) if kind in ("vq", "kl") else model  # faster convolutions


def parse(path: str, kind: str, content: dict, ema: bool = True):
    """`load` of a file that `read` has read."""
    if "format" in content:
        if content["kind"] != kind:
            raise UserError(f"{path} holds {content['kind']} weights where {kind} is expected.")
        config = make_config(path, kind, content["config"])
        return config, {k: v.float() if v.is_floating_point() else v for k, v in content["state"].items()}
    try:
        return LAYOUTS[kind](path, content, ema)
    except KeyError as error:
        raise UserError(f"{path} is incomplete: it has no tensor {error}; get the file again.") from None


def make_config(path, kind, values: dict):
    known = {f.name for f in fields(CONFIGS[kind])}
    if unknown := set(values) - known:
        raise UserError(f"{path} has settings this code does not know: {', '.join(sorted(unknown))}; update the code.")
    return CONFIGS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_classes(path: str) -> dict | None:
    """A classes.tsv -> {folder: [id, name]} in the file's order, or None if there is no such file."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, newline="", encoding="utf-8") as f:
            return {r["folder"]: [int(r["id"]), r["name"].strip()] for r in csv.DictReader(f, delimiter="\t")}
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error):
        raise UserError(f"{path} must have the tab-separated columns folder, id (a number) and name.") from None


# ---------------------------------------------------------------------------------------------- official layouts

def unpack(path, content: dict, names: tuple) -> dict:
    """The state dict inside an official container: the first of `names` that is there, else the file itself; fp32."""
    state = next((content[n] for n in names if isinstance(content.get(n), dict)), content)
    plain = lambda key: key.removeprefix("module.").removeprefix("_orig_mod.")
    state = {plain(k): v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no weights that this code recognises.")
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def rename(path, state: dict, rules: list, drop: str = r"$^") -> dict:
    """Renames tensors by the first rule that matches; `drop` matches what to leave out; all else is an error.

    A rule is written without the final .weight or .bias, which stay.
    """
    out = {}
    for key, value in state.items():
        if re.match(drop, key):
            continue
        stem, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", key).groups()
        rule = next(((a, b) for a, b in rules if re.fullmatch(a, stem)), None)
        if rule is None:
            raise UserError(f"{path} has the unknown tensor {key!r}; it is no layout that this code supports.")
        out[re.sub(f"^{rule[0]}$", rule[1], stem) + (suffix or "")] = value
    return out


def need(path, kind, state: dict, *keys):
    if missing := [k for k in keys if k not in state]:
        raise UserError(f"{path} does not look like {kind} weights: there is no tensor {missing[0]!r}.")


def count(state: dict, pattern: str) -> int:
    """One more than the largest number that the group of `pattern` takes in the keys; 0 without a match."""
    return max((int(m[1]) for k in state if (m := re.match(pattern, k))), default=-1) + 1


SIDE, PART = "(encoder|decoder)", r"(norm\d?|conv\d|q|k|v)"
AUTOENCODER = [  # the names that LlamaGen and CompVis share, and those of the parts inside a block
    (SIDE + r"\.(conv_in|norm_out|conv_out)", r"\1.\2"), ("(quant_conv|post_quant_conv)", r"\1"),
    (SIDE + r"\.(levels\.\d+\.resample\.conv)", r"\1.\2"),
    (SIDE + r"\.(levels\.\d+\.\w+\.\d+|mid\.\d)\." + PART, r"\1.\2.\3"),
    (SIDE + r"\.(levels\.\d+\.\w+\.\d+)\.nin_shortcut", r"\1.\2.shortcut"),
    (SIDE + r"\.(levels\.\d+\.\w+\.\d+|mid\.\d)\.proj_out", r"\1.\2.proj")]


def substitute(state: dict, pairs: list) -> dict:
    """Applies regular expressions to all keys, one after the other."""
    for a, b in pairs:
        state = {re.sub(a, b, k): v for k, v in state.items()}
    return state


def autoencoder_sizes(state: dict) -> dict:
    """ch, ch_mult, z_channels and blocks from the shapes of tensors under our names."""
    ch = len(state["encoder.conv_in.weight"])
    levels = range(count(state, r"encoder\.levels\.(\d+)"))
    return dict(ch=ch, ch_mult=tuple(len(state[f"encoder.levels.{i}.blocks.0.conv1.weight"]) // ch for i in levels),
                z_channels=state["decoder.conv_in.weight"].shape[1],
                blocks=count(state, r"encoder\.levels\.0\.blocks\.(\d+)"))


def load_vq(path, content, ema):
    state = unpack(path, content, ("ema", "model") if ema else ("model",))
    need(path, "VQ", state, "quantize.embedding.weight", "encoder.conv_in.weight", "decoder.conv_in.weight")
    state = substitute(state, [
        (r"\.conv_blocks\.", ".levels."), (r"\.res\.", ".blocks."), (r"\.(down|up)sample\.", ".resample.")])
    rules = AUTOENCODER + [(r"quantize\.embedding", "codebook")]
    state = rename(path, state, rules, drop=r"quantize\.codebook_used|loss\.")
    K, d = state["codebook.weight"].shape
    return VQConfig(**autoencoder_sizes(state), codebook_size=K, codebook_dim=d), state


def load_kl(path, content, ema):
    state = unpack(path, content, ("model", "state_dict"))
    need(path, "KL", state, "encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight",
         "encoder.down.0.block.0.conv1.weight")
    top = count(state, r"decoder\.up\.(\d+)") - 1
    state = substitute(state, [
        (r"^encoder\.down\.", "encoder.levels."), (r"\.block\.", ".blocks."), (r"\.(down|up)sample\.", ".resample."),
        (r"^decoder\.up\.(\d+)", lambda m: f"decoder.levels.{top - int(m[1])}"),  # theirs count from the top
        (r"\.mid\.block_1", ".mid.0"), (r"\.mid\.attn_1", ".mid.1"), (r"\.mid\.block_2", ".mid.2")])
    state = rename(path, state, AUTOENCODER, drop=r"loss\.|foundation_model\.|linear_proj\.")
    attention = {"encoder_attention": f"encoder.levels.{top}.attn.0.q.weight" in state,
                 "decoder_attention": "decoder.levels.0.attn.0.q.weight" in state}
    # 0.2325 is MAR's measurement on its own file, known by its decoder without attention; None: not measured.
    scale = KLConfig.scale if not attention["decoder_attention"] else None
    return KLConfig(**autoencoder_sizes(state), **attention, scale=scale), state


def load_prior(path, content, ema):
    state = unpack(path, content, ("model", "module", "state_dict"))
    need(path, "prior", state, "cls_embedding.embedding_table.weight", "tok_embeddings.weight", "output.weight")
    args, freqs = content.get("args"), state.get("freqs_cis")
    state = rename(path, state, [
        (r"cls_embedding\.embedding_table", "class_embedding"), ("tok_embeddings", "code_embedding"),
        (r"layers\.(\d+)\.(?:attention|feed_forward)\.(wqkv|wo|w1|w2|w3)", r"blocks.\1.\2"),
        (r"layers\.(\d+)\.(attention_norm|ffn_norm)", r"blocks.\1.\2"), ("(norm|output)", r"\1")], drop="freqs_cis")
    vocab, dim = state["code_embedding.weight"].shape
    layers = count(state, r"blocks\.(\d+)")
    if dim == 3200:
        raise UserError(f"{path} is LlamaGen's 3B, which is not supported; take B, L, XL or XXL.")
    if freqs is not None:
        grid = round((len(freqs) - 1) ** 0.5)
    elif hasattr(args, "image_size"):
        grid = args.image_size // getattr(args, "downsample_size", 16)
    else:  # no tensor tells; B and L are 16x16 at 256 pixels, XL and XXL 24x24
        grid = 24 if layers in (36, 48) else 16
        print0(f"note: {path} does not say its grid; taken for {grid}x{grid}")
    heads = max(1, dim // 64)  # 64 channels a head, in all of LlamaGen's sizes but 3B
    return PriorConfig(dim, layers, heads, vocab, grid, len(state["class_embedding.weight"]) - 1), state


def load_generator(path, content, ema):
    state = unpack(path, content, ("model_ema", "model") if ema else ("model", "model_ema"))
    need(path, "generator", state, "class_emb.weight", "z_proj.weight", "diffloss.net.cond_embed.weight", "mask_token",
         "encoder_pos_embed_learned", "diffusion_pos_embed_learned")
    state = rename(path, state, [
        ("class_emb", "class_embedding"), ("fake_latent", "fake_class"), ("mask_token", "mask_token"),
        (f"{SIDE}_pos_embed_learned", r"\1_positions"), ("diffusion_pos_embed_learned", "output_positions"),
        ("z_proj", "latent_in"), ("z_proj_ln", "encoder_in_norm"), ("decoder_embed", "decoder_in"),
        (f"{SIDE}_norm", r"\1_norm"),
        (SIDE + r"_blocks\.(\d+)\.(norm[12])", r"\1_blocks.\2.\3"),
        (SIDE + r"_blocks\.(\d+)\.(?:attn|mlp)\.(qkv|proj|fc1|fc2)", r"\1_blocks.\2.\3"),
        (r"diffloss\.net\.time_embed\.mlp\.([02])", r"head.net.time.\1"),
        (r"diffloss\.net\.cond_embed", "head.net.cond"), (r"diffloss\.net\.input_proj", "head.net.input"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.in_ln", r"head.net.blocks.\1.norm"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.([02])", r"head.net.blocks.\1.mlp.\2"),
        (r"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1", r"head.net.blocks.\1.modulation"),
        (r"diffloss\.net\.final_layer\.linear", "head.net.output"),
        (r"diffloss\.net\.final_layer\.adaLN_modulation\.1", "head.net.output_modulation")])
    classes, dim = state["class_embedding.weight"].shape
    L = state["output_positions"].shape[1]
    return GeneratorConfig(
        fusion="none", dim=dim, depth=count(state, r"encoder_blocks\.(\d+)"),
        heads={768: 12, 1024: 16, 1280: 16}.get(dim, max(1, dim // 64)),  # no tensor tells; these are MAR's
        prefix=state["encoder_positions"].shape[1] - L, grid=round(L**0.5),
        token_dim=state["latent_in.weight"].shape[1],
        classes=classes, head_depth=count(state, r"head\.net\.blocks\.(\d+)"),
        head_width=len(state["head.net.cond.weight"])), state


LAYOUTS = {"vq": load_vq, "kl": load_kl, "prior": load_prior, "generator": load_generator}


# ------------------------------------------------------------------------------------------------------- as a script

def main():
    parser = argparse.ArgumentParser(description="Copies the weight files that sampling needs in half precision.")
    parser.add_argument("source"), parser.add_argument("target")
    args = parser.parse_args()
    if os.path.realpath(args.source) == os.path.realpath(args.target):
        raise UserError("source and target are the same folder; its files would lose half of their precision.")
    fusion = load(os.path.join(args.source, "generator.pt"), "generator")[0].fusion
    kinds = tuple(CONFIGS) if FUSIONS[fusion].reads_codes else ("kl", "generator")
    for kind in kinds:
        path = os.path.join(args.source, f"{kind}.pt")
        content = read(path)
        if "format" not in content:
            raise UserError(f"{path} is an official file; copy it as it is.")
        content["state"] = {k: v.half() if v.is_floating_point() else v for k, v in content["state"].items()}
        content.pop("checksum")
        if "tokenizers" in content:  # whose weights have just been rounded
            rounded = {k: load(os.path.join(args.target, f"{k}.pt"), k)[1] for k in ("vq", "kl") if k in kinds}
            content["tokenizers"] = {k: checksum(state) for k, state in rounded.items()}
        write(os.path.join(args.target, f"{kind}.pt"), content)
        print(f"{args.target}/{kind}.pt  {os.path.getsize(os.path.join(args.target, f'{kind}.pt')) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
