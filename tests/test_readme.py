"""The README's promises: quick commands run as printed, named functions and pictures exist."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()


def commands(heading):
    """Lines starting with `python` in the first code block below a heading, comments cut off."""
    block = TEXT.split(f"\n## {heading}\n")[1].split("```")[1]
    found = [line.split("  #")[0].strip() for line in block.splitlines()]
    return [line for line in found if line.startswith("python ")]


def test_the_tour_of_your_own_data_runs_as_printed(tmp_path):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    python = {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    lines = commands("Your own data")
    assert len(lines) >= 6
    for line in lines:
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=os.environ | python, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    wanted = ("cohort.json", "rejected.csv", "best.pt", "metrics.json", "predictions.csv")
    assert all(any(tmp_path.rglob(name)) for name in wanted)


@pytest.mark.parametrize("script", ["data", "models", "loss", "train", "evaluate"])
def test_functions_that_the_readme_names_exist(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    known = {getattr(node, "name", None) for node in ast.walk(tree)}
    named = re.findall(rf"`{script}\.py: ([\w., ]+)`", TEXT)
    assert named
    for name in (name for names in named for name in names.split(", ")):
        assert name.split(".")[-1] in known, name


@pytest.mark.parametrize("script", ["data", "models", "loss", "train", "evaluate"])
def test_the_readme_knows_how_long_each_file_is(script):
    told = int(re.search(rf"\| `{script}\.py` \| ([\d,]+) \|", TEXT)[1].replace(",", ""))
    assert (ROOT / f"{script}.py").read_text().count("\n") == pytest.approx(told, rel=0.05)


def test_pictures_are_there_and_small():
    pictures = re.findall(r"\]\((assets/[^)]+)\)", TEXT)
    assert pictures
    assert all((ROOT / name).stat().st_size < 300_000 for name in pictures)
    assert {path.name for path in (ROOT / "assets").iterdir()} == {p[7:] for p in pictures}
