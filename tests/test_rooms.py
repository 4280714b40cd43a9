"""The rooms of scripts/: which program stands where, and how wide lines are everywhere."""

import ast
import subprocess

import pytest
from conftest import ROOT

ROOMS = {
    # what users run, and what those programs share
    "": "check_data.py compare.py convert_lora.py encode_data.py environment.sh evaluate.py "
    "features.py fuse_lora.py generate_data.py help_formatter.py launch.sh make_teacher.py "
    "metrics.py prepare_data.py quickstart.sh read_recipe.py requirements-eval.txt studio.py "
    "test.sh train_sd15.sh train_sdxl.sh train_sdxl_pokemon.sh train_ssd1b.sh",
    "accelerate/": "eight_gpus.yaml one_gpu.yaml slurm.sh two_nodes.yaml",
    "demo/": "ablation.py build_dataset.py concepts.txt evaluate_demo.py evaluate_style.py "
    "requirements.txt style.sh train_style_lora.py train_teacher.py",
    "measure/": "benchmark.py check_card.py compare_speed.py count_bytes.py decode_speed.py "
    "full_size.py gpu.sh memory.py official_unets.py random_teacher.py random_training.py "
    "rounding.py stream_memory.py",
    "proofs/": "chaos.py defects.py drift.py odd_inputs.py odd_kinds.py",
}
WIDTH = 100


def tracked(*patterns):
    """The files of the repository with these patterns, relative to its root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    text = subprocess.check_output([*command, "--", *patterns], cwd=ROOT, text=True)
    return sorted({name for name in text.split("\0") if name and (ROOT / name).exists()})


def test_each_program_has_its_room():
    """A new program is entered here, in the room that it belongs to."""
    expected = {f"scripts/{room}{name}" for room, names in ROOMS.items() for name in names.split()}
    assert expected == set(tracked("scripts"))


def test_no_two_programs_share_a_name():
    """All of their folders are on the path of the tests, and of some programs."""
    names = [name.split("/")[-1] for name in tracked("*.py") if not name.startswith("tests/")]
    assert len(names) == len(set(names)) > 20


@pytest.mark.parametrize("name", tracked("*.py", "*.sh"))
def test_lines_are_short(name):
    """At most 100 columns, in code, comments, help and messages alike."""
    lines = (ROOT / name).read_text().splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert not wide, f"{name}: lines {wide} have more than {WIDTH} columns"


@pytest.mark.parametrize("name", tracked("scripts/*.py"))
def test_programs_stand_without_the_tests(name):
    """No program imports a module of tests/, and none names that folder but to run it."""
    text = (ROOT / name).read_text()
    modules = {path.split("/")[-1].removesuffix(".py") for path in tracked("tests/*.py")}
    nodes = [*ast.walk(ast.parse(text))]
    imports = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imports |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not modules & imports
    assert "spec_from_file_location" not in text
    assert '"tests"' not in text
