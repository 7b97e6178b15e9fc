"""Every named size and training recipe: `--preset NAME`.

A Preset holds the config of each component and a Recipe per stage. train.py fills in, or replaces, what follows from
data and other components: `classes`, `vocab`, `code_dim`, `token_dim`, grids. sample.py's flags override Sampling."""
import re
from dataclasses import dataclass, field, replace

from generator import GeneratorConfig
from prior import PriorConfig
from runtime import refuse
from tokenizers import KLConfig, VQConfig


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up, a constant rate and a linear decay; gradient clipping; a moving average (EMA)."""
    batch: int                  # images per optimizer step, over all ranks
    epochs: float
    lr: float                   # at batch 256; train.py scales it linearly with the batch
    warmup: float = 0.0         # epochs
    decay: float = 0.0          # share of all steps, the last ones, over which the rate falls to zero
    balanced: bool = False      # show every class equally often (stages 1 and 2)
    weight_decay: float = 0.02
    clip: float = 3.0           # gradient norm
    ema: float = 0.9999
    micro: int = 64             # images per rank and pass at most; a larger batch takes several passes, to save memory

    def steps(self, images: int, batch: int) -> int:
        """Optimizer steps of the epochs over this many images; --batch may replace self.batch."""
        return max(1, round(self.epochs * images / batch))


flag = lambda default, text: field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Sampling:
    """What a run recommends. Defaults: D2C 5.1, LlamaGen's prior guidance, MAR's steps. Each field is a flag."""
    iterations: int = flag(64, "rounds that the generator takes to draw all tokens")
    steps: int = flag(100, "steps of the diffusion head for each token")
    anneal: str = flag("", "A:B: A steps in the first iteration, falling to B in the last; replaces --steps")
    cfg: float = flag(4.0, "guidance of the generator; 1: none")
    cfg_from: float = flag(0.0, "an iteration whose guidance is below this skips the null branch")
    schedule: str = flag("linear", "guidance of the generator: constant, or linear (it grows with the drawn tokens)")
    temperature: float = flag(1.0, "the generator scales the noise of the head's steps by it")
    prior_cfg: float = flag(2.0, "guidance of the prior; 1: none")
    prior_temperature: float = flag(0.99, "the prior divides its logits by it")
    top_k: int = flag(0, "the prior draws from its k likeliest codes; 0: from all")
    top_p: float = flag(1.0, "the prior draws from the fewest codes that have this probability together")
    t_max: int = flag(999, "timestep where the diffusion head starts; below 999, its first steps magnify errors less")


@dataclass(frozen=True)
class Preset:
    image_size: int
    vq: VQConfig
    kl: KLConfig
    prior: PriorConfig
    generator: GeneratorConfig
    condition: str              # where the generator's codes come from in training; see true_share
    recipes: tuple              # of the stages 0, 1 and 2
    sampling: Sampling


def true_share(condition: str) -> tuple:
    """--condition -> the share of true codes at the start and at the end of stage 2; the prior draws the other codes.

    The share changes linearly in between. mixed is MixAR's training-inference mixture (2511.12181)."""
    text = {"resampled": "mixed:0", "ground_truth": "mixed:1"}.get(condition, condition)
    found = re.fullmatch(r"mixed:(\d*\.?\d+)(?:-(\d*\.?\d+))?", text)
    shares = (float(found[1]), float(found[2] or found[1])) if found else None
    refuse([(condition == "teacher_forced", "--condition teacher_forced is now called resampled"),
            (not shares or max(shares) > 1, "--condition must be ground_truth, resampled, mixed:P or mixed:P-Q with "
             f"shares from 0 to 1, e.g. mixed:1-0.3, not {condition}")])
    return shares


def sized(preset: Preset, size: int | None) -> Preset:
    """--size: the preset for pictures of size x size pixels. Small presets take 1, 2 and 4 times their own size.

    At twice the size the same tokenizers make 4 times the codes. At 4 times the size they also get one level more, and
    twice the z_channels, so that a code or latent stands for 4 times as many pixels. Prior and generator fit them."""
    size = preset.image_size if size is None else size
    possible = [preset.image_size * times for times in ((1, 2, 4) if preset.vq.linear_path else (1,))]
    nearest = min(possible, key=lambda pixels: abs(pixels - size))
    refuse([(size != nearest, f"--size {size} is not possible with this preset; take the nearest, --size {nearest}")])
    preset, deeper = replace(preset, image_size=size), size == 4 * possible[0]
    deepen = lambda c: replace(c, ch_mult=(*c.ch_mult, c.ch_mult[-1]), z_channels=2 * c.z_channels)
    return replace(preset, vq=deepen(preset.vq), kl=deepen(preset.kl)) if deeper else preset


# LlamaGen's recipes for stages 0 and 1; MAR's batch, because D2C gives none. Sizes: D2C Table 1, MAR Table 3.
TOKENIZERS = Recipe(batch=128, epochs=40, lr=2e-4, weight_decay=0.05, clip=1.0)
PRIOR = Recipe(batch=256, epochs=300, lr=1e-4, weight_decay=0.05, clip=1.0)
MAR = Recipe(batch=2048, epochs=800, lr=1e-4, warmup=100, micro=32)
D2C = replace(MAR, lr=5e-5)
BASE, LARGE = GeneratorConfig(), GeneratorConfig(dim=1024, depth=16, heads=16, head_depth=8, head_width=1280)
VA_VAE = KLConfig(z_channels=32, decoder_attention=True, scale=None)  # DisCon's; the scale is measured


def imagenet(fusion, network, recipe, kl=KLConfig(), condition="resampled", sampling=Sampling()) -> Preset:
    """A preset of a paper: 256x256 pixels, 16x16 codes and tokens, LlamaGen's tokenizer and prior."""
    generator = replace(network, fusion=fusion, token_dim=kl.token_dim)
    return Preset(256, VQConfig(), kl, PriorConfig(), generator, condition, (TOKENIZERS, PRIOR, recipe), sampling)


# The tokenizers of the small presets start at half resolution, in parallel to a linear path of tiles. In tiny a code
# stands for 4x4 pixels and a latent for 8x8: each latent has the four codes of its own place, which mask_tokens uses.
# mask_min is 0.1: sampling draws most tokens when fewer than MAR's 70% are masked. queries, qformer_*: for qformer.
SMALL = dict(ch=32, ch_mult=(1, 2, 2), unshuffle=2, linear_path=True, z_channels=32)
TINY = Preset(64, VQConfig(**dict(SMALL, ch_mult=(1, 2)), blocks=1, codebook_size=512, lapped=True),
    KLConfig(**SMALL, blocks=2, lapped=True, noise=0.6, scale=None),
    PriorConfig(dim=192, layers=6, heads=3, vocab=512, grid=16, dropout=0.1),
    GeneratorConfig("mask_tokens", dim=192, depth=4, heads=3, prefix=4, token_dim=32, grid=8, code_grid=16,
                    head_depth=3, head_width=432, batch_mul=2, mask_min=0.1, dropout=0.0, queries=2,
                    qformer_width=192, qformer_layers=2, qformer_heads=3),
    "ground_truth",
    (Recipe(32, 10, 8e-3, warmup=0.5, decay=0.5, weight_decay=0.0, clip=1.0, ema=0.999),
     Recipe(32, 31, 9.6e-3, warmup=1.0, decay=0.5, balanced=True, weight_decay=0.05, clip=1.0, ema=0.998),
     Recipe(32, 34, 9.6e-3, warmup=1.0, decay=0.5, balanced=True, ema=0.999)),
    Sampling(iterations=8, steps=25, cfg=2.0, prior_cfg=4.5, t_max=950))

# Everything at its smallest, for the tests: it trains in seconds on a CPU.
SMALLEST = dict(SMALL, ch_mult=(1, 1, 1), blocks=1)
TOY = Preset(32, VQConfig(**dict(SMALLEST, z_channels=16), codebook_size=64),
    KLConfig(**dict(SMALLEST, z_channels=8), scale=None),
    PriorConfig(dim=64, layers=2, heads=2, vocab=64, grid=4, dropout=0.0),
    replace(TINY.generator, fusion="cross_attention", dim=64, depth=2, heads=2, token_dim=8, grid=4, code_grid=0,
            head_depth=2, head_width=64, batch_mul=4, qformer_width=64, qformer_layers=1, qformer_heads=2),
    "ground_truth",
    (Recipe(16, 20, 8e-3, ema=0.99), Recipe(16, 60, 1.6e-2, ema=0.99), Recipe(16, 120, 1.6e-2, ema=0.99)),
    Sampling(iterations=8, steps=25, cfg=1.5, t_max=950))

# Parameters: of the generator, plus the prior if its codes are read. DisCon's and MixAR's own recipes are not known.
PRESETS = {
    "d2c-b":       imagenet("qformer", BASE, D2C),                                                # 362M: D2C Table 1
    "d2c-b-cross": imagenet("cross_attention", BASE, D2C),                                        # 389M
    "d2c-l":       imagenet("qformer", LARGE, D2C),                                               # 633M
    "discon-b":    imagenet("prefix", BASE, MAR, VA_VAE, "ground_truth"),                         # 333M
    "discon-l":    imagenet("prefix", LARGE, MAR, VA_VAE, "ground_truth"),                        # 603M
    "mixar-b":     imagenet("mask_tokens", BASE, MAR, condition="mixed:0.5"),                     # 332M
    "mar-b":       imagenet("none", BASE, MAR, sampling=Sampling(iterations=256, cfg=2.9)),       # 208M: MAR Table 3
    "mar-l":       imagenet("none", LARGE, MAR, sampling=Sampling(iterations=256, cfg=3.0)),      # 478M
    "tiny":        TINY,           # mask_tokens; weights/tiny: 64x64 pixels, 16x16 codes, 8x8 latents
    "toy":         TOY,            # cross_attention; the tests: 32x32 pixels, 4x4 codes and latents
}
