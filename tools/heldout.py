"""The loss of a run on photographs: does it still learn, or does it only memorise?

    python tools/heldout.py RUN PICTURES [PICTURES ...]     # folders of class folders, as for training

Give photographs that were kept apart from the training, and beside them some of the training. A model memorises when
the loss of the first rises while that of the second falls. Pictures are cut in the centre. The models are those of the
files, so this can run beside a training, after each of its saves.

    prior        cross-entropy, nats per code
    generator    diffusion loss, given the pictures' own codes, with 10%, 50% and 90% of the tokens masked; masks,
                 timesteps and noise are the same at every call
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoints
import data
import sample
from faults import run_script
from runtime import UserError, refuse, rng

SHARES = 0.1, 0.5, 0.9  # of masked tokens


def class_numbers(folder, found, classes):
    """The classes `found` in a folder -> their indices among `classes`, those of a run; both have [id, name].

    In official files without classes.tsv a class has no name but its id, which then suffices."""
    index = {(identity, name): i for i, (identity, name) in enumerate(classes)}
    numbers = [index.get((identity, name), index.get((identity, str(identity)))) for identity, name in found]
    refuse((number is None, f"{folder} has the class {identity} {name}, which the run does not know; give it the same "
            "class folders as the training had, empty ones too, or the same classes.tsv")
           for number, (identity, name) in zip(numbers, found))
    return numbers


def read(folder, size, classes):
    """The pictures of a folder, float32 [N, 3, size, size], and their classes [N] in the numbering of the run."""
    paths, labels, found = data.find_images(folder)
    numbers = class_numbers(folder, found, classes)
    pictures = [data.read_image(os.path.join(folder, path), size) for path in paths]
    kept = [i for i, picture in enumerate(pictures) if picture is not None]
    data.refuse_many([paths[i] for i in range(len(paths)) if pictures[i] is None], paths)
    return data.to_float(np.stack([pictures[i] for i in kept])), torch.tensor([numbers[labels[i]] for i in kept])


@torch.inference_mode()
def losses(models, images, classes, batch=64):
    """-> {kind: mean loss} of the prior and the generator in `models`, as far as they are there."""
    generator, total = models.get("generator"), {kind: 0.0 for kind in ("prior", "generator") if kind in models}
    for n, (x, k) in enumerate(zip(images.split(batch), classes.split(batch))):
        codes = models["vq"].encode(x) if "vq" in models else None
        if "prior" in total:
            total["prior"] += len(x) * float(models["prior"].loss(codes, k))
        if generator:
            draws = generator.draw(len(x), rng("cpu", "held out", n))
            latents = models["kl"].sample(models["kl"].encode(x), draws.posterior_noise)
            for share in SHARES:
                mask = (torch.rand(latents.shape[:2], generator=rng("cpu", "mask", n)).argsort(1)
                        < round(share * latents.shape[1])).float()
                loss = generator.loss(latents, k, codes, mask, draws.t, draws.noise)
                total["generator"] += len(x) / len(SHARES) * float(loss)
    return {kind: value / len(images) for kind, value in total.items()}


def main():
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        raise UserError("give a run and one or more folders: python tools/heldout.py RUN PICTURES.")
    run, *folders = sys.argv[1:]
    paths = {kind: os.path.join(run, f"{kind}.pt") for kind in checkpoints.CONFIGS}
    models = {kind: checkpoints.load_model(path, kind) for kind, path in paths.items() if os.path.exists(path)}
    generator = models.get("generator")
    refuse([(not {"prior", "generator"} & {*models}, f"{run} has neither prior.pt nor generator.pt; train one first"),
            ("vq" not in models and ("prior" in models or generator and generator.fusion.reads_codes),
             f"{run} has no vq.pt, which makes the codes"),
            (generator and "kl" not in models, f"{run} has no kl.pt, which makes the latents")])
    if generator:  # it was trained with its own scale, see sample.load_run
        models["kl"].set_scale(generator.about.get("latent_scale", models["kl"].config.scale))
        refuse([(models["kl"].config.scale is None, f"no file of {run} says the scale of the latents")])
    ours = [models[kind] for kind in ("prior", "generator") if kind in models]
    reads = lambda model, kind: kind in models and (kind == "kl" or model is not generator or model.fusion.reads_codes)
    refuse((reads(model, kind) and checkpoints.checksum(models[kind].state_dict()) != trained_with,
            f"{run}/{kind}.pt is not the tokenizer that the others were trained with; take the files of one training")
           for model in ours for kind, trained_with in model.about.get("tokenizers", {}).items())
    known = next((model.about["classes"] for model in ours if "classes" in model.about), None)  # else official files
    known = known or sample.official_classes(run, ours[0].config.classes)
    size = (generator.config.grid * models["kl"].config.merge * models["kl"].stride if generator else
            models["prior"].config.grid * models["vq"].stride)
    for folder in folders:
        images, classes = read(folder, size, known)
        figures = losses(models, images, classes)
        steps = {kind: models[kind].about.get("step") for kind in figures}  # None: an official file
        words = (f"{kind} {loss:.4f}" + (f" after {steps[kind]:,} steps" if steps[kind] else "")
                 for kind, loss in figures.items())
        print(f"{folder}, {len(images)} pictures: {', '.join(words)}")


if __name__ == "__main__":
    run_script(main)
