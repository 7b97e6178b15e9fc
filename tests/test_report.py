"""tools/report.py: a page that holds all of a run and needs nothing else."""
import base64
import io
import json
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

import report

TINY = Path(__file__).parent.parent / "weights" / "tiny"


def write_log(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def run(toy, tmp_path):
    return Path(shutil.copytree(toy.run, tmp_path / "run"))


def test_page_of_a_run(run, works):
    log = run / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    works("report", run)
    page = (run / "report.html").read_text()
    assert re.findall("<h2>Stage (.): ", page) == ["0", "1", "2"]
    for stage in range(3):
        last = [r for r in records if r["stage"] == stage][-1]
        assert f"loss: {last['loss']:.4g}<" in page and f"images/s: {last['images_per_s']:.4g}<" in page
    assert page.count("learning rate: ") == page.count("skipped steps: 0<") == 3
    assert "untrained: ln 64<" in page and "preset tiny<" not in page  # the expected course: what is known of it
    assert "config.codebook_size<td>64" in page and "condition<td>ground_truth" in page  # settings, from the headers


def test_page_stands_alone(run, works):
    works("report", run)
    page = (run / "report.html").read_text()
    assert not re.search(r"<script|<link|https?:|url\(|@import|refresh", page)
    assert all(source.startswith("data:") for source in re.findall('src="([^"]*)"', page))
    drawings = re.findall(r"<svg width.*?</svg></svg>", page)
    assert len(drawings) == 12  # three stages: loss, learning rate, images/s, skipped steps
    for drawing in drawings:
        ElementTree.fromstring(drawing)  # raises if it is not well-formed


def test_pictures_from_first_to_last(run, works):
    shutil.rmtree(run / "grids", ignore_errors=True)
    (run / "grids").mkdir()
    for step in [*range(2, 42, 2), 50]:  # the log ends at step 40: the last picture is of a training before --fresh
        size = (2048, 64) if step == 40 else (64, 64)
        Image.new("RGB", size, (step, 0, 0)).save(run / "grids" / f"stage2-{step:07}.png")
    works("report", run)
    page = (run / "report.html").read_text()
    steps = [int(s.replace(",", "")) for s in re.findall(r"<figcaption>step ([\d,]+)<", page)]
    assert len(steps) == report.PICTURES and steps[0] == 2 and steps[-1] == 40 and steps == sorted(steps)
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    assert [p.getpixel((0, 0))[0] for p in shown] == steps
    assert [p.width for p in shown] == [64] * 5 + [report.WIDTH]


def test_log(tmp_path):
    log = tmp_path / "log.jsonl"
    of = lambda stage, step, loss: {"stage": stage, "step": step, "loss": loss}
    write_log(log, of(0, 10, 1.0), of(0, 20, 0.9), of(0, 30, 0.8),
              of(0, 20, 0.7), of(0, 30, None),        # resumed at step 10; a loss that was not finite
              of(2, 10, 3.0), of(2, 20, 2.0), of(2, 10, 4.0))  # started over
    with open(log, "a") as file:
        file.write('{"stage": 2, "st')  # the line that is being written
    assert report.read_log(log) == {0: [of(0, 10, 1.0), of(0, 20, 0.7), of(0, 30, None)], 2: [of(2, 10, 4.0)]}
    write_log(log, *(of(1, step, 1 / step) for step in range(1, 100_001)))
    start = time.process_time()
    records = report.read_log(log)[1]
    drawing = report.chart("loss", [(r["step"], r["loss"]) for r in records], 960, 260)
    assert len(records) == 100_000 and time.process_time() - start < 20  # seconds; about 1 here
    assert len(re.findall(r"[\d.]+,[\d.]+", drawing)) <= report.POINTS + 20


def test_expected_course_of_tiny(tmp_path, works):
    for kind in ("vq", "kl", "prior", "generator"):
        shutil.copy(TINY / f"{kind}.pt", tmp_path)
    write_log(tmp_path / "log.jsonl", *({"stage": stage, "step": step, "loss": 2.0, "images_per_s": 1.0}
                                        for stage in range(3) for step in (500, 1000, 2000)))
    works("report", tmp_path)
    assert (tmp_path / "report.html").read_text().count("preset tiny<") == 2  # stages 1 and 2


def test_curve_lies_where_it_should():
    """Step 50 of 100 in the middle of the frame; a value in the middle between the lowest and the highest likewise."""
    drawing = report.chart("loss", [(0, 9.0), (50, 2.0), (100, 1.0)], 620, 200, [(0, 9.0), (100, 3.0)], "tiny")
    curve, normal = re.findall('points="([^"]*)"', drawing)
    points = [tuple(map(float, p.split(","))) for p in curve.split()]
    left, top, right, bottom = 56, 24, 600, 180
    assert points[1] == ((left + right) / 2, (top + bottom) / 2)    # 2.0 lies between 1.0 and the normal 3.0
    assert points[0][1] < top < points[2][1] < bottom               # the loss of the first step leaves the frame
    assert points[2][0] == float(normal.split()[-1].split(",")[0]) == right


def test_ticks():
    assert report.ticks(0, 1000, 5) == [0, 200, 400, 600, 800, 1000]
    assert report.ticks(0.29, 0.36, 4) == pytest.approx([0.3, 0.32, 0.34, 0.36])


def test_headers(tmp_path):
    values = report.header(TINY / "generator.pt")
    assert values["config.fusion"] == "mask_tokens" and values["step"] == 9969 and values["preset"] == "tiny"
    assert values["classes"] == "11 entries" and not any("state" in key for key in values)
    (tmp_path / "vq.pt").write_bytes(b"no weights")
    assert "checkpoints.py" in report.header(tmp_path / "vq.pt")["file"]


def test_watch(tmp_path, script, monkeypatch):
    """The page follows the log from before its first line, until Ctrl-C."""
    log, pages = tmp_path / "log.jsonl", []

    def sleep(seconds):
        pages.append((tmp_path / "report.html").read_text())
        if len(pages) == 3:
            raise KeyboardInterrupt
        write_log(log, *({"stage": 1, "step": step, "loss": 5.0} for step in range(1, len(pages) + 1)))

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert script("report", tmp_path, "--watch").code == 130
    assert "Stage 1" not in pages[0] and "Step 1," in pages[1] and "Step 2," in pages[2]
    assert all(f"refresh content={report.EVERY}>" in page for page in pages)


def test_bad_input(tmp_path, script):
    for path in (tmp_path / "nowhere", tmp_path):
        result = script("report", path)
        assert result.code == 1 and "has no log of a training" in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())
