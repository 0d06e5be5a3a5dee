"Table 1, paired statistics and test sets from outside: known answers, hostile names, and nbs/evaluate.ipynb as a person would run it."
import csv, io, itertools, json, os, re, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framer.comparison import bootstrap_interval, compare, example_results, holm, paired_statistics, read_evaluation, relative_gain, save_scores, score_methods, signed_rank, significance, to_csv, to_html, to_latex, to_markdown
from framer.metrics import Scores
from framer.runs import write_json
from framer.testsets import check_testset

ROOT = Path(__file__).parents[1]


def rows(values, metric="psnr", names=None): return [{"image": names[i] if names else f"{i:03d}.png", metric: float(v)} for i, v in enumerate(values)]


# -- statistics

def test_intervals_cover_the_truth_as_often_as_they_say():
    "Of 95 % intervals over normal differences about 95 % hold the true mean (n=30: slightly fewer, which is known of the bootstrap)."
    random, hits = np.random.default_rng(1), dict(BCa=0, percentile=0)
    for i in range(200):
        d = random.normal(0.3, 1, 30)
        for method in hits:
            low, high = bootstrap_interval(d, resamples=600, seed=i, method=method); hits[method] += low <= 0.3 <= high
    assert 0.89 <= hits["BCa"] / 200 <= 0.99 and 0.89 <= hits["percentile"] / 200 <= 0.99, hits


def test_swapping_the_pair_turns_every_sign():
    random = np.random.default_rng(0); a, b = random.normal(25, 3, 40), random.normal(0.2, 0.5, 40)
    one, two = rows(a), rows(a + b)
    there, back = significance({"a": one, "b": two}, {"a": "b"}, method="percentile")[0], significance({"a": one, "b": two}, {"b": "a"}, method="percentile")[0]
    assert there["improvement"] == pytest.approx(-back["improvement"]) and there["win_rate"] == pytest.approx(1 - back["win_rate"]) and there["p"] == pytest.approx(back["p"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"])) and (there["wins"], there["losses"]) == (back["losses"], back["wins"])
    assert np.sign(there["percent"]) == -np.sign(back["percent"])


@pytest.mark.parametrize("metric, better", [("psnr", True), ("ssim", True), ("musiq", True), ("maniqa", True), ("clipiqa", True), ("lpips", False), ("dists", False), ("niqe", False), ("fid", False)])
def test_more_is_better_only_where_it_is(metric, better):
    low, high = rows([0.5] * 6, metric), rows([0.6] * 6, metric)
    found = significance({"low": low, "high": high}, {"low": "high"})[0]
    assert (found["improvement"] > 0) == better and found["wins"] == (6 if better else 0) and (relative_gain(low, high, metric) > 0) == better
    cells = compare({"low": low, "high": high}, {"low": "high"}).lines["", metric]
    assert cells["high" if better else "low"].rank == 1 and cells["high"].gain == pytest.approx(20 if better else -20)


@pytest.mark.parametrize("n", [6, 9])
def test_signed_rank_against_all_signs(n):
    "The exact p-value is the share of all sign patterns whose rank sum is as far out."
    d = np.random.default_rng(n).normal(0.5, 1, n); ranks = np.abs(d).argsort().argsort() + 1
    sums = np.array([sum(r for r, s in zip(ranks, signs) if s) for signs in itertools.product((0, 1), repeat=n)]); seen, middle = ranks[d > 0].sum(), ranks.sum() / 2
    assert signed_rank(d)[0] == pytest.approx((np.abs(sums - middle) >= abs(seen - middle)).mean())


def test_ill_cases_are_said_and_do_not_stop():
    assert paired_statistics([])["note"] == "no image that both have"
    few = paired_statistics([0.1, 0.2, 0.3]); assert few["p"] is None and few["low"] is None and "fewer than 6" in few["note"] and few["improvement"] == pytest.approx(0.2)
    same = paired_statistics(np.zeros(50)); assert same["p"] is None and (same["low"], same["high"]) == (0, 0) and "same scores" in same["note"] and same["win_rate"] == 0.5
    ties = paired_statistics([0.5] * 30 + [-0.5] * 10); assert ties["p"] < 0.01 and "tied" in ties["note"]
    constant = paired_statistics([0.25] * 8); assert constant["low"] == constant["high"] == 0.25 and constant["p"] < 0.05
    found = significance({"a": rows([1.0], names=["a.png"]), "b": rows([2.0], names=["b.png"])}, {"a": "b"}); assert found[0]["n"] == 0 and found[0]["p_holm"] is None


def test_holm_is_the_step_down_rule():
    p = np.random.default_rng(3).uniform(0, 0.2, 7).tolist(); corrected = holm(p)
    for level in (0.01, 0.05, 0.2):                      # reject, from the smallest, while p <= level / (number left)
        order, rejected = np.argsort(p), set()
        for k, i in enumerate(order):
            if p[i] > level / (len(p) - k): break
            rejected.add(int(i))
        assert rejected == {i for i, q in enumerate(corrected) if q <= level}


def test_large_sets_stay_small_in_memory_and_time():
    low, high = bootstrap_interval(np.random.default_rng(0).normal(0.1, 1, 3000), method="percentile")
    assert 0.02 < high - low < 0.12 and low < 0.1 < high


# -- the table

def test_only_equal_images_compete_and_gaps_say_why():
    full, part = rows([20, 30, 25]), rows([20, 30])
    table = compare({"Set": {"full": full, "part": part, "other": rows([19, 29, 24])}}, {"full": ["part", "other"]}); cells = table.lines["Set", "psnr"]
    assert cells["part"].rank == 0 and cells["full"].rank == 1 and cells["other"].rank == 0 and cells["part"].gain == 0 and "no file for 002" in to_markdown(table)
    assert compare({"full": full, "part": part}, images="common").lines["", "psnr"]["full"].mean == 25 and "the gain is over the 2 that both have" in to_markdown(table)


def test_hostile_names_stay_inside_their_cells():
    bad = "50% of_a & b|c <i>x</i> \\cmd{y} #1 $z^2 ~"
    table = compare({bad: {bad: rows([20, 21]), "plain": rows([21, 22])}}, {bad: "plain"}, groups={bad: bad})
    tex, page, text = to_latex(table), to_html(table, bad), to_markdown(table)
    body = [line for line in tex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {3} and r"50\% of\_a \& b" in tex and not re.search(r"(?<!\\)[%#$]", re.sub(r"^%.*|\$\\(up|down)arrow\$", "", tex, flags=re.M))
    assert "<i>" not in page and "&lt;i&gt;" in page and "<script" not in page
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")} == {5}
    assert {len(line) for line in csv.reader(io.StringIO(to_csv(table)))} == {13}


def test_latex_compiles(tmp_path):
    if not shutil.which("pdflatex"): pytest.skip("pdflatex is not installed: the table was not compiled")
    table = compare({"Real_SR": {"a_b": rows([20, 21]), "c&d": rows([21, 22])}}, {"a_b": "c&d"})
    (tmp_path / "t.tex").write_text("\\documentclass{article}\\usepackage{booktabs,multirow}\\usepackage[dvipsnames]{xcolor}\\begin{document}" + to_latex(table) + "\\end{document}")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]


# -- test sets

def test_realsr_is_as_published():
    folder = ROOT.parent / "shared/data/realsr"
    if not folder.is_dir(): pytest.skip("RealSR is not beside the project: its pixels were not compared")
    report = check_testset("RealSR", folder)
    assert report.ok and report.compared and report.counts == dict(lr=100, hr=100), report


# -- the notebook

def papermill(output, root, *options, **parameters):
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/evaluate.ipynb"), str(output), "-k", "python3", "--no-progress-bar", *options]
    for name, value in parameters.items(): command += ["-p", name, str(value)]
    env = dict(os.environ, FRAMER_ROOT=str(root), FRAMER_METRIC_WEIGHTS=str(root / "no-weights"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A project folder of its own, with two methods' results: one misses an image, one has a file that is cut off."
    root = tmp_path_factory.mktemp("project"); (root / "data").symlink_to(ROOT / "data"); (root / "no-weights").mkdir()
    random = np.random.default_rng(0)
    for name in ("gt", "base", "ours"): (root / name).mkdir()
    for i in range(8):
        pixels = random.integers(60, 200, (12, 12, 3)).repeat(4, 0).repeat(4, 1)
        for name, noise, ending in (("gt", 0, "_HR"), ("base", 12, "_x4"), ("ours", 6, "")):
            Image.fromarray((pixels + random.integers(-noise, noise + 1, pixels.shape)).clip(0, 255).astype(np.uint8)).save(root / name / f"p{i}{ending}.png")
    earlier = {method: Scores(dict(image=f"{i}.png", psnr=20.0 + i + k) for i in range(3)) for k, method in enumerate(("base_line", "FRAMER_U"))}
    for scores in earlier.values(): scores.protocol, scores.versions = "framer", {"pyiqa": "0.0"}
    (root / "reports/earlier").mkdir(parents=True); write_json(root / "reports/earlier/evaluation.json", dict(dataset="Earlier", scores=save_scores(earlier, root / "reports/earlier")))
    old, new = (Scores(dict(image=f"p{i}.png", psnr=value + i) for i in range(8)) for value in (18.0, 19.0))
    for scores in (old, new): scores.protocol, scores.versions = "framer", {"pyiqa": "0.1"}
    (root / "reports/older").mkdir(); write_json(root / "reports/older/evaluation.json", dict(dataset="tiny", scores=save_scores(dict(old=old), root / "reports/older")))
    (root / "reports/elsewhere").mkdir(); write_json(root / "reports/elsewhere/evaluation.json", dict(dataset="Other", scores=save_scores(dict(new=new), root / "reports/elsewhere")))
    (root / "ours/p3.png").unlink(); whole = (root / "base/p5_x4.png").read_bytes(); (root / "base/p5_x4.png").write_bytes(whole[:len(whole) // 2])
    return root


def test_notebook_scores_the_rest_and_shows_the_gaps(root, tmp_path):
    done = papermill(tmp_path / "out.ipynb", root, "-y", "{results: {base_line: base, FRAMER_U: ours}, pairs: {base_line: [FRAMER_U, new], old: base_line}, metrics: [psnr, ssim, lpips], include: [earlier, older, elsewhere]}", references="gt", dataset="tiny", run="gaps", worst=1, crop=24, resamples=500)
    assert done.returncode == 0, done.stderr[-3000:]
    run = root / "reports/gaps"; about, text = json.loads((run / "evaluation.json").read_text()), (run / "table1.md").read_text()
    assert about["methods"]["FRAMER_U"]["counts"]["psnr"] == 7 and about["methods"]["base_line"]["counts"]["psnr"] == 7 and about["environment"]["hardware"]["cpu"] and about["config"]["pairs"] == {"base_line": ["FRAMER_U", "new"], "old": "base_line"}
    assert "p3_HR.png: there is no result" in str(about["methods"]["FRAMER_U"]) and "p5_x4.png is cut off" in str(about["methods"]["base_line"])
    assert "mean over 7 of 8 images" in text and "Protocol: framer" in text and "pyiqa" in text and "not available" in text and "| LPIPS ↓ | -<sup>" in text
    assert "| 21.00 | **22.00** (+4.8%) |" in text and "pyiqa 0.0 (base\\_line, FRAMER\\_U)" in text
    paired = {row["metric"]: row for row in csv.DictReader((run / "significance.csv").open()) if row["testset"] == "tiny" and row["method"] == "FRAMER_U"}
    assert paired["psnr"]["n"] == "6" and float(paired["psnr"]["improvement"]) > 3 and paired["psnr"]["wins"] == "6" and paired["lpips"]["n"] == "0"
    assert len(list(csv.DictReader((run / "scores.csv").open()))) == 16
    for name in ("table1.tex", "table1.html", "table1.csv", "figures/base_line-FRAMER_U-scatter-psnr.png", "figures/base_line-FRAMER_U-differences.png", "figures/base_line-FRAMER_U-worst.png", "figures/base_line-FRAMER_U-best.png"): assert (run / name).stat().st_size > 200, name
    name, kept = read_evaluation(run); assert name == "tiny" and list(kept) == ["base_line", "FRAMER_U"] and kept["FRAMER_U"].protocol == "framer"


def test_scoring_goes_on_where_it_ended(root, tmp_path):
    folders, how = {"base": root / "base", "ours": root / "ours"}, dict(metrics=["psnr"], out=tmp_path / "record.jsonl")
    with pytest.warns(UserWarning, match="have gaps"): first = score_methods(folders, root / "gt", **how)
    lines = (tmp_path / "record.jsonl").read_text().count("\n")
    with pytest.warns(UserWarning, match="have gaps"): again = score_methods(folders, root / "gt", **how)
    assert first["ours"].rows == again["ours"].rows and (tmp_path / "record.jsonl").read_text().count("\n") == lines


def test_sizes_that_differ_are_all_listed(root, tmp_path):
    for name in ("one", "two"): shutil.copytree(root / "ours", tmp_path / name)
    for name in ("one/p1", "two/p2", "two/p4"): Image.new("RGB", (44, 48)).save(tmp_path / f"{name}.png")
    folders = {name: tmp_path / name for name in ("one", "two")}
    with pytest.raises(ValueError) as error: score_methods(folders, root / "gt", metrics=["psnr"])
    assert all(f"{name}.png is 44x48" in str(error.value) for name in ("one/p1", "two/p2", "two/p4")) and "on_error='gap'" in str(error.value)
    with pytest.warns(UserWarning, match="44x48"): scores = score_methods(folders, root / "gt", "gap", metrics=["psnr"])
    assert len(scores["two"].problems) == 3 and scores["one"].means["psnr"] > 30


def test_notebook_without_parameters_makes_its_example(root, tmp_path):
    if not any((ROOT / "data/photographs/val").glob("*.jpg")): pytest.skip("the bundled photographs are not here")
    done = papermill(tmp_path / "out.ipynb", root)
    assert done.returncode == 0, done.stderr[-3000:]
    about = json.loads((root / "reports/evaluation/evaluation.json").read_text())
    assert about["dataset"] == "example" and set(about["methods"]) == {"bicubic", "Lanczos"} and about["methods"]["bicubic"]["counts"]["psnr"] == 12 and "fetch_weights" in about["methods"]["bicubic"]["missing"]["lpips"]
    assert "Lanczos over bicubic" in (root / "reports/evaluation/table1.html").read_text()


def test_the_example_is_the_same_everywhere(tmp_path):
    photographs = sorted((ROOT / "data/photographs/val").glob("*.jpg"))[:1]
    if not photographs: pytest.skip("the bundled photographs are not here")
    for name in ("a", "b"): example_results(tmp_path / name, photographs, 64, 1)
    assert [p.read_bytes() for p in sorted((tmp_path / "a").rglob("*.png"))] == [p.read_bytes() for p in sorted((tmp_path / "b").rglob("*.png"))]
