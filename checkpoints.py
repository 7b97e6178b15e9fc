"""Files of weights: atomic, self-describing, checksummed; and all that is known about the layouts of official files.

    save(path, kind, config, state, **meta)      writes one of ours; kind is vq, kl, prior or generator
    load(path, kind) -> config, state            reads ours or an official one; the state, in fp32, fits our module
    load_model(path, kind, device) -> module     the same as a module, frozen and in eval mode
    read(path) -> dict                           any torch file: tensors, plain containers and argparse.Namespace only

    python checkpoints.py FILE                   says what a weights file is, and under which name a run takes it

A run directory holds {vq,kl,prior,generator}.pt. Each may be an official file, renamed. vq: LlamaGen's vq_ds16_c2i;
kl: MAR's kl16, CompVis' kl-f16, VA-VAE's f16; prior: LlamaGen's c2i_{B,L,XL,XXL}; generator: MAR's checkpoint-last."""
import argparse
import csv
import hashlib
import os
import re
from dataclasses import asdict, fields, replace
from functools import reduce
from itertools import count

import torch

from faults import run_script
from fusion import FUSIONS
from generator import Generator, GeneratorConfig
from prior import Prior, PriorConfig
from runtime import UserError, agree, barrier, is_first, print0, refuse, sweep, write_file
from tokenizers import KL, VQ, KLConfig, VQConfig

FORMAT = 1
CONFIGS = {"vq": VQConfig, "kl": KLConfig, "prior": PriorConfig, "generator": GeneratorConfig}
MODULES = {"vq": VQ, "kl": KL, "prior": Prior, "generator": Generator}


# ------------------------------------------------------------------------------------------------------- own files

def checksum(state: dict) -> str:
    """SHA-256 over all tensors (names, types, shapes, bytes) and other values of a nested dict, 16 hex digits."""
    digest = hashlib.sha256()

    def visit(name, value):
        if isinstance(value, dict):
            for k in sorted((k for k in value if k != "checksum"), key=str):  # it holds the sum itself
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
    write_file(path, lambda f: torch.save({**content, "checksum": checksum(content)}, f), kept)


def save(path: str, kind: str, config, state: dict, **meta):
    """Writes weights of `kind` with their config. meta: plain values (classes, step, sampling, ...)."""
    state = {k: v.detach().clone() for k, v in state.items()}  # clone: of a view torch.save writes all the storage
    write(path, {"format": FORMAT, "kind": kind, "config": asdict(config), "state": state, **meta})


def read(path: str) -> dict:
    """The content of a torch file. Refuses a file that is absent, damaged, not torch's, or holds code."""
    refuse([(not os.path.isfile(path), f"{path} is not there; train it, take an official file, or give another path")])
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAR keeps its arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a flipped bit can make the zip reader and the unpickler raise almost anything
        what = "is not a PyTorch weights file, or is damaged; get it again"
        if isinstance(error, PermissionError):
            what = "cannot be read: permission denied"
        elif re.search("Unsupported (global|class)|GLOBAL", str(error)):
            what = "holds more than tensors and plain values, which could run code, and is refused"
        raise UserError(f"{path} {what}.") from None
    refuse([(not isinstance(content, dict), f"{path} holds a {type(content).__name__}, not a dictionary of weights")])
    if "format" in content:
        refuse([(content["format"] != FORMAT, f"{path} has format {content['format']}, not {FORMAT}; update the code")])
        refuse([(content.get("checksum") != checksum(content), f"{path} is damaged: wrong checksum; get it again")])
    return content


def previous(path: str) -> str:
    """The name under which the training state before the newest is kept: train-2.pt -> train-2.previous.pt."""
    return path.removesuffix(".pt") + ".previous.pt"


def newest(path: str) -> dict | None:
    """The training state `path`; the previous one if that is damaged or absent; None if there is neither."""
    files, damaged = [file for file in (path, previous(path)) if os.path.exists(file)], False
    try:
        content = read(files[0]) if files else None
    except UserError as error:
        if len(files) == 1:
            raise
        print0(f"note: {error} Continuing from {files[1]}, the training state before it.")
        content, damaged = read(files[1]), True
    barrier()  # every rank must have read before rank 0 renames
    if damaged and is_first():  # the next save would otherwise keep the damaged file in place of the good one
        os.replace(path, f"{path}.damaged")
    return content


def save_state(path: str, kind: str, configs: dict, **content):
    """Writes a training state and keeps the one before it. configs: what `find_state` compares."""
    write(path, {"format": FORMAT, "kind": kind, "configs": configs, **content}, kept=previous(path))


def find_state(path: str, kind: str, configs: dict, weights: list, fresh: bool) -> dict | None:
    """-> the training state to resume from, or None for a new training. All ranks call it.

    For a new training it moves away what an earlier one left in its place: weights, with `fresh` states too."""
    if is_first():
        sweep(os.path.dirname(path))
    if fresh:
        set_aside([path, previous(path), *weights])
    barrier()
    state = newest(path)
    agree(state.get("step") if state else 0, "the step to resume at")
    if state is None:
        set_aside(weights)
        return None
    other = [k for k, v in configs.items() if state.get("configs", {}).get(k) != v]
    refuse([(state.get("kind") != kind, f"{path} is no training state of this stage; remove it or change --run"),
            (other, f"{path} was trained with other settings ({', '.join(other)}); choose another --run")])
    print0(f"resuming {path} at step {state['step']:,}")
    return state


def set_aside(paths: list):
    """Rank 0 moves the files that exist into a new folder: the first of before-1, before-2, ... that is free."""
    if is_first() and (paths := [p for p in paths if os.path.exists(p)]):
        folders = (os.path.join(os.path.dirname(paths[0]), f"before-{i}") for i in count(1))
        folder = next(f for f in folders if not os.path.exists(f))
        try:
            os.mkdir(folder)
            for p in paths:
                os.replace(p, os.path.join(folder, os.path.basename(p)))
        except OSError as error:
            raise UserError(f"cannot move {paths[0]} to {folder}: {error.strerror}.") from None
        print0(f"{', '.join(map(os.path.basename, paths))} moved to {folder}")


def load_model(path: str, kind: str, device="cpu"):
    """-> our module with the weights of `path`, frozen, in eval mode. `about`: other entries of a file of ours."""
    content = read(path)
    config, state = load(path, kind, content)
    if bad := [key for key, value in state.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{path} holds values that are not finite, in {bad[0]!r}; it is damaged or badly trained.")
    model = MODULES[kind](config)
    model.load_state_dict(state)
    known = ("format", "kind", "config", "state", "checksum")
    model.about = {k: v for k, v in content.items() if k not in known} if "format" in content else {}
    model = model.eval().requires_grad_(False).to(device)
    return model.to(memory_format=torch.channels_last) if kind in ("vq", "kl") else model  # faster convolutions


def refuse_other(path: str, model, wanted: dict):
    """Refuses a model, loaded from `path`, if config, file or its tokenizers (vq, kl) say other than `wanted`."""
    its = {**asdict(model.config), **model.about, **model.about.get("tokenizers", {})}  # `classes`: the names
    if other := [name for name, value in wanted.items() if its.get(name, value) != value]:
        raise UserError(f"{path} was trained on another cache, with other {', '.join(other)}; train it with --fresh.")


def load(path: str, kind: str, content: dict | None = None):
    """-> config and fp32 state, exactly our module's tensors; the EMA if the file has one. content: from `read`."""
    content = read(path) if content is None else content
    if (found := kind_of(path, content)) != kind:
        raise UserError(f"{path} holds {found} weights where {kind} is expected.")
    if "format" in content:
        values, state = content["config"], content["state"]
        if unknown := set(values) - {f.name for f in fields(CONFIGS[kind])}:
            raise UserError(f"{path} has unknown settings: {', '.join(sorted(unknown))}; update the code.")
        config = CONFIGS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    else:
        _, names, convert = OFFICIAL[kind]
        rename = lambda key: reduce(lambda key, pair: key.replace(*pair), names, key)
        state = {rename(k): v for k, v in official_state(content).items() if not k.startswith(IGNORED)}
        try:
            config, state = convert(path, content, state)
        except KeyError as error:
            raise UserError(f"{path} is incomplete: it has no tensor {error}; get the file again.") from None
    with torch.device("meta"):  # a module without memory
        wanted = MODULES[kind](config).state_dict()
    for key in [*wanted, *state]:
        if key not in wanted:
            raise UserError(f"{path} has the unknown tensor {key!r}; it is no layout that this code supports.")
        if key not in state or state[key].shape != wanted[key].shape:
            raise UserError(f"{path} is no whole {kind} of its sizes: see the tensor {key!r}; get the file again.")
    return config, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def kind_of(path: str, content: dict) -> str:
    """vq, kl, prior, generator or train-N. Our files say it; an official file has a tensor that no other kind has."""
    if "format" in content:
        return content["kind"]
    kinds = [kind for kind, (mark, _, _) in OFFICIAL.items() if mark in official_state(content)]
    refuse([(not kinds, f"{path} holds no weights that this code recognises; see docs/weights.md")])
    return kinds[0]


def read_classes(path: str) -> dict | None:
    """A classes.tsv -> {folder: [id, name]} in the file's order, or None if there is no such file."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:  # spreadsheets put a byte order mark in front
            return {r["folder"]: [int(r["id"]), r["name"].strip()] for r in csv.DictReader(f, delimiter="\t")}
    except (KeyError, TypeError, ValueError, AttributeError, OSError, csv.Error):
        raise UserError(f"{path} must be a file of tab-separated columns: folder, id (a number), name.") from None


# -------------------------------------------------------------------------------------------------- official layouts
# `official_state` finds the tensors of an official file. `load` gives each our name, lets a convert function read the
# config from their shapes, and refuses unknown and absent tensors. The file's name is not looked at.

EMA, RAW = ("model_ema", "ema"), ("model", "module", "state_dict")  # names of the weights in an official file
IGNORED = ("quantize.codebook_used", "freqs_cis", "loss.", "foundation_model.", "linear_proj.")  # starts of names


def official_state(content: dict) -> dict:
    """The tensors of an official file, without the prefixes that DDP and torch.compile put before their names."""
    entries = (content.get(name) for name in EMA + RAW)
    state = next((entry for entry in entries if isinstance(entry, dict)), content)  # content: a bare state dict
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state.items()
            if isinstance(k, str) and isinstance(v, torch.Tensor)}


def length(state: dict, prefix: str) -> int:
    """The number of modules in a list, from names like prefix + "3.weight"."""
    return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})


# Pieces of the tensors' names: theirs, ours, replaced in this order. What is not listed is the same in both.
AUTOENCODER_NAMES = [
    (".downsample.", ".resample."), (".upsample.", ".resample."), ("nin_shortcut", "shortcut"), ("proj_out", "proj"),
    (".conv_blocks.", ".levels."), (".res.", ".blocks."), ("quantize.embedding", "codebook"),           # LlamaGen
    (".down.", ".levels."), (".up.", ".levels."), (".block.", ".blocks."),                              # CompVis, MAR
    ("mid.block_1", "mid.0"), ("mid.attn_1", "mid.1"), ("mid.block_2", "mid.2")]
PRIOR_NAMES = [("cls_embedding.embedding_table", "class_embedding"), ("tok_embeddings", "code_embedding"),
    ("layers.", "blocks."), (".attention.", "."), (".feed_forward.", ".")]
GENERATOR_NAMES = [("class_emb.", "class_embedding."), ("fake_latent", "fake_class"), ("z_proj_ln", "encoder_in_norm"),
    ("z_proj", "latent_in"), ("decoder_embed", "decoder_in"), ("diffusion_pos_embed_learned", "output_positions"),
    ("pos_embed_learned", "positions"), (".attn.", "."), (".mlp.fc", ".fc"), ("diffloss.", "head."),
    ("time_embed.mlp", "time"), ("cond_embed", "cond"), ("input_proj", "input"), ("res_blocks", "blocks"),
    ("in_ln", "norm"), ("final_layer.linear", "output"), ("final_layer.adaLN_modulation.1", "output_modulation"),
    ("adaLN_modulation.1", "modulation")]


def autoencoder_sizes(state: dict) -> dict:
    """ch, ch_mult, z_channels and blocks from the shapes of tensors under our names."""
    ch = len(state["encoder.conv_in.weight"])
    levels = range(length(state, "encoder.levels."))
    return dict(ch=ch, ch_mult=tuple(len(state[f"encoder.levels.{i}.blocks.0.conv1.weight"]) // ch for i in levels),
                z_channels=state["decoder.conv_in.weight"].shape[1], blocks=length(state, "encoder.levels.0.blocks."))


def convert_vq(path, content, state):
    K, d = state["codebook.weight"].shape
    return VQConfig(**autoencoder_sizes(state), codebook_size=K, codebook_dim=d), state


def convert_kl(path, content, state):
    lowest = length(state, "encoder.levels.") - 1
    # Their decoder numbers its levels from the highest resolution, ours from the lowest.
    ours = lambda match: f"decoder.levels.{lowest - int(match[1])}."
    state = {re.sub(r"^decoder\.levels\.(\d+)\.", ours, key): value for key, value in state.items()}
    config = KLConfig(**autoencoder_sizes(state), encoder_attention=f"encoder.levels.{lowest}.attn.0.q.weight" in state,
                      decoder_attention="decoder.levels.0.attn.0.q.weight" in state)
    return (config if author("kl", config) == "MAR" else replace(config, scale=None)), state  # the default is MAR's


def convert_prior(path, content, state):
    (vocab, dim), layers = state["code_embedding.weight"].shape, length(state, "blocks.")
    refuse([(dim == 3200, f"{path} is LlamaGen's 3B, which is not supported; take B, L, XL or XXL")])
    args, table = content.get("args"), official_state(content).get("freqs_cis")
    if table is not None:
        grid = round((len(table) - 1) ** 0.5)  # a row for each position and one for the class
    elif hasattr(args, "image_size"):
        grid = args.image_size // getattr(args, "downsample_size", 16)
    else:  # no tensor tells; B and L are taken for 16x16 (256 pixels), XL and XXL for 24x24 (384)
        grid = 24 if layers in (36, 48) else 16
        print0(f"note: {path} does not say its grid; it is taken for {grid}x{grid}")
    heads = max(1, dim // 64)  # 64 channels per head, in all of LlamaGen's sizes but 3B
    return PriorConfig(dim, layers, heads, vocab, grid, len(state["class_embedding.weight"]) - 1), state


def convert_generator(path, content, state):
    """MAR itself: our generator with the fusion `none`."""
    classes, dim = state["class_embedding.weight"].shape
    L = state["output_positions"].shape[1]
    return GeneratorConfig(fusion="none", dim=dim, depth=length(state, "encoder_blocks."),
                           heads={768: 12, 1024: 16, 1280: 16}.get(dim, max(1, dim // 64)),  # MAR's; no tensor tells
                           prefix=state["encoder_positions"].shape[1] - L, grid=round(L**0.5), classes=classes,
                           token_dim=state["latent_in.weight"].shape[1], head_depth=length(state, "head.net.blocks."),
                           head_width=len(state["head.net.cond.weight"])), state


OFFICIAL = {  # kind: a tensor that no other kind has, the names, convert(path, content, renamed state) -> config, state
    "vq": ("quantize.embedding.weight", AUTOENCODER_NAMES, convert_vq),
    "kl": ("encoder.down.0.block.0.conv1.weight", AUTOENCODER_NAMES, convert_kl),
    "prior": ("cls_embedding.embedding_table.weight", PRIOR_NAMES, convert_prior),
    "generator": ("diffloss.net.cond_embed.weight", GENERATOR_NAMES, convert_generator)}


def author(kind: str, config) -> str:
    """Who published an official file of this kind and config."""
    if kind == "kl" and config.decoder_attention:  # MAR's decoder has attention in its middle only
        return "VA-VAE" if config.z_channels == 32 else "CompVis"
    return "MAR" if kind in ("kl", "generator") else "LlamaGen"


# ------------------------------------------------------------------------------------------------------- as a script

SUMMARIES = {  # kind: what it is; its sizes; what must fit other files and the data
    "vq": ("VQ tokenizer", "ch ch_mult z_channels codebook_dim", "stride codebook_size"),
    "kl": ("KL tokenizer", "ch ch_mult", "stride z_channels scale"),
    "prior": ("prior", "dim layers heads", "grid pixels vocab classes"),
    "generator": ("generator", "fusion dim depth heads head_depth head_width", "grid pixels token_dim vocab classes")}


def describe(path: str) -> str:
    """Three lines: whose file it is and what it holds; its sizes; what it fits, and its name in a run directory."""
    content = read(path)
    kind, own = kind_of(path, content), "format" in content
    refuse([(kind not in CONFIGS, f"{path} holds {kind}, not the weights of a model; give a file like kl.pt")])
    config, state = load(path, kind, content)
    whose = "this repository's" if own else f"{author(kind, config)}'s"
    ema = own or any(isinstance(content.get(name), dict) for name in EMA)  # train.py saves the EMA
    values = asdict(config)
    if kind in ("vq", "kl"):
        values["stride"] = config.unshuffle * 2 ** (len(config.ch_mult) - 1)
    else:
        values["pixels"] = None if own else 16 * config.grid  # the official tokenizers have a stride of 16
    values["scale"] = values.get("scale") or "not known, data.py measures it"  # only a KL tokenizer's is listed
    if kind == "generator" and not FUSIONS[config.fusion].reads_codes:
        values["vocab"] = None
    listed = lambda names: ", ".join(f"{n} {values[n]}" for n in names.split() if values[n] is not None)
    noun, sizes, fits = SUMMARIES[kind]
    return (f"{path}: {whose} {noun}, {sum(v.numel() for v in state.values()):,} parameters, "
            f"{'EMA' if ema else 'no EMA in the file'}\n"
            f"sizes: {listed(sizes)}\nfits: {listed(fits)}; put it into a run directory as {kind}.pt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="a file of weights; tools/ship.py copies a run, in half precision")
    args = parser.parse_args()
    refuse([(os.path.isdir(args.file), f"{args.file} is a folder; give a file in it")])
    print(describe(args.file))


if __name__ == "__main__":
    run_script(main)
