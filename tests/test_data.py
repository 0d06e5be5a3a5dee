"The bundled photographs are what data/README.md says, and prepare.py says what is wrong."
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from framer.datasets import scan_photographs

DATA = Path(__file__).resolve().parents[1] / "data"


def rows():
    with open(DATA / "photographs/SOURCES.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_bundled_photographs():
    train, bad_train = scan_photographs(DATA / "photographs/train", min_side=512)
    val, bad_val = scan_photographs(DATA / "photographs/val", min_side=512)
    assert not bad_train and not bad_val
    assert len(train) >= 24 and len(val) == 6
    assert sum(p.stat().st_size for p in train + val) <= 12e6


def test_every_photograph_has_its_source():
    files = {p.relative_to(DATA / "photographs").as_posix() for p in (DATA / "photographs").rglob("*.jpg")}
    assert {row["file"] for row in rows()} == files
    assert all(row["author"] and row["licence"] and row["package"] and row["file"].startswith(row["split"]) for row in rows())
    originals = [(row["package"], row["original_file"]) for row in rows()]
    assert len(set(originals)) == len(originals)


@pytest.mark.parametrize("arguments, path, words", [
    ([], "/nonexistent", "apt-get is not on this machine"),
    (["--out", __file__ + "/x"], os.environ["PATH"], "--out names another folder"),
])
def test_prepare_says_what_is_wrong(arguments, path, words):
    if path != "/nonexistent" and not os.path.exists("/usr/bin/apt-get"):
        pytest.skip("apt-get is not on this machine")
    pytest.importorskip("PIL")
    result = subprocess.run([sys.executable, str(DATA / "prepare.py"), *arguments], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr
