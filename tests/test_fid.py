"""fid.py against outputs recorded from the official evaluators, closed forms, and direct computations.

The official Inception weights cannot be shipped, so the records were made with weights made by a rule (`rule_weights`)
under the published names. Features agree to 1e-5 relative (folding and memory order move the sixth digit).
"""
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg, ndimage
from torch import nn

import checkpoints
import fid
import inception
import sample
from rule_inception import rule_weights
from runtime import UserError

QUICK = ("--iterations", 4, "--steps", 6)


@pytest.fixture(scope="module")
def golden():
    return torch.load(Path(__file__).parent / "golden" / "fid.pt", weights_only=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The rule-made weights as a file whose name carries its hash, as the published ones do."""
    path = tmp_path_factory.mktemp("inception") / "rule.pth"
    torch.save(rule_weights(), path)
    return str(path.rename(path.with_name(f"rule-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")))


@pytest.fixture(scope="module")
def networks(weights):
    return {resize: fid.Inception(weights, resize) for resize in ("tf1", "torch")}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def statistics(rows, batch=16):
    return fid.mean_and_covariance(sum(fid.products(part) for part in torch.as_tensor(rows).split(batch)))


# --------------------------------------------------------------------------------------------------------- Inception

@pytest.mark.parametrize("size", [256, 32])
def test_features_of_the_official_evaluators(golden, networks, size):
    images, features = golden[f"images_{size}"].permute(0, 3, 1, 2), golden["features"]
    out = networks["tf1"](images)
    for ours, theirs in (("pool", "2048"), ("spatial", "spatial2023"), ("logits", "logits_unbiased")):
        assert relative(out[ours], features[f"torch_fidelity/{size}/{theirs}"]) < 1e-5
    out = networks["torch"](images)
    assert relative(out["pool"], features[f"pytorch_fid/{size}/2048"]) < 1e-5
    # the resizes differ by more than the tolerance: neither could pass for the other
    assert relative(out["pool"], features[f"torch_fidelity/{size}/2048"]) > 1e-3


def test_tensorflow_resize_is_exact(golden):
    image = golden["images_256"][:1].permute(0, 3, 1, 2)
    assert torch.equal(inception.resize_tf1(image), golden["resized_256"])
    at_299 = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(inception.resize_tf1(at_299), (at_299.float() - 128) / 128)


def test_published_layout(networks):
    """94 units of five tensors, and the two of the classifier: 472, with 23,885,392 numbers."""
    state = rule_weights()
    assert len(state) == 472 and sum(v.numel() for v in state.values()) == 23_885_392
    for name, shape, stride, padding in [  # out of the published table
            ("Conv2d_2a_3x3", (32, 32, 3, 3), 1, (0, 0)), ("Mixed_5c.branch_pool", (64, 256, 1, 1), 1, (0, 0)),
            ("Mixed_6a.branch3x3dbl_3", (96, 96, 3, 3), 2, (0, 0)),
            ("Mixed_6b.branch7x7_2", (128, 128, 1, 7), 1, (0, 3)),
            ("Mixed_6c.branch7x7dbl_4", (160, 160, 7, 1), 1, (3, 0)),
            ("Mixed_7a.branch7x7x3_4", (192, 192, 3, 3), 2, (0, 0)),
            ("Mixed_7c.branch3x3dbl_3b", (384, 384, 3, 1), 1, (1, 0))]:
        unit = networks["tf1"].network.get_submodule(name).conv
        assert state[f"{name}.conv.weight"].shape == shape
        assert (unit.stride, unit.padding) == ((stride, stride), padding)


def test_folding_changes_only_rounding(golden, weights, networks):
    """Against the network with batch norms of its own, channels first."""
    plain = inception.Network().eval()
    plain.load_state_dict(torch.load(weights))
    images = golden["images_32"].permute(0, 3, 1, 2)
    with torch.no_grad():
        want = plain(inception.resize_torch(images))
    for name, features in networks["torch"](images).items():
        assert relative(features, want[name]) < 1e-5, name


def test_weights_files(weights, tmp_path):
    """Counters of batch norms are ignored; other networks and damaged files are refused with one sentence."""
    state = torch.load(weights)
    torch.save(state | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}, tmp_path / "counted.pth")
    image = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    a, b = fid.Inception(weights)(image), fid.Inception(str(tmp_path / "counted.pth"))(image)
    assert all(torch.equal(a[k], b[k]) for k in a)
    torch.save(state | {"AuxLogits.fc.weight": torch.zeros(1)}, tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match="not the Inception.*AuxLogits"):
        fid.Inception(str(tmp_path / "torchvision.pth"))
    torch.save(state | {"fc.bias": torch.zeros(1000)}, tmp_path / "classes.pth")
    torch.save({"model": state}, tmp_path / "nested.pth")
    for name, tensor in (("classes", "fc.bias"), ("nested", "Conv2d_1a_3x3")):
        with pytest.raises(UserError, match=f"not the Inception.*{tensor}"):
            fid.Inception(str(tmp_path / f"{name}.pth"))
    shutil.copy(weights, tmp_path / "inception-20151205.pth")  # eight digits, but no hash
    fid.Inception(str(tmp_path / "inception-20151205.pth"))
    shutil.copy(weights, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(UserError, match="damaged: its SHA-256 does not begin with 6726825d"):
        fid.Inception(str(tmp_path / "pt_inception-2015-12-05-6726825d.pth"))


def test_where_weights_are_found(weights, tmp_path, monkeypatch):
    monkeypatch.delenv("D2C_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="pt_inception-2015-12-05-6726825d.pth .96 MB.*--inception"):
        fid.find_inception(None)
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.touch()
    assert fid.find_inception(None) == str(cached)
    monkeypatch.setenv("D2C_INCEPTION", weights)
    assert fid.find_inception(None) == weights and fid.find_inception(str(cached)) == str(cached)
    with pytest.raises(UserError, match="nowhere.pth is not there"):
        fid.find_inception("nowhere.pth")


# ------------------------------------------------------------------------------------------------------ recorded scores

def test_recorded_scores(golden):
    """What the official tools print for recorded features. Theirs for FID are off in the fifth digit, as numpy's
    eigenvalues of a rank-deficient product are; the exact value is from singular values."""
    x, m = golden["metric_inputs"], golden["metrics"]
    a, b = statistics(x["pool_256"]), statistics(x["pool_32"])
    distance = fid.frechet_distance(*a, *b)
    assert distance == pytest.approx(m["fid_256_vs_32_exact"], rel=1e-8)
    whole = m["fid_256_vs_32 (torch-fidelity; rank-deficient, exact 2.358686952823991)"]
    assert distance == pytest.approx(whole, abs=5e-5)
    halves = statistics(x["pool_256"][:32]), statistics(x["pool_256"][32:])
    half = m["fid_halves_of_256 (torch-fidelity)"]
    assert fid.frechet_distance(*halves[0], *halves[1]) == pytest.approx(half, abs=5e-5)
    f = golden["feature_64"]
    distance = fid.frechet_distance(*statistics(f["a"]), *statistics(f["b"]))
    assert distance == pytest.approx(m["fid64_256_vs_32 (64-d features)"], abs=1e-6)
    distance = fid.frechet_distance(*statistics(x["spatial_256"]), *statistics(x["spatial_32"]))
    assert distance == pytest.approx(m["sfid_256_vs_32_exact"], rel=1e-8)
    for size in (256, 32):
        logits = x[f"logits_unbiased_{size}"]
        assert fid.inception_score(logits) == pytest.approx(m[f"is_{size}_torch_fidelity"], rel=1e-9)
        want = m[f"is_{size}_adm_formula_one_chunk"]
        assert fid.inception_score(logits, adm=True)[0] == pytest.approx(want, abs=1e-6)
    pair = fid.precision_recall(real=x["pool_32"], fake=x["pool_256"])
    assert pair == tuple(m["precision_recall_256_vs_ref_32"])
    pair = fid.precision_recall(real=x["pool_256"][32:], fake=x["pool_256"][:32])
    assert pair == tuple(m["precision_recall_halves"])


# ----------------------------------------------------------------------------------------------------------------- FID

def spd(random, D):
    x = random.standard_normal((3 * D, D)) * random.uniform(0.1, 2, D)
    return torch.from_numpy(np.cov(x, rowvar=False))


def test_frechet_distance_closed_forms():
    random = np.random.default_rng(0)
    mu = torch.from_numpy(random.standard_normal((2, 50)))
    S = spd(random, 50)
    assert fid.frechet_distance(mu[0], S, mu[1], S) == pytest.approx(float((mu[0] - mu[1]).square().sum()), rel=1e-9)
    assert 0 <= fid.frechet_distance(mu[0], S, mu[0], S) < 1e-6
    a, b = torch.from_numpy(random.uniform(0, 3, (2, 50)))
    want = float((mu[0] - mu[1]).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert fid.frechet_distance(mu[0], a.diag(), mu[1], b.diag()) == pytest.approx(want, rel=1e-9)
    assert fid.frechet_distance(mu[0], 0 * S, mu[1], b.diag()) == pytest.approx(
        float((mu[0] - mu[1]).square().sum() + b.sum()), rel=1e-9)


@pytest.mark.parametrize("D", [64, 300])
def test_frechet_distance_is_that_of_sqrtm(D):
    random = np.random.default_rng(D)
    S1, S2, mu = spd(random, D), spd(random, D), torch.zeros(D)
    root = linalg.sqrtm((S1 @ S2).numpy()).real
    assert fid.frechet_distance(mu, S1, mu, S2) == pytest.approx(float((S1 + S2).trace() - 2 * root.trace()), rel=1e-6)


def test_frechet_distance_of_few_pictures():
    """Fewer rows than features: finite, not negative, and what singular values of the rows give."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 300, generator=random, dtype=torch.float64) for _ in range(2))
    a, b = (v - v.mean(0) for v in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum() / 39
    want = (x.mean(0) - y.mean(0)).square().sum() + (a.square().sum() + b.square().sum()) / 39 - 2 * cross
    assert fid.frechet_distance(*statistics(x), *statistics(y)) == pytest.approx(float(want), rel=1e-9)
    assert 0 <= fid.frechet_distance(*statistics(x), *statistics(x)) < 1e-6


def test_statistics_are_those_of_all_rows():
    """In batches of any size, on one rank or two, and of float32 features far from zero."""
    x = torch.randn(501, 20) * 3 + 100
    for mean, cov in (statistics(x, 500), statistics(x, 7)):
        assert np.allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
        assert np.allclose(cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    both = fid.products(x[:400]) + fid.products(x[400:])
    for one, two in zip(fid.mean_and_covariance(both), statistics(x)):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-9)
    with pytest.raises(UserError, match="1 images have no covariance"):
        statistics(x[:1])
    with pytest.raises(UserError, match="not finite"):
        fid.frechet_distance(*statistics(x), *statistics(x * float("nan")))
    with pytest.raises(UserError, match="20 and of 3 features"):
        fid.frechet_distance(*statistics(x), *statistics(x[:, :3]))


# --------------------------------------------------------------------------------------------------- IS, balls, pixels

def test_inception_score_closed_forms():
    certain = torch.full((400, 8), -1000.0)
    certain[torch.arange(400), torch.arange(400) % 8] = 0  # every class as often as the next
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(8)
    assert fid.inception_score(torch.zeros(100, 8)) == pytest.approx((1, 0))
    with pytest.raises(UserError, match="at least 10 images"):
        fid.inception_score(certain[:9])


def test_inception_score_in_the_order_of_the_protocol():
    """torch-fidelity: the same for any order of reading. ADM: chunks in the order of file names, not of folders."""
    logits = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0)) * 3
    names = [f"{i % 3}/{i:06d}.png" for i in range(10_000)]
    by_path = sorted(range(10_000), key=names.__getitem__)
    read = [names[i] for i in by_path]
    assert fid.inception_score(logits, names=names) == fid.inception_score(logits[by_path], names=read)
    assert fid.inception_score(logits[by_path], names=read) == fid.inception_score(logits[by_path])
    halves = [fid.inception_score(half, adm=True)[0] for half in logits.split(5000)]  # a part each
    assert fid.inception_score(logits[by_path], names=read, adm=True) == (np.mean(halves), np.std(halves))
    assert fid.inception_score(logits[by_path], names=read, adm=True) == fid.inception_score(logits, adm=True)


def test_precision_recall_in_blocks():
    """More rows than a block of 1,000, against all distances at once."""
    random = np.random.default_rng(0)
    real, fake = random.standard_normal((1300, 6)), random.standard_normal((2100, 6)) * 0.8 + 0.5
    distances = lambda u, v: np.sqrt(((u[:, None] - v[None]) ** 2).sum(-1))
    real_radius, fake_radius = (np.sort(distances(v, v), axis=1)[:, 3] for v in (real, fake))
    d = distances(fake, real)
    want = (d <= real_radius).any(1).mean(), (d <= fake_radius[:, None]).any(0).mean()
    got = fid.precision_recall(torch.from_numpy(real).float(), torch.from_numpy(fake).float())
    assert 0.3 < want[0] < 1 and 0.3 < want[1] < 1 and got == pytest.approx(want, abs=1e-3)
    assert fid.precision_recall(real, real) == (1, 1) and fid.precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(UserError, match="more than 3 images"):
        fid.precision_recall(real[:3], fake)


def test_psnr_and_ssim(golden):
    a = golden["images_32"].permute(0, 3, 1, 2)
    b = (a.int() + torch.randint(-20, 20, a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    psnr, ssim = fid.psnr_ssim(a, b)
    for i in range(len(a)):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        assert psnr[i] == pytest.approx(10 * np.log10(255**2 / ((x - y) ** 2).mean()), rel=1e-5)
        # SciPy's Gaussian cut at 5 pixels, of which the part that needs no border is kept
        blur = lambda v: ndimage.gaussian_filter(v, 1.5, truncate=5 / 1.5, axes=(1, 2))[:, 5:-5, 5:-5]
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = 2.55**2, 7.65**2
        want = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
        assert ssim[i] == pytest.approx(want, rel=1e-4)
    same = fid.psnr_ssim(a, a)
    assert same[1].min() > 0.9999 and 100 < same[0].max() < 120  # and not infinity, which would hide all other images


# ------------------------------------------------------------------------------------------------ inputs and references

class Fake(nn.Module):
    """Features in no time: random projections of the mean colours of a 4x4 grid, as Inception's in shape and name."""

    def __init__(self, path, resize="tf1", device="cpu"):
        super().__init__()
        self.about = {"file": "fake.pth", "sha256": "0123456789", "resize": resize}
        random = torch.Generator().manual_seed(0)
        self.maps = {name: torch.randn(48, D, generator=random) / 20
                     for name, D in (("pool", 2048), ("spatial", 2023), ("logits", 1008))}

    def forward(self, images):
        x = nn.functional.adaptive_avg_pool2d(images.float() / 64, 4).flatten(1)
        return {name: x @ m for name, m in self.maps.items()}


def diagonal_distance(mu1, cov1, mu2, cov2):
    """In place of `frechet_distance`, whose 2,048 eigenvalues take seconds: as if the features were independent."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(v).double() for v in (mu1, cov1, mu2, cov2))
    return float((mu1 - mu2).square().sum() + (cov1.diag().sqrt() - cov2.diag().sqrt()).square().sum())


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "Inception", Fake)
    monkeypatch.setattr(fid, "frechet_distance", diagonal_distance)
    monkeypatch.setattr(fid, "find_inception", lambda path: path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def drawn(toy, works, tmp_path_factory):
    """24 pictures of the toy run, as a folder and as one .npz beside it."""
    out = tmp_path_factory.mktemp("drawn")
    works("sample", "--run", toy.run, "--class", "1,3", "--num", 24, "--out", out / "x.npz", *QUICK)
    return out


def result(path="result.json"):
    return json.loads(Path(path).read_text())


def figures(path="result.json"):
    return result(path)["figures"]["generated"]


def test_one_set_of_pictures_in_three_forms(fake, drawn, toy, works, tmp_path):
    """Folder, .npz and --run give the same figures; reading goes in batches that do not fit the number."""
    real = Path(toy.images)
    more = ("--crop", 32, "--metrics", "fid,sfid,is,pr", "--batch", 7)
    said = works("fid", drawn / "x", real, "--out", "a.json", *more)
    assert "gFID@24" in said and "warning: 24 images" in said and "±" in said
    works("fid", drawn / "x.npz", real, "--out", "b.json", *more)
    works("fid", "--run", toy.run, real, "--class", "1,3", "--num", 24, "--out", "c.json", *more, *QUICK)
    a, b, c = (figures(f) for f in ("a.json", "b.json", "c.json"))
    assert a["gfid"] > 0.01 and a["sfid"] > 0.01 and a["is"] > 1
    for key in a:
        # the .npz has no file names, so its pictures are dealt to the ten parts of IS in another order
        assert b[key] == pytest.approx(a[key], rel=1e-6) or key in ("is", "is_std"), key
        assert c[key] == pytest.approx(a[key], rel=1e-2), key  # drawn in other batches: a grey level here and there
    about, reference = result("a.json")["samples"], result("a.json")["reference"]
    assert about["per_class"] == {"classes": 2, "fewest": 12, "most": 12}
    assert about["settings"]["sampling"]["iterations"] == 4 and len(about["settings"]["weights"]) == 4
    assert result("c.json")["samples"]["settings"] == {k: v for k, v in about["settings"].items() if k != "coarse"}
    assert result("b.json")["samples"]["per_class"] == about["per_class"]
    assert reference["images"] == 130 and reference["hash"]


def test_default_result_is_beside_the_samples(fake, drawn, works, tmp_path):
    folder = shutil.copytree(drawn / "x", tmp_path / "x")
    works("fid", folder, "--metrics", "is")
    assert figures(folder / "result.json")["is"] > 1
    works("fid", folder, "--metrics", "is", "--protocol", "adm")
    assert result(folder / "result.json")["protocol"] == "adm"


def test_pictures_that_do_not_do(fake, drawn, script, tmp_path):
    def refused(*command):
        out = script("fid", *command, "--metrics", "is")
        assert out.code == 1 and "Traceback" not in out.err
        return out.err

    folder = shutil.copytree(drawn / "x", tmp_path / "deep" / "x")
    assert script("fid", folder.parent, "--metrics", "is").code == 0  # any depth
    os.remove(folder / "1" / "000022.png")
    assert "holds 23 of 24 images; run sample.py with this --num again" in refused(folder)
    (folder / "settings.json").write_text('{"coarse": true}')
    assert "draw them again without --show-coarse" in refused(folder)
    os.remove(folder / "settings.json")
    (folder / ".hidden").mkdir()
    Image.new("RGB", (8, 8)).save(folder / ".hidden" / "a.png")  # is not looked at
    assert script("fid", folder, "--metrics", "is").code == 0
    (folder / "z.png").symlink_to("nowhere.png")
    assert "z.png is a link" in refused(folder)
    os.remove(folder / "z.png")
    (folder / "again").symlink_to(folder)
    assert "some images twice" in refused(folder)
    os.remove(folder / "again")
    Image.new("RGB", (32, 32)).save(folder / "a.jpg")
    assert "1 compressed images, e.g. a.jpg" in refused(folder)
    assert script("fid", folder, "--metrics", "is", "--jpeg").code == 0
    Image.new("RGB", (40, 32)).save(folder / "b.png")
    assert "several sizes, see b.png" in refused(folder, "--jpeg")
    (folder / "b.png").write_bytes(b"no picture")
    assert "b.png is no readable image" in refused(folder, "--jpeg")
    (folder / "b.png").rename(folder / "0.png")
    assert "0.png is no readable image" in refused(folder, "--jpeg")
    assert "neither a folder" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(tmp_path / "empty")
    for name, arrays in (("float", {"arr_0": np.zeros((2, 8, 8, 3))}), ("none", {"x": np.zeros(3)})):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert "arr_0" in refused(tmp_path / f"{name}.npz")
    whole = (drawn / "x.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:len(whole) // 2])
    assert "cut.npz" in refused(tmp_path / "cut.npz")


def test_references_of_four_kinds(fake, drawn, toy, works, script, tmp_path):
    """The statistics of one folder, in the layouts of ADM, pytorch-fid, torch-fidelity and ours, give one FID."""
    works("fid", toy.images, "--save", "ours.npz", "--crop", 32)
    a = np.load("ours.npz")
    mu, sigma = a["mu"], a["sigma"]
    np.savez("adm.npz", mu=mu.astype(np.float32), sigma=sigma, mu_s=a["mu_s"].astype(np.float32), sigma_s=a["sigma_s"],
             arr_0=np.load(drawn / "x.npz")["arr_0"])
    np.savez("pytorch-fid.npz", mu=mu, sigma=sigma)
    torch.save({"mu": mu.astype(np.float32), "sigma": sigma}, "torch-fidelity.pt")
    works("fid", drawn / "x", toy.images, "--crop", 32, "--metrics", "fid", "--out", "folder.json")
    want = figures("folder.json")["gfid"]
    for name in ("ours.npz", "adm.npz", "pytorch-fid.npz", "torch-fidelity.pt"):
        said = works("fid", drawn / "x", name, "--metrics", "fid", "--out", "r.json")
        assert figures("r.json")["gfid"] == pytest.approx(want, rel=1e-5), name
        assert ("does not say how" in said) == (name in ("pytorch-fid.npz", "torch-fidelity.pt"))
        assert result("r.json")["reference"]["hash"] == hashlib.sha256(Path(name).read_bytes()).hexdigest()
    made = json.loads(str(a["about"]))
    assert made["images"] == 130 and made["size"] == [32, 32] and made["inception"]["sha256"] == "0123456789"
    # ADM's pictures serve precision and recall: here they are the generated ones
    works("fid", drawn / "x", "adm.npz", "--protocol", "adm", "--out", "adm.json")
    assert (figures("adm.json")["precision"], figures("adm.json")["recall"]) == (1, 1)

    def refused(*command):
        out = script("fid", drawn / "x", *command)
        assert out.code == 1 and "Traceback" not in out.err
        return out.err

    assert "another resize of Inception, tf1 instead of torch" in refused("ours.npz", "--protocol", "pytorch-fid")
    assert "another resize of Inception" in refused("adm.npz", "--protocol", "pytorch-fid")
    assert "no images for precision" in refused("ours.npz", "--metrics", "pr")
    assert "no statistics for sFID" in refused("pytorch-fid.npz", "--metrics", "sfid")
    np.savez("large.npz", **{**np.load("adm.npz"), "arr_0": np.zeros((20, 64, 64, 3), np.uint8)})
    assert "images of [64, 64] pixels" in refused("large.npz", "--protocol", "adm")
    for change, words in ({"sha256": "fedcba"}, "another sha256"), ({}, "images of [64, 64] pixels"):
        changed = made | {"size": [64, 64], "inception": made["inception"] | change}
        np.savez("changed.npz", mu=mu, sigma=sigma, about=json.dumps(changed))
        assert words in refused("changed.npz")
    np.savez("other.npz", mu=mu[:64], sigma=sigma[:64, :64])
    assert "statistics of another network" in refused("other.npz")
    torch.save({"features": torch.zeros(3)}, "other.pt")
    assert "neither images (arr_0) nor statistics" in refused("other.pt")


def test_crop_of_a_reference(fake, toy, works, tmp_path):
    """--crop cuts photographs as data.py does, and leaves pictures of that size alone."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(f"photos/{i}.png")
    images = fid.open_images("photos", crop=32)
    assert images.size == [32, 32] and next(iter(images.batches([range(1, 3)]))).shape == (2, 3, 32, 32)
    works("fid", "photos", "--save", "ours.npz", "--crop", 32)
    made = json.loads(str(np.load("ours.npz")["about"]))
    assert made["crop"] == 32 and made["size"] == [32, 32] and made["images"] == 4


def test_a_reference_of_another_size_is_refused(fake, script):
    """A folder and an .npz of images, as statistics: features of enlarged pictures are those of blurred ones."""
    picture = lambda size: np.random.default_rng(size).integers(0, 256, (12, size, size, 3), dtype=np.uint8)
    for size in (32, 40):
        os.makedirs(f"of{size}")
        for i, pixels in enumerate(picture(size)):
            Image.fromarray(pixels).save(f"of{size}/{i}.png")
    np.savez("of40.npz", arr_0=picture(40))
    for reference in ("of40", "of40.npz"):
        out = script("fid", "of32", reference, "--metrics", "fid")
        assert out.code == 1 and "images of [40, 40] pixels, but these have [32, 32]" in out.err and "--crop" in out.err


def test_reconstruction(fake, toy, works, script, copy_run):
    """rFID, PSNR and SSIM of both tokenizers, and of one where there is only one."""
    said = works("fid", "--reconstruct", toy.run, toy.images, "--batch", 50)
    both = result()["figures"]
    assert set(both) == {"vq", "kl"} and "rFID@130" in said and "gFID" not in said
    images = next(iter(fid.open_images(toy.images, crop=32).batches([range(130)])))
    vq = sample.load_run(toy.run).vq
    again = sample.to_uint8(vq.decode(vq.encode(images.float() / 127.5 - 1)))
    psnr = 10 * (255**2 / ((images.double() - again.double()) ** 2).mean((1, 2, 3))).log10()
    assert both["vq"]["psnr"] == pytest.approx(float(psnr.mean()), abs=0.01)
    model = Fake(None)
    want = diagonal_distance(*statistics(model(images)["pool"]), *statistics(model(again)["pool"]))
    assert both["vq"]["rfid"] == pytest.approx(want, rel=1e-3, abs=1e-6)
    kl = Path(copy_run("kl")) / "kl.pt"
    config, state = checkpoints.load(str(kl), "kl")
    checkpoints.save(str(kl), "kl", replace(config, scale=None), state, image_size=32)  # not measured yet
    works("fid", "--reconstruct", kl.parent, toy.images)
    assert result()["figures"]["kl"]["psnr"] == pytest.approx(both["kl"]["psnr"], rel=1e-3)
    assert list(result()["figures"]) == ["kl"]
    for size in (8, 30):  # SSIM's window has 11 pixels, and the tokenizers' stride does not divide 30
        out = script("fid", "--reconstruct", toy.run, toy.images, "--crop", size)
        assert out.code == 1 and "for SSIM of at least 11" in out.err and "Traceback" not in out.err


def test_labels_and_table(fake, drawn, works, toy):
    assert list(fid.labelled({"gfid": 2.0, "sfid": 3.0}, 9_999)) == ["gFID@9999", "sFID@9999"]
    assert fid.labelled({"gfid": 2.0, "is": 9.0, "is_std": 0.5}, 10_000) == {"gFID": "2.0000", "IS": "9.0000 ± 0.5000"}
    works("fid", drawn / "x", toy.images, "--crop", 32, "--metrics", "fid", "--out", "a.json")
    works("fid", "--reconstruct", toy.run, toy.images, "--out", "b.json")
    lines = works("fid", "--table", "a.json", "b.json").splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "gFID@24" in lines[0] and "rFID@130" in lines[0] and "iterations" in lines[0]
    assert f"{figures('a.json')['gfid']:.4f}" in lines[2] and "toy" in lines[3]


def test_figures_are_printed_though_the_file_cannot_be_written(fake, drawn, script, tmp_path):
    (tmp_path / "file").touch()
    result = script("fid", drawn / "x", "--metrics", "is", "--out", tmp_path / "file" / "result.json")
    assert result.code == 1 and "cannot write" in result.err and "| IS |" in result.out


@pytest.mark.parametrize("command, words", [
    (("x",), "2 paths are needed, not 1"),
    (("x", "y", "--metrics", "kid"), "--metrics takes fid,sfid,is,pr"),
    (("x", "y", "--protocol", "pytorch-fid", "--metrics", "is"), "defines FID only"),
    (("x", "y", "--num", 5), "need --run"),
    (("x", "y", "--cfg", 2), "need --run"),
    (("x", "--save", "a.npz", "--reconstruct", "r"), "take one of"),
    (("x", "--save", "a.npz", "--metrics", "pr"), "--metrics is for generated images"),
    (("x", "y.npz", "--crop", 8), "--crop crops"),
    (("x", "y", "--batch", 0), "at least 1"),
    (("--reconstruct", "absent", "x"), "neither vq.pt nor kl.pt"),
    (("--run", "absent", "x"), "is neither a folder of images"),
    (("--table", "absent.json"), "is no result.json")])
def test_wrong_commands(fake, script, command, words):
    out = script("fid", *command)
    assert out.code == 1 and words in out.err and "Traceback" not in out.err and len(out.err) < 400


def test_dry_run(fake, drawn, toy, works):
    said = works("fid", drawn / "x", toy.images, "--crop", 32, "--dry-run", "--out", "a.json")
    assert "24 images of 32x32 pixels" in said and "torch-fidelity" in said and not os.path.exists("a.json")


# ---------------------------------------------------------------------------------------------------------- whole paths

def test_two_ranks_give_the_same_figures(drawn, golden, weights, works, two_ranks, tmp_path):
    """With the real network: batches are the same for any number of ranks, so the features are the same too. The last
    batch is short, and the reference is one batch, so the first rank sees nothing of it."""
    np.savez(tmp_path / "reference.npz", arr_0=golden["images_32"].numpy())
    command = (drawn / "x", tmp_path / "reference.npz", "--inception", weights, "--metrics", "is,pr,fid", "--batch", 10)
    saved = lambda name: (drawn / "x", "--save", tmp_path / name, "--inception", weights, "--batch", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two ranks have: the number moves the eighth digit
    works("fid", *command, "--out", tmp_path / "one.json")
    works("fid", *saved("one.npz"))
    torch.set_num_threads(threads)
    two_ranks("fid", *command, "--out", tmp_path / "two.json")
    two_ranks("fid", *saved("two.npz"))
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    for name in ("mu", "sigma"):
        assert abs(two[name] - one[name]).max() < 1e-10 * abs(one[name]).max() > 0
    one, two = figures(tmp_path / "one.json"), figures(tmp_path / "two.json")
    assert two == pytest.approx(one, rel=1e-9) and one["gfid"] > 1 and one["is"] > 1 and len(one) == 5
    assert result(tmp_path / "two.json")["ranks"] == 2


def test_sampling_goes_on_after_a_kill(toy, script, works, two_ranks, drawn, tmp_path, fake):
    """A run over two ranks that was killed: some pictures and the tail are missing, a temporary file is left."""
    folder = shutil.copytree(drawn / "x", tmp_path / "x")
    pictures = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}
    for name in ("1/000006.png", "3/000021.png", "1/000022.png", "3/000023.png"):
        os.remove(folder / name)
    (folder / "1" / "000006.png.tmp77").write_bytes(b"half a picture")
    assert "20 of 24" in script("fid", folder, "--metrics", "is").err
    two_ranks("sample", "--run", toy.run, "--class", "1,3", "--num", 24, "--out", folder, *QUICK)
    assert {p.relative_to(folder) for p in folder.rglob("*.png")} == set(pictures)
    for name, content in pictures.items():
        a, b = (np.asarray(Image.open(v)).astype(int) for v in (folder / name, drawn / "x" / name))
        assert abs(a - b).max() <= 1
    works("fid", folder, "--metrics", "is")
    works("sample", "--run", toy.run, "--class", "1,3", "--num", 26, "--out", folder, *QUICK)  # more of the same
    assert json.loads((folder / "settings.json").read_text())["num"] == 26 and (folder / "3/000025.png").exists()
