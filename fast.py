"""The same functions, faster: rewrites of the loops of prior.py, diffloss.py and generator.py. Read those first.

    fast.generate_codes(prior, classes, ...)         = prior.generate(classes, ...)
    fast.sample_head(head, z, ...)                   = head.sample(z, ...)
    fast.generate(model, classes, codes, ...)        = model.generate(classes, codes, ...)
    fast.loss(model, latents, classes, codes, draws) = model.loss(latents, classes, codes, ...) with these draws

The rewrites are exact to rounding: they reorder work, do repeated work once, and leave out what nobody reads.
(Where rounding decides between two codes, codes may differ; with dropout, `loss` agrees in distribution.) Tests
assert it for every fusion. train.py and sample.py call these functions, `sample.py --plain` the plain ones. Every
section says what is rewritten, why it is exact and, if measured, how many times as fast it is on 2 cores. The last two
sections depend on the machine (`FewRows`; CUDA graphs and torch.compile)."""
from typing import NamedTuple

import torch
from torch.nn import functional as F

from diffloss import T, Schedule, spaced_timesteps, tf32
from generator import make_plan
from prior import choose, rotate, uniform_numbers


# ------------------------------------------------------------------------------------------------------- the prior
# The plain cache grows by torch.cat: step i copies the keys and values of all i positions. Here the memory for all
# positions is allocated once, each step writes its own row, and attention reads the rows filled so far. Exact: the keys
# and values are the same. Together with `FewRows` 2.7 times as fast (batch 4, guided).

@torch.no_grad()
def generate_codes(prior, classes, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None, given=None,
                   watch=None):
    """Prior.generate in eval mode: same arguments, same codes (where rounding does not decide between two codes)."""
    c, B, L, device = prior.config, len(classes), prior.config.grid**2, classes.device
    uniform, guided = uniform_numbers(B, L, generator, device), cfg != 1
    if guided:
        classes = torch.cat([classes, torch.full_like(classes, c.classes)])
    x, codes = prior.class_embedding(classes), torch.empty(B, L, dtype=torch.long, device=device)    # x [B or 2B, D]
    caches, linear = [None] * c.layers, FewRows()
    for i in range(L):
        for n, block in enumerate(prior.blocks):
            qkv = linear(block.wqkv, block.attention_norm(x)).view(len(x), 3, c.heads, 1, -1)  # [B or 2B, 3, H, 1, D/H]
            qk, v = rotate(qkv[:, :2], prior.rope[i:i + 1]), qkv[:, 2]               # both rotated in one call
            if i == 0:
                caches[n] = v.new_empty(2, len(x), c.heads, L, v.shape[-1])          # v's dtype, by a GPU's autocast
            keys, values = caches[n]                                                 # each [B or 2B, H, L, D/H]
            keys[:, :, i], values[:, :, i] = qk[:, 1, :, 0], v[:, :, 0]
            y = F.scaled_dot_product_attention(qk[:, 0], keys[:, :, :i + 1], values[:, :, :i + 1])
            x = x + linear(block.wo, y.flatten(1))
            h = block.ffn_norm(x)
            x = x + linear(block.w2, F.silu(linear(block.w1, h)) * linear(block.w3, h))
        logits = linear(prior.output, prior.norm(x)).float()
        codes[:, i] = choose(logits, cfg, temperature, top_k, top_p, uniform[:, i])
        if given is not None:
            codes[:, i] = torch.where(given[:, i] < 0, codes[:, i], given[:, i])
        x = prior.code_embedding(codes[:, i].repeat(2 if guided else 1))
        if watch:
            watch()
    return codes


# --------------------------------------------------------------------------------------- the diffusion head's loop
# The plain loop computes net(x, t, z) at every step, but most of its arithmetic does not depend on x. All timesteps are
# embedded in one table, and z is projected once. Three fifths of the arithmetic are the adaLN projections of
# y = SiLU(embedded time + projected z). SiLU is not linear, so each pair of step and token needs projections of its
# own. But none depends on x, so one product computes those of several steps and reads the weights once. TF32 is allowed
# where HeadNet allows it. Exact: the same sums, earlier. With `FewRows` 3.2 times as fast (N = 4, guided).

ROWS = 1024  # at most so many rows in one product (but at least one step), because their modulations take memory


def modulations(net, y):
    """y [..., width] -> (shift, 1 + scale, gate) of each block, then (shift, 1 + scale) of the output."""
    out = []
    for layer in [*(block.modulation for block in net.blocks), net.output_modulation]:
        with tf32(layer is not net.output_modulation):
            parts = layer(y).chunk(layer.out_features // y.shape[-1], dim=-1)
        parts[1].add_(1)  # in place: scale becomes 1 + scale
        out.append(parts)
    return out


def body(net, x, mods, j, linear):
    """The rest of HeadNet.forward, with step j of mods = modulations(...). addcmul(a, b, c) is a + b * c."""
    with tf32(False):
        x = net.input(x)                                                             # [N or 2N, width]
        with tf32():
            for block, (shift, scale, gate) in zip(net.blocks, mods):  # scale includes 1; zip stops before mods[-1]
                h = torch.addcmul(shift[j], block.norm(x), scale[j])
                h = linear(block.mlp[2], F.silu(linear(block.mlp[0], h)))
                x = torch.addcmul(x, gate[j], h)
        shift, scale = mods[-1]
        return net.output(torch.addcmul(shift[j], F.layer_norm(x, x.shape[-1:], eps=1e-6), scale[j]))


@torch.no_grad()
def sample_head(head, z, z_null=None, cfg=1.0, steps=100, temperature=1.0, noise=None, generator=None, t_max=T - 1,
                graphs=None, linear=None):
    """DiffusionHead.sample: same arguments, same tokens. graphs: a Graphs, on CUDA. linear: a FewRows."""
    N, C, s, guided = len(z), head.config.token_dim, Schedule(spaced_timesteps(steps, t_max)), cfg != 1
    if noise is None:
        noise = torch.randn(steps + 1, N, C, generator=generator, device=z.device)
    with torch.autocast(z.device.type, enabled=False), tf32(False):
        z = (torch.cat([z, z_null]) if guided else z).float()                        # [N or 2N, D]
        # [S, width], S = steps; head.timesteps[t] is t, but on the device already: the host need not wait for a copy
        times = head.net.embed_time(torch.stack([head.timesteps[t] for t in s.timesteps]))
        cfg = torch.full((), float(cfg), device=z.device)  # a tensor: one graph serves every guidance
        loop = lambda *inputs: reverse(head, s, temperature, linear or FewRows(), *inputs)
        if graphs is None:
            return loop(z, times, noise, cfg)
        return graphs((head, N, guided, steps, t_max, temperature), loop, z, times, noise, cfg)


def reverse(head, s: Schedule, temperature, linear, z, times, noise, cfg):
    """The reverse steps. z [N, D], or [2N, D]: N rows, then N null rows; times [S, width]; noise [S+1, N, C]."""
    net, N, C, S = head.net, noise.shape[1], noise.shape[2], len(times)
    projected = net.cond(z)                                                          # [N or 2N, width]
    count = max(1, ROWS // len(z))                                                   # steps per adaLN product
    x = noise[0]
    for k, i in enumerate(reversed(range(S))):
        if k % count == 0:  # the modulations of the next `count` steps, in the order of s: first to i
            first = max(0, i + 1 - count)
            mods = modulations(net, F.silu(times[first:i + 1, None] + projected))    # each [i+1-first, N or 2N, width]
        out = body(net, x.repeat(len(z) // N, 1), mods, i - first, linear)
        eps, v = out[:N].chunk(2, dim=-1)
        if len(z) > N:
            null = out[N:, :C]
            eps = null + cfg * (eps - null)
        x = s.mean_x0[i] * (s.x_from_xt[i] * x - s.x_from_eps[i] * eps) + s.mean_xt[i] * x
        if i > 0:
            logvar = head.log_variance(v, s.min_logvar[i], s.max_logvar[i])
            x = x + (0.5 * logvar).exp() * noise[k + 1] * temperature
    return x


# --------------------------------------------------------------------------------------------------- the generator
# 1. Order of generation. Attention knows positions only from the tables added to its rows, so rows may stand in any
#    order. Here they stand in that of generation: visible tokens, those of this iteration, the others. Each group is
#    a slice whose bounds the host knows. The plain loop selects by a mask, so the host waits until a GPU has counted.
# 2. Fusion once. Class and codes do not change during sampling. So the fusion's output, and each cross-attention's
#    keys and values of it, are computed once per image; those of the null class once for all images (prepare_null).
# 3. Last block. Only the tokens of this iteration are used after the last decoder block. Its keys and values come from
#    all rows (queries too, as they are one product); what follows runs for these tokens only.
# 4. One batch. Both branches of guidance go through the network together.
# Exact: each row attends to the same rows. With the head's loop 1.7 times as fast (MAR-B, 64 iterations).

class Prepared(NamedTuple):
    """A fusion.Fused for many iterations, with keys and values [2, B, H, L_q, D/H] (or None) for each block."""
    prefix: torch.Tensor
    mask_codes: torch.Tensor | None
    encoder: list
    decoder: list


@torch.no_grad()
def prepare(model, classes, codes) -> Prepared:
    fused = model.fuse(classes, codes)
    read = lambda blocks: [None if b.cross is None else b.cross.attention.keys_values(fused.context) for b in blocks]
    return Prepared(fused.prefix, fused.mask_codes, read(model.encoder_blocks), read(model.decoder_blocks))


def prepare_null(model) -> Prepared:
    """The Prepared of one null image, for all calls of `generate` until the weights change."""
    c, device = model.config, model.mask_token.device
    codes = torch.zeros(1, c.codes, dtype=torch.long, device=device)  # the fake code replaces them
    return prepare(model, torch.full((1,), c.classes, device=device), codes)


def with_null(images: Prepared, null: Prepared) -> Prepared:
    """B images, followed by B copies of the null image."""
    join = lambda a, b, dim: None if a is None else torch.cat([a, b.expand(*a.shape)], dim)
    blocks = lambda a, b: [join(x, y, 1) for x, y in zip(a, b)]
    return Prepared(join(images.prefix, null.prefix, 0), join(images.mask_codes, null.mask_codes, 0),
                    blocks(images.encoder, null.encoder), blocks(images.decoder, null.decoder))


def rows_at(x, where):
    """x [B or 1, L, D], where [B, n] positions -> [B, n, D]."""
    return x.expand(len(where), -1, -1).gather(1, where[..., None].expand(-1, -1, x.shape[-1]))


def encoder_rows(model, prefix, latents, visible):
    """latents [B, V, C] at positions visible [B, V] -> the encoder's input [B, P+V, D]."""
    P, table = model.fusion.prefix_rows, model.encoder_positions
    x = model.latent_in(latents) + rows_at(table[:, P:], visible)
    return model.encoder_in_norm(torch.cat([prefix + table[:, :P], x], dim=1))


def decoder_rows(model, encoded, mask_codes, order):
    """encoded [B, P+V, D], order [B, L] with the V visible positions first -> the decoder's input [B, P+L, D]."""
    P, table = model.fusion.prefix_rows, model.decoder_positions
    others = order[:, encoded.shape[1] - P:]
    tokens = model.mask_token if mask_codes is None else model.mask_token + mask_codes
    tokens = rows_at(tokens.expand(-1, order.shape[1], -1), others)                  # [B, L-V, D]
    x = torch.cat([model.decoder_in(encoded), tokens], dim=1)
    return x + torch.cat([table[:, :P].expand(len(x), -1, -1), rows_at(table[:, P:], order)], dim=1)


def run_block(block, x, keys_values=None, rows=slice(None)):
    """generator.Block.forward in eval mode, for some rows: x [B, R, D] -> those that the slice `rows` selects."""
    B, R, D = x.shape
    q, k, v = block.qkv(block.norm1(x)).view(B, R, 3, block.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, R, D/H]
    y = F.scaled_dot_product_attention(q[:, :, rows], k, v)
    x = x[:, rows] + block.proj(y.transpose(1, 2).flatten(2))
    if block.cross is not None:
        x = x + block.cross.attention.attend(block.cross.norm(x), keys_values)      # = block.cross(x, context)
    return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))


def hidden(model, latents, order, a, b, prepared):
    """Generator.hidden: z [B, b-a, D] of the positions order[:, a:b], given the latents [B, a, C] of order[:, :a]."""
    P = model.fusion.prefix_rows
    x = encoder_rows(model, prepared.prefix, latents, order[:, :a])
    for block, keys_values in zip(model.encoder_blocks, prepared.encoder):
        x = run_block(block, x, keys_values)
    x = decoder_rows(model, model.encoder_norm(x), prepared.mask_codes, order)
    for block, keys_values in zip(model.decoder_blocks[:-1], prepared.decoder):
        x = run_block(block, x, keys_values)
    x = run_block(model.decoder_blocks[-1], x, prepared.decoder[-1], slice(P + a, P + b))
    return model.decoder_norm(x) + rows_at(model.output_positions, order[:, a:b])


@torch.no_grad()
def generate(model, classes, codes, iterations=64, steps=100, cfg=4.0, schedule="linear", temperature=1.0,
             orders=None, noise=None, generator=None, t_max=T - 1, cfg_from=0.0, start=None, watch=None, null=None,
             graphs=None):
    """Generator.generate: same arguments, same latents, in eval mode. null: prepare_null(model); graphs: a Graphs."""
    B, L, C = len(classes), model.config.grid**2, model.config.token_dim
    plan = make_plan(B, L, iterations, steps, cfg, schedule, cfg_from, orders, generator, start, classes.device)
    # Iteration k sees order[:, :bounds[k]]; it draws order[:, bounds[k]:bounds[k+1]], in raster order, like the noise.
    bounds = [plan.kept] + [L - m for m in plan.masked]
    first_to_last = plan.orders.flip(1)  # plan.orders lists what is drawn first at its end
    parts = [first_to_last[:, a:b].sort(1).values for a, b in zip([0] + bounds, bounds)]  # kept tokens first
    order = torch.cat(parts, dim=1)                                                  # [B, L]
    raster = order.argsort(1)                                                        # the inverse permutation

    images = prepare(model, classes, codes)
    both = with_null(images, null or prepare_null(model)) if any(g != 1 for g in plan.cfg) else None
    x, linear = torch.zeros(B, L, C, device=classes.device), FewRows()               # x is in the order of generation
    if start is not None:
        x[:, :plan.kept] = rows_at(start[0], order[:, :plan.kept])
    for k, (a, b) in enumerate(zip(bounds, bounds[1:])):
        if plan.cfg[k] != 1:
            z = hidden(model, x[:, :a].repeat(2, 1, 1), order.repeat(2, 1), a, b, both)                 # [2B, n, D]
            z, z_null = z.flatten(0, 1).chunk(2)                                     # each [N, D]
        else:
            z, z_null = hidden(model, x[:, :a], order, a, b, images).flatten(0, 1), None
        noise_k = plan.draw_noise(k, C) if noise is None else noise[k]
        drawn = sample_head(model.head, z, z_null, plan.cfg[k], plan.steps[k], temperature, noise_k, t_max=t_max,
                            graphs=graphs, linear=linear)
        x[:, a:b] = drawn.view(B, b - a, C)
        if watch:
            watch(rows_at(x, raster))
    return rows_at(x, raster)


# ----------------------------------------------------------------------------------------------- the training step
# `loss` puts visible tokens first, as in 1. above. It computes the head's loss for one draw of (t, noise) after the
# other: tensors are M times smaller, and a CPU's allocator keeps small blocks, while it fetches large ones anew. What
# all draws share is computed once: projected z, and a table of all T embedded timesteps. Exact: draws have equally many
# rows, so the mean of their means is the mean of all. Only 1.02 times as fast on 2 cores (d2c-b, batch 8).

def head_net(net, z):
    """-> a function like HeadNet.forward, (x_t, t, z) -> [..., N, 2C], that uses this z in place of its argument."""
    with torch.autocast(z.device.type, enabled=False), tf32(False):
        times, projected = net.embed_time(torch.arange(T, device=z.device)), net.cond(z.float())
    return lambda x_t, t, _: net.denoise(x_t, F.silu(F.embedding(t, times) + projected))


def loss(model, latents, classes, codes, draws):
    """Generator.loss with these draws. The host knows draws.masked, so it never waits for the device to count."""
    L, n, P = latents.shape[1], draws.masked, model.fusion.prefix_rows
    order = draws.mask.argsort(dim=1, stable=True)                                   # [B, L], visible positions first
    visible, at = order[:, :L - n], order[:, L - n:]                                 # positions [B, L-n] and [B, n]
    fused = model.fuse(classes.masked_fill(draws.drop, model.config.classes), codes)
    x = encoder_rows(model, fused.prefix, rows_at(latents, visible), visible)
    for block in model.encoder_blocks:
        x = block(x, fused.context)
    x = decoder_rows(model, model.encoder_norm(x), fused.mask_codes, order)
    for block in model.decoder_blocks:
        x = block(x, fused.context)
    z = model.decoder_norm(x[:, P + L - n:]) + rows_at(model.output_positions, at)                    # [B, n, D]
    x, z = rows_at(latents, at).flatten(0, 1), z.flatten(0, 1)                       # [N, C] and [N, D]
    net = head_net(model.head.net, z)
    losses = [model.head.loss(x, z, t.gather(1, at).flatten(), rows_at(noise, at).flatten(0, 1), net).mean()
              for t, noise in zip(draws.t, draws.noise)]
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------------ the machine: products of few rows
# A step of the prior has one row per image, a step of the head one per token; with guidance two. Reading the weights W
# of a layer then takes longer than the arithmetic, and MKL, PyTorch's library for nn.Linear on a CPU, reads a large W
# slowly. oneDNN (mkldnn) reads a copy of W in its own layout faster. Each call of generate_codes or generate makes the
# copies once. Exact: the same products are summed. 1.5 to 3 times as fast, with at most 64 rows and a large W.

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class FewRows:
    """linear = FewRows(); linear(layer, x) is layer(x). Not for gradients or a CPU's autocast; W must not change."""

    def __init__(self):
        self.copies = {}

    def __call__(self, layer, x):
        W, rows = layer.weight, x.shape[:-1].numel()
        if not (ONEDNN and x.is_cpu and rows <= 64 and W.numel() >= 2**19):
            return layer(x)
        if layer not in self.copies:
            self.copies[layer] = torch.ops.mkldnn._reorder_linear_weight(W, rows)    # serves other numbers of rows too
        return torch.ops.mkldnn._linear_pointwise(x, self.copies[layer], layer.bias, "none", [], "")  # no activation


# --------------------------------------------------------------------- the machine: CUDA graphs and torch.compile
# The head's loop launches thousands of small kernels, and with few tokens a launch may take longer than a kernel. A
# graph records the launches once and replays all with one call. Exact: the same kernels. Its gain was never measured.

class Graphs:
    """CUDA graphs of functions of tensors, one per key: `graphs(key, function, *inputs)` returns function(*inputs).

    The key must hold everything that the function depends on besides the values of its inputs. A graph reads weights
    at the addresses that it recorded: it sees weights that changed in place, but not those that moved to new memory."""

    def __init__(self):
        self.recorded = {}

    def record(self, function, inputs):
        """Records function(*inputs) -> replay, out: replay() computes `out` anew from what `inputs` hold then."""
        if not self.recorded:  # here and not in __init__, because it needs a GPU
            self.pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*inputs)  # libraries set themselves up at their first call, which must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = function(*inputs)
        return graph.replay, out

    def __call__(self, key, function, *inputs):
        if key not in self.recorded:
            buffers = [x.clone() for x in inputs]
            self.recorded[key] = buffers, *self.record(function, buffers)
        buffers, replay, out = self.recorded[key]
        for buffer, x in zip(buffers, inputs):
            buffer.copy_(x)
        replay()
        return out.clone()  # the next graph may use the same memory


def compile_blocks():
    """Compiles run_block with torch.compile, for all later calls of `generate`."""
    global run_block
    run_block = torch.compile(run_block, dynamic=True)  # the number of rows changes with every iteration
