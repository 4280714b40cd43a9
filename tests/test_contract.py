"""What the programs promise about themselves, read from their source: no model, no torch, under a second."""

import ast
import re
import sys

import drift
import pytest
from conftest import ROOT, documented_commands, run, shell_commands

TRAINERS = [name for name in ("train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py") if (ROOT / name).exists()]
PROGRAMS = [*TRAINERS, "infer.py"]
DISTRIBUTION = {"PIL": "pillow"}  # where the name of the import is another


def tree(name):
    """A program's syntax tree."""
    return ast.parse((ROOT / name).read_text())


def definition(name, function):
    """A top-level function of a program."""
    (node,) = [n for n in tree(name).body if isinstance(n, ast.FunctionDef) and n.name == function]
    return node


def flags(module):
    """The flags that a program's parser knows, without the dashes."""
    calls = [node for node in ast.walk(module) if isinstance(node, ast.Call) and node.args]
    words = [call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)]
    return {word[2:] for word in words if isinstance(word, str) and re.fullmatch(r"--\w+", word)}


def reads_of_args(module):
    """Names x read as args.x or something.args.x outside parse_args."""
    outside = [node for node in module.body if getattr(node, "name", "") != "parse_args"]
    return {
        node.attr
        for top in outside
        for node in ast.walk(top)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and ast.unparse(node.value).endswith("args")
    }


def pins():
    """{distribution: the rest of its line} of requirements.txt."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return dict(re.match(r"([\w.-]+)(.*)", line).groups() for line in lines if line)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_read(program):
    module = tree(program)
    assert len(flags(module)) > 5
    assert flags(module) - reads_of_args(module) == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_definition_is_used(program):
    module = tree(program)
    defined = {}
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {n.id: node for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    for name, node in defined.items():
        others = [n for top in module.body if top is not node for n in ast.walk(top) if isinstance(n, ast.Name)]
        assert any(n.id == name and isinstance(n.ctx, ast.Load) for n in others), f"{program}: nothing uses {name}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_imports_are_what_requirements_name(program):
    imports = [node for node in ast.walk(tree(program)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert "torch" in roots
    assert {DISTRIBUTION.get(root, root) for root in roots} - set(pins()) == set()


def test_requirements_are_pinned():
    assert len(pins()) > 8
    for name, rest in pins().items():
        assert re.fullmatch(r"==[\w.]+", rest), f"requirements.txt: {name}{rest}"
    assert pins()["torch"] == "==2.13.0"
    assert "torchvision" not in pins()


@pytest.mark.parametrize("program", TRAINERS)
def test_trainers_are_short(program):
    assert len((ROOT / program).read_text().splitlines()) <= 1650
    step = definition(program, "distillation_loss")
    body = step.body[1] if ast.get_docstring(step) else step.body[0]
    assert step.end_lineno - body.lineno + 1 <= 40


@pytest.mark.parametrize("program", TRAINERS)
def test_help_loads_no_library(program):
    """So it comes at once."""
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(ROOT / program)!r}, run_name='__main__')\n"
    done = run(sys.executable, "-c", code + "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.endswith("False False\n") and "--train_data_dir" in done.stdout


def test_trainers_have_not_drifted(capsys):
    """What bears one name in both trainers is byte-identical, save six definitions or fewer."""
    assert drift.main([]) == 0, capsys.readouterr().out
    assert len(drift.DIFFERS) <= 6
    one, other = (drift.definitions((ROOT / name).read_text()) for name in drift.TRAINERS)
    assert one.keys() == other.keys() and len(one) > 50


def test_drift_is_found_and_mended(tmp_path, capsys):
    """A changed function, a changed constant and a changed comment are named; --fix makes them the same again."""
    right, wrong = (tmp_path / name for name in drift.TRAINERS)
    for path in (right, wrong):
        path.write_text((ROOT / path.name).read_text())
    whole, text = wrong.read_text(), wrong.read_text()
    for old, new in (
        ("return e2.mean() if", "return e2.sum() if"),
        ('FORMAT_VERSION = "1"', 'FORMAT_VERSION = "2"'),
        ("# t_n, k timesteps below", "# t_n, some timesteps below"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    wrong.write_text(text)
    assert drift.main(["--folder", str(tmp_path)]) == 1
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert named == ["FORMAT_VERSION", "distance", "distillation_loss"]
    assert drift.main(["--folder", str(tmp_path), "--fix", right.name]) == 0
    assert wrong.read_text() == whole


def test_shell_commands_are_found():
    text = 'set -e\nA=1 accelerate launch --n "$(f "$(g)" x)" \\\n  a.py --out "$out" "two words" "$@" && exec python b.py # c\n'
    assert shell_commands(text) == [
        ["set", "-e"],
        ["accelerate", "launch", "--n", "1", "a.py", "--out", "1", "two words"],
        ["python", "b.py"],
    ]


def test_documented_commands_name_programs_that_exist():
    commands = documented_commands()
    assert len([name for name, _ in commands if name == "README.md"]) >= 2
    for source, words in commands:
        program = next(word for word in words if word.endswith((".py", ".sh")))
        assert (ROOT / program).is_file(), f"{source}: {' '.join(words)}"
