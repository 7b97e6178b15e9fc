"""TensorFlow's Inception of 2015-12-05, the network behind FID, sFID, Inception Score, precision and recall.

    Inception(weights_path)(images uint8 [B, 3, h, w]) -> a dictionary of
    pool     [B, 2048]  for FID, precision and recall (TensorFlow's pool_3)
    spatial  [B, 2023]  for sFID: the first 7 channels of a 17x17 map, row by row with channels last
    logits   [B, 1008]  for the Inception Score, without the classifier's bias

The architecture is Inception v3 (Szegedy et al. 1512.00567) under torchvision's names, as in the weights file that
pytorch-fid and torch-fidelity publish. This graph differs from torchvision's model in three points: average pooling
does not count the padding, the last block pools by maximum, and the weights come from another training. fid.py calls
Inception, and `measure` to run it over many images. tools/bench.py compares it with Network, which is not folded.
"""
import hashlib
import os
import re
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import checkpoints
from runtime import UserError, gather

WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth",       # pytorch-fid's name
           "weights-inception-2015-12-05-6726825d.pth")  # torch-fidelity's name for the same tensors


# ------------------------------------------------------------------------------------------------------------ blocks

class ConvBN(nn.Module):
    """A unit: convolution without bias, batch norm, ReLU. It keeps the size of the map if the stride is 1, with pad."""

    def __init__(self, cin, cout, kernel=(1, 1), stride=1, pad=True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """Moves the batch norm into the convolution: weight * scale, bias - mean * scale, computed in float64."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        self.conv.weight = nn.Parameter((self.conv.weight.double() * scale[:, None, None, None]).float())
        self.conv.bias = nn.Parameter((self.bn.bias.double() - self.bn.running_mean.double() * scale).float())
        self.bn = nn.Identity()


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)


# Each block runs its branches on the same input. A branch is a chain of units; the names count the units. The order in
# torch.cat fixes the channel numbers, on which the next block's weights and sFID depend.

class InceptionA(nn.Module):
    """[B, cin, 35, 35] -> [B, 224 + pool, 35, 35]"""

    def __init__(self, cin, pool):
        super().__init__()
        self.branch1x1, self.branch_pool = ConvBN(cin, 64), ConvBN(cin, pool)
        self.branch5x5_1, self.branch5x5_2 = ConvBN(cin, 48), ConvBN(48, 64, (5, 5))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvBN(cin, 64), ConvBN(64, 96, (3, 3))
        self.branch3x3dbl_3 = ConvBN(96, 96, (3, 3))

    def forward(self, x):
        b5x5 = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), b5x5, double, self.branch_pool(average(x))], dim=1)


class InceptionB(nn.Module):
    """[B, 288, 35, 35] -> [B, 768, 17, 17]"""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvBN(288, 384, (3, 3), stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvBN(288, 64), ConvBN(64, 96, (3, 3))
        self.branch3x3dbl_3 = ConvBN(96, 96, (3, 3), stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], dim=1)


class InceptionC(nn.Module):
    """[B, 768, 17, 17] -> [B, 768, 17, 17]. Each 7x7 convolution is split into 1x7 and 7x1, with `mid` channels."""

    def __init__(self, mid):
        super().__init__()
        self.branch1x1, self.branch_pool = ConvBN(768, 192), ConvBN(768, 192)
        self.branch7x7_1, self.branch7x7_2 = ConvBN(768, mid), ConvBN(mid, mid, (1, 7))
        self.branch7x7_3 = ConvBN(mid, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = ConvBN(768, mid), ConvBN(mid, mid, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = ConvBN(mid, mid, (1, 7)), ConvBN(mid, mid, (7, 1))
        self.branch7x7dbl_5 = ConvBN(mid, 192, (1, 7))

    def forward(self, x):
        b7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), b7x7, double, self.branch_pool(average(x))], dim=1)


class InceptionD(nn.Module):
    """[B, 768, 17, 17] -> [B, 1280, 8, 8]"""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = ConvBN(768, 192), ConvBN(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = ConvBN(768, 192), ConvBN(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = ConvBN(192, 192, (7, 1)), ConvBN(192, 192, (3, 3), stride=2)

    def forward(self, x):
        b7x7x3 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), b7x7x3, halve(x)], dim=1)


class InceptionE(nn.Module):
    """[B, cin, 8, 8] -> [B, 2048, 8, 8]. Two branches end in a 1x3 and a 3x1 convolution side by side (a and b)."""

    def __init__(self, cin, pooling):
        super().__init__()
        self.pooling = pooling
        self.branch1x1, self.branch3x3_1, self.branch_pool = ConvBN(cin, 320), ConvBN(cin, 384), ConvBN(cin, 192)
        self.branch3x3_2a, self.branch3x3_2b = ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvBN(cin, 448), ConvBN(448, 384, (3, 3))
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1))

    def forward(self, x):
        b3x3, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(b3x3), self.branch3x3_2b(b3x3),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pooling(x))], dim=1)


# ----------------------------------------------------------------------------------------------------------- network

class Network(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1] -> pool, spatial and logits. Its state_dict has the published keys."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = ConvBN(3, 32, (3, 3), stride=2), ConvBN(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = ConvBN(32, 64, (3, 3)), ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = InceptionB(), InceptionC(128), InceptionC(160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(160), InceptionC(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = InceptionD(), InceptionE(1280, average), InceptionE(2048, maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):                                                           # [B, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))           # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))                        # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))                   # [B, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))           # [B, 768, 17, 17]
        # sFID reads TensorFlow's mixed_6/conv after its ReLU. That is branch1x1 of Mixed_6d, the first in torch.cat.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)                           # [B, 17*17*7]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))           # [B, 2048, 8, 8]
        pool = x.mean((2, 3))                                                       # [B, 2048]
        # The classifier has a bias, but the evaluators compute the Inception Score without it.
        return {"pool": pool, "spatial": spatial, "logits": F.linear(pool, self.fc.weight)}


def exact_convolutions():
    """A context without TF32. cuDNN uses TF32 by default, and its 10 bits can move the third decimal of an FID."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def resize_tf1(images):
    """uint8 [B, 3, h, w] -> [B, 3, 299, 299] in [-1, 1). TensorFlow 1's bilinear: no antialiasing, no half pixel.

    The operations and their order are those of the graph, so the result is equal bit for bit.
    """
    def neighbours(n):  # a target pixel takes its value at source = target * n / 299, between pixels low and low + 1
        source = torch.arange(299, dtype=torch.float32) * (torch.tensor(float(n)) / 299)
        low = source.long()
        return [v.to(images.device) for v in (low, (low + 1).clamp(max=n - 1), source - low)]

    x = images.float()
    (top, bottom, dy), (left, right, dx) = neighbours(x.shape[2]), neighbours(x.shape[3])
    x = x[..., left] + (x[..., right] - x[..., left]) * dx                          # [B, 3, h, 299]
    x = x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * dy[:, None]         # [B, 3, 299, 299]
    return (x - 128) / 128


def resize_torch(images):
    """uint8 [B, 3, h, w] -> [B, 3, 299, 299] in [-1, 1]: pytorch-fid's bilinear, with half-pixel centres.

    Against resize_tf1 it moves `pool` by about 0.3% of its spread, so statistics of the two must never be mixed.
    """
    return F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1


# ------------------------------------------------------------------------------------------------------ weights file

class Inception(nn.Module):
    """The network with the weights of a file, its batch norms folded, frozen, behind one of the two resizes.

    resize: "tf1" (torch-fidelity, ADM) or "torch" (pytorch-fid). UserError if the file is damaged or another network's.
    """

    def __init__(self, weights_path: str, resize: str = "tf1"):
        super().__init__()
        self.resize = {"tf1": resize_tf1, "torch": resize_torch}[resize]
        self.about = {"file": os.path.basename(weights_path), "sha256": file_hash(weights_path), "resize": resize}
        start = re.search(r"-([0-9a-f]{8})\.\w+$", weights_path)  # torch.hub's habit: the hash begins with these digits
        if start and not self.about["sha256"].startswith(start[1]):
            raise UserError(f"{weights_path} is damaged: its SHA-256 does not begin with {start[1]}; get it again.")
        with torch.device("meta"):  # takes no memory and no time; the file's tensors replace these
            self.network = Network()
        state = checkpoints.read(weights_path)
        shapes = lambda state: {(k, getattr(v, "shape", "none")) for k, v in state.items()
                                if not k.endswith("num_batches_tracked")}
        if different := sorted(shapes(state) ^ shapes(self.network.state_dict()), key=str):
            raise UserError(f"{weights_path} is not the Inception of pytorch-fid and torch-fidelity: see the tensor "
                            f"{different[0][0]!r}; torchvision's Inception has other weights and cannot be used.")
        self.network.load_state_dict(state, assign=True)
        for module in self.network.modules():
            if isinstance(module, ConvBN):
                module.fold()
        self.float().eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    @torch.no_grad()
    def forward(self, images):
        with exact_convolutions():
            return self.network(self.resize(images))


def file_hash(path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from None


def find_inception(path: str | None) -> str:
    """-> the weights file: `path`, else $D2C_INCEPTION, else the one that an evaluator left in torch.hub's cache."""
    hub = os.path.join(torch.hub.get_dir(), "checkpoints")
    named = path or os.environ.get("D2C_INCEPTION")
    for place in [named] if named else [os.path.join(hub, name) for name in WEIGHTS]:
        if os.path.isfile(place):
            return place
    raise UserError(f"{f'{named} is not there' if named else 'the Inception weights are missing'}: get {WEIGHTS[0]} "
                    f"(96 MB, release fid_weights of mseitzer/pytorch-fid on GitHub), then give --inception FILE, set "
                    f"D2C_INCEPTION, or put it into {hub}.")


# ---------------------------------------------------------------------------------------- features of many images

def products(rows):
    """Rows [n, D] -> the sum over the rows of (1, row)' (1, row), [1 + D, 1 + D]: n, first and second moments at once.

    Such sums of batches and of ranks can be added. Float64, because float32 would move an FID by 2e-5.
    """
    rows = (rows.cpu() if rows.device.type == "mps" else rows).double()  # MPS has no float64
    rows = F.pad(rows, (1, 0), value=1.0)
    return rows.T @ rows


def mean_and_covariance(products):
    """Summed products [1 + D, 1 + D] -> mean [D], covariance [D, D] divided by n - 1, as np.cov does."""
    n = int(products[0, 0])
    if n < 2:
        raise UserError(f"{n} images have no covariance; an FID needs many images, in papers 50,000.")
    mean = products[0, 1:] / n
    return mean, (products[1:, 1:] - n * mean.outer(mean)) / (n - 1)


def measure(images, features, statistics: set, rows: set, world, batch: int):
    """Sends images (fid.Images) through `features`, which maps a batch [B, 3, H, W] to a dictionary of name: [B, D].

    -> two dictionaries: (mean, covariance) of each name in `statistics`, and all rows [N, D] of each name in `rows`,
    in the order of the images. Only rank 0 gets them; the dictionaries of the other ranks are empty.
    """
    starts = range(0, images.count, batch)
    # Each rank takes a part of the batches, never of one batch: rounding inside the network depends on which images
    # share a batch, and the features must not depend on the number of ranks.
    starts = starts[len(starts) * world.rank // world.size:len(starts) * (world.rank + 1) // world.size]
    batches = images.batches(range(i, min(i + batch, images.count)) for i in starts)
    sums, kept = {}, {name: [] for name in rows}
    for pixels in tqdm(batches, images.about["path"], len(starts), unit="batch", disable=world.rank > 0):
        out = features(pixels.to(world.device))
        sums = {name: sums.get(name, 0) + products(out[name]) for name in statistics}
        for name in rows:
            kept[name].append(out[name].cpu())
    ranks = gather(({name: total.cpu() for name, total in sums.items()}, kept))
    if ranks is None:
        return {}, {}
    return ({name: mean_and_covariance(sum(sums.get(name, 0) for sums, _ in ranks)) for name in statistics},
            {name: torch.cat([part for _, kept in ranks for part in kept[name]]) for name in rows})
