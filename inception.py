"""TensorFlow's Inception of 2015-12-05, the network behind FID, sFID, Inception Score, precision and recall.

    Inception(weights_path)(images uint8 [B, 3, h, w]) -> a dictionary of
    pool     [B, 2048]  for FID, precision and recall (TensorFlow's pool_3)
    spatial  [B, 2023]  for sFID: the first 7 channels of a 17x17 map, row by row with channels last
    logits   [B, 1008]  for the Inception Score, without the classifier's bias

The architecture is Inception v3 (Szegedy et al. 1512.00567) under torchvision's names, as in the weights file that
pytorch-fid and torch-fidelity publish. This graph has 1008 classes, no auxiliary classifier, and other weights than
torchvision's model; its average pooling does not count the padding, and its last block pools by maximum."""
import hashlib
import os
import re
from functools import partial, reduce

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import checkpoints
from runtime import UserError

WEIGHTS = ("pt_inception-2015-12-05-6726825d.pth",       # pytorch-fid's name
           "weights-inception-2015-12-05-6726825d.pth")  # torch-fidelity's name for the same tensors


# ------------------------------------------------------------------------------------------------------------ blocks

class ConvBN(nn.Module):
    """A unit: convolution without bias, batch norm, ReLU. With stride 1 and pad it keeps the map's size."""

    def __init__(self, cin, cout, kernel=(1, 1), stride=1, pad=True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = partial(F.max_pool2d, kernel_size=3, stride=2)


class Branches(nn.Module):
    """Runs branches on the same input and concatenates their channels; the next block and sFID depend on the order.

    A branch is a list of steps: a pooling, a unit, or a pair of units that run side by side on the same input. The
    units get their published names: NAME_1, NAME_2a, NAME_2b, or the NAME of the branch alone if it has one unit."""

    def __init__(self, **branches):
        super().__init__()
        self.branches = list(branches.values())  # a plain list registers no modules
        for name, branch in branches.items():
            units = [step for step in branch if not isinstance(step, partial)]
            for i, step in enumerate(units, 1):
                numbered = f"{name}_{i}" if len(units) > 1 else name
                for letter, unit in zip("ab", step) if isinstance(step, tuple) else [("", step)]:
                    self.add_module(numbered + letter, unit)

    def forward(self, x):
        def run(x, step):
            return torch.cat([unit(x) for unit in step], dim=1) if isinstance(step, tuple) else step(x)

        return torch.cat([reduce(run, branch, x) for branch in self.branches], dim=1)


def inception_a(cin, pool):  # [B, cin, 35, 35] -> [B, 224 + pool, 35, 35]
    return Branches(branch1x1=[ConvBN(cin, 64)],
                    branch5x5=[ConvBN(cin, 48), ConvBN(48, 64, (5, 5))],
                    branch3x3dbl=[ConvBN(cin, 64), ConvBN(64, 96, (3, 3)), ConvBN(96, 96, (3, 3))],
                    branch_pool=[average, ConvBN(cin, pool)])


def inception_b():  # [B, 288, 35, 35] -> [B, 768, 17, 17]
    return Branches(branch3x3=[ConvBN(288, 384, (3, 3), stride=2)],
                    branch3x3dbl=[ConvBN(288, 64), ConvBN(64, 96, (3, 3)), ConvBN(96, 96, (3, 3), stride=2)],
                    branch_pool=[halve])


def inception_c(mid):  # [B, 768, 17, 17] -> the same shape. Each 7x7 convolution is split into 1x7 and 7x1.
    return Branches(branch1x1=[ConvBN(768, 192)],
                    branch7x7=[ConvBN(768, mid), ConvBN(mid, mid, (1, 7)), ConvBN(mid, 192, (7, 1))],
                    branch7x7dbl=[ConvBN(768, mid), ConvBN(mid, mid, (7, 1)), ConvBN(mid, mid, (1, 7)),
                                  ConvBN(mid, mid, (7, 1)), ConvBN(mid, 192, (1, 7))],
                    branch_pool=[average, ConvBN(768, 192)])


def inception_d():  # [B, 768, 17, 17] -> [B, 1280, 8, 8]
    return Branches(branch3x3=[ConvBN(768, 192), ConvBN(192, 320, (3, 3), stride=2)],
                    branch7x7x3=[ConvBN(768, 192), ConvBN(192, 192, (1, 7)), ConvBN(192, 192, (7, 1)),
                                 ConvBN(192, 192, (3, 3), stride=2)],
                    branch_pool=[halve])


def inception_e(cin, pooling):  # [B, cin, 8, 8] -> [B, 2048, 8, 8]
    return Branches(branch1x1=[ConvBN(cin, 320)],
                    branch3x3=[ConvBN(cin, 384), (ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1)))],
                    branch3x3dbl=[ConvBN(cin, 448), ConvBN(448, 384, (3, 3)),
                                  (ConvBN(384, 384, (1, 3)), ConvBN(384, 384, (3, 1)))],
                    branch_pool=[pooling, ConvBN(cin, 192)])


# ----------------------------------------------------------------------------------------------------------- network

class Network(nn.Module):
    """Images [B, 3, 299, 299] in [-1, 1] -> pool, spatial and logits. Its state_dict has the published keys."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = ConvBN(3, 32, (3, 3), stride=2), ConvBN(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = ConvBN(32, 64, (3, 3)), ConvBN(64, 80)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = inception_a(192, 32), inception_a(256, 64), inception_a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = inception_b(), inception_c(128), inception_c(160)
        self.Mixed_6d, self.Mixed_6e = inception_c(160), inception_c(192)
        self.Mixed_7a, self.Mixed_7b = inception_d(), inception_e(1280, average)
        self.Mixed_7c = inception_e(2048, maximum)
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
        return {"pool": pool, "spatial": spatial, "logits": F.linear(pool, self.fc.weight)}


def exact_convolutions():
    """A context without TF32. cuDNN's default is TF32, whose mantissa of 10 bits can move an FID's third decimal."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def resize_tf1(images):
    """uint8 [B, 3, h, w] -> [B, 3, 299, 299] in [-1, 1). TensorFlow 1's: no antialiasing, no half-pixel centres.

    The operations and their order are those of the graph, so the result is equal bit for bit."""
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

    Against resize_tf1 it moves `pool` by 0.25% of its spread, so statistics of the two must never be mixed."""
    return F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1


# ------------------------------------------------------------------------------------------------------ weights file

class Inception(nn.Module):
    """The network with the weights of a file, its batch norms folded, frozen, behind one of the two resizes.

    resize: "tf1" (torch-fidelity, ADM) or "torch" (pytorch-fid). UserError for a damaged or other file."""

    def __init__(self, weights_path: str, resize: str = "tf1", device="cpu"):
        super().__init__()
        self.resize = {"tf1": resize_tf1, "torch": resize_torch}[resize]
        state, sha256 = checkpoints.read(weights_path), file_hash(weights_path)
        self.about = {"file": os.path.basename(weights_path), "sha256": sha256, "resize": resize}
        start = re.search(r"-2015-12-05-([0-9a-f]{8})\.\w+$", weights_path)  # the hash's first digits, as in WEIGHTS
        if start and not sha256.startswith(start[1]):
            raise UserError(f"{weights_path} is damaged: its SHA-256 does not begin with {start[1]}; get it again.")
        with torch.device("meta"):  # takes no memory and no time; the file's tensors replace these
            self.network = Network()
        ours, file = ({(k, getattr(v, "shape", None)) for k, v in tensors.items() if "num_batches_tracked" not in k}
                      for tensors in (self.network.state_dict(), state))
        if different := sorted(ours ^ file, key=str):
            raise UserError(f"{weights_path} is not the Inception of pytorch-fid and torch-fidelity: see the tensor "
                            f"{different[0][0]!r}; torchvision's Inception has other weights and cannot be used.")
        self.network.load_state_dict(state, assign=True)  # PyTorch fills in num_batches_tracked
        self.eval().requires_grad_(False).double()  # in float64, folding rounds the weights once, at the end
        for unit in self.network.modules():
            if isinstance(unit, ConvBN):
                unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()
        layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
        self.to(device, torch.float32, memory_format=layout)  # channels last: 1.5 times as fast on a CPU

    @torch.no_grad()
    def forward(self, images):
        with exact_convolutions():
            return self.network(self.resize(images))


def file_hash(path) -> str:
    """SHA-256 of a file's content, in hexadecimal. The file is mapped, because it may hold 10 GB of images."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def find_inception(path: str | None) -> str:
    """-> the weights file: `path`, else $D2C_INCEPTION, else the one that an evaluator left in torch.hub's cache."""
    hub, named = os.path.join(torch.hub.get_dir(), "checkpoints"), path or os.environ.get("D2C_INCEPTION")
    for place in [named] if named else [os.path.join(hub, name) for name in WEIGHTS]:
        if os.path.isfile(place):
            return place
    raise UserError(f"{f'{named} is not there' if named else 'the Inception weights are missing'}: get {WEIGHTS[0]} "
                    f"(96 MB, release fid_weights of mseitzer/pytorch-fid on GitHub), then give --inception FILE, set "
                    f"D2C_INCEPTION, or put it into {hub}.")
