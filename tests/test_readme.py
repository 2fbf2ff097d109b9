"""What the README says can be run, can be run; what it names is there."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
# The commands of "Your own data": lines of its first code block, without their comments
OWN_DATA = README.split("## Your own data")[1].split("```")[1]
COMMANDS = [shlex.split(line, comments=True) for line in OWN_DATA.strip().splitlines()]
# `data.py: clean_ecg, crop_heart`
NAMES = re.findall(r"`(\w+)\.py: ([\w, .]+)`", README)
STEP = README.split("```python")[1].split("```")[0]


def test_the_commands_of_your_own_data_run_as_printed(run_script, tmp_path):
    assert len(COMMANDS) == 7
    for python, script, *arguments in COMMANDS:
        assert python == "python"
        finished = run_script(script, *arguments, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
    for made in ("subject.png", "runs/demo/eval/table.md", "demo/predictions.csv"):
        assert (tmp_path / made).stat().st_size > 0


@pytest.mark.parametrize(("module", "names"), NAMES)
def test_every_function_that_is_named_exists(module, names):
    for name in names.split(", "):
        assert hasattr(importlib.import_module(module), name), f"{module}.py has no {name}"


def test_the_training_step_is_that_of_train_py():
    lines = [line.strip() for line in (ROOT / "train.py").read_text().splitlines()]
    steps = [line.split("  # ")[0].strip() for line in STEP.strip().splitlines()]
    sources = [line.split("  # ")[0] for line in lines]
    assert len(steps) == 8 and set(steps) <= set(sources)


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
