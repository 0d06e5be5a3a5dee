"""The numbers that hold the metrics: made here, read by test_evaluation.py.

    python tests/golden.py freeze    makes tests/golden/: four small pictures with a result each, and their scores
    python tests/golden.py measure   scores RealSR's test pairs and OSEDiff's published outputs, all of them, and
                                     writes reports/examples/golden.json: means, and how far each image is from the log

The pictures of `freeze` are crops of photographs under data/photographs that are in the public domain (CC0). RealSR is academic
data and no part of the project: `measure` looks for it in $FRAMER_REALSR or beside the project."""
import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = ROOT / "tests" / "golden"
REALSR = Path(os.environ.get("FRAMER_REALSR", ROOT.parent / "shared" / "data" / "realsr"))
NEARBY_WEIGHTS = ROOT.parent / "shared" / "data" / "metric-weights"
PUBLISHED = dict(psnr=(25.1511, 1e-4), ssim=(0.7341, 1e-4), lpips=(0.2921, 5e-4), dists=(0.2128, 3e-4), niqe=(5.6476, 0.02))  # mean, within which each image is
CROPS = {"spices": (300, 400), "colosseum": (420, 500), "otters": (350, 600), "skyline": (400, 300)}  # top, left


def log():
    "Metric -> image -> value, as OSEDiff published it."
    with open(REALSR / "osediff_published_metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {metric: {row["image"]: float(row[metric.upper()]) for row in rows} for metric in PUBLISHED}


def freeze():
    import numpy as np
    from PIL import Image, ImageFilter
    from framer.evaluation import evaluate
    for number, (name, (top, left)) in enumerate(CROPS.items()):
        picture = Image.open(ROOT / "data" / "photographs" / "val" / f"{name}.jpg").convert("RGB").crop((left, top, left + 192, top + 192))
        small = picture.filter(ImageFilter.GaussianBlur(0.6 + 0.3 * number)).resize((48, 48), Image.Resampling.BICUBIC)
        noisy = np.asarray(small.resize((192, 192), Image.Resampling.BICUBIC)) + np.random.default_rng(number).normal(scale=2 + number, size=(192, 192, 3))
        for folder, image in (("hr", picture), ("results", Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)))):
            (SMALL / folder).mkdir(parents=True, exist_ok=True)
            image.save(SMALL / folder / (f"{name}.png" if folder == "hr" else f"{name}x4.png"), optimize=True)
    found = {name: evaluate(SMALL / "results", SMALL / "hr", name, list(PUBLISHED)) for name in ("framer", "seesr-y")}
    if incomplete := {name: scores.missing for name, scores in found.items() if scores.missing}:
        sys.exit(f"not frozen, scores are missing: {incomplete}. `python -m framer.metrics fetch` gets the weights")
    kept = {name: dict(versions=scores.versions, rows=scores.rows) for name, scores in found.items()}
    (SMALL / "expected.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(*found.values(), sep="\n\n")


def measure(out=ROOT / "reports" / "examples" / "golden.json", record=None):
    from framer.evaluation import evaluate
    published = log()
    weights = None if os.environ.get("FRAMER_METRIC_WEIGHTS") or not NEARBY_WEIGHTS.is_dir() else NEARBY_WEIGHTS
    scores = evaluate(REALSR / "osediff", REALSR / "hr", "seesr-y", list(PUBLISHED), weights=weights, out=record, progress=True)
    rows = {metric: dict(mean=scores.means.get(metric), published=PUBLISHED[metric][0], images=scores.counts[metric], tolerance=PUBLISHED[metric][1],
                         worst=max((abs(row[metric] - published[metric][row["image"]]) for row in scores if row[metric] is not None), default=None)) for metric in PUBLISHED}
    rgb = evaluate(REALSR / "osediff", REALSR / "hr", "framer", ["psnr"]).means["psnr"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    content = dict(protocol=scores.protocol, count=scores.count, metrics=rows, missing=scores.missing, psnr_under_framer=rgb, versions=scores.versions, commit=commit,
                   hardware=f"{platform.machine()}, {os.cpu_count()} cores", command="python tests/golden.py measure")
    out.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["freeze"]: freeze()
    elif sys.argv[1:2] == ["measure"]: measure(record=sys.argv[2] if len(sys.argv) > 2 else None)
    else: sys.exit(__doc__)
