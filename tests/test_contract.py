"""What the programs promise about themselves, read from their source: no model, no torch."""

import ast
import re
import sys

import drift
import pytest
from conftest import ROOT, documented_commands, run, shell_commands

TRAINERS = ["train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py"]
PROGRAMS = [*TRAINERS, "infer.py"]
EVERY_PROGRAM = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/**/*.py")])
TEXTS = sorted({*EVERY_PROGRAM, *ROOT.glob("scripts/**/*.sh")} - {ROOT / "infer.py"})
# What a trainer may be: a line limit would be paid in width
LIMIT_KIB, COLUMNS, LIMIT_FUNCTION = 136, 100, 125
LIMIT_ALGORITHM, LIMIT_LOSS, LIMIT_LOOP = 370, 45, 45
ALGORITHM = (
    "NoiseSchedule ddim_timesteps boundary_scalings phases_at rescale_guidance "
    "consistency_function distance rng normal rounded predict sample_batch guided_output "
    "distillation_loss optimizer_step train"
).split()
POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "pty"}
# The field says image, generated or sampled, unusable record
WORDS = r"(?i)\b(pictures?|drawn|draws|odd[\s_]records?|oddrecord)\b"
DISTRIBUTION = {"PIL": "pillow"}  # where the name of the import is another


def tree(name):
    """A program's syntax tree."""
    return ast.parse((ROOT / name).read_text())


def definition(program, name):
    """A top-level function or class of a program."""
    (node,) = [node for node in tree(program).body if getattr(node, "name", "") == name]
    return node


def length(node):
    """The lines of a definition, its docstring among them."""
    return node.end_lineno - node.lineno + 1


def names_of(node):
    """The names that an assignment gives something to."""
    targets = [name for target in node.targets for name in ast.walk(target)]
    return [n.id for n in targets if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def flags(module):
    """What the flags of a program's parser are called in its args."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            flag, settings = node.args[0].value, {key.arg: key.value for key in node.keywords}
            if isinstance(flag, str) and re.fullmatch(r"--\w+", flag):
                names.add(settings["dest"].value if "dest" in settings else flag[2:])
    return names


def reads_of_args(module):
    """Names x read as args.x or something.args.x, elsewhere than where the flags are checked.

    A function that goes through vars(args) reads those that it names in strings.
    """
    checks, known, names = ("parse_args", "check_args"), flags(module), set()
    for top in module.body:
        nodes = [] if getattr(top, "name", "") in checks else [*ast.walk(top)]
        reads = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
        names |= {n.attr for n in reads if ast.unparse(n.value).endswith("args")}
        if "vars(args)" in [ast.unparse(n) for n in nodes if isinstance(n, ast.Call)]:
            names |= {n.value for n in nodes if isinstance(n, ast.Constant) and n.value in known}
    return names


def pins():
    """{distribution: the rest of its line} of requirements.txt."""
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    return dict(re.match(r"([\w.-]+)(.*)", line).groups() for line in lines if line)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_flag_is_read(program):
    module = tree(program)
    grids = reads_of_args(tree("scripts/compare.py")) if program == "infer.py" else set()
    assert len(flags(module)) > 25
    assert flags(module) - reads_of_args(module) - grids == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_definition_is_used(program):
    module = tree(program)
    defined = {}
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= dict.fromkeys(names_of(node), node)
    for name, node in defined.items():
        others = [
            n
            for top in module.body
            if top is not node
            for n in ast.walk(top)
            if isinstance(n, ast.Name)
        ]
        assert any(n.id == name and isinstance(n.ctx, ast.Load) for n in others), (
            f"{program}: nothing uses {name}"
        )


@pytest.mark.parametrize("program", PROGRAMS)
def test_imports_are_what_requirements_name(program):
    imports = [
        node for node in ast.walk(tree(program)) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {
        "." * node.level + (node.module or "")
        for node in imports
        if isinstance(node, ast.ImportFrom)
    }
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
def test_trainers_are_small(program):
    assert (ROOT / program).stat().st_size <= LIMIT_KIB * 1024


@pytest.mark.parametrize("program", PROGRAMS)
def test_lines_are_short(program):
    lines = (ROOT / program).read_text().splitlines()
    assert [f"{i}: {len(line)}" for i, line in enumerate(lines, 1) if len(line) > COLUMNS] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_functions_are_short(program):
    nodes = [node for node in ast.walk(tree(program)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in nodes if length(node) > LIMIT_FUNCTION]
    assert len(nodes) > 50 and {*long} <= {"parse_args"}


@pytest.mark.parametrize("program", TRAINERS)
def test_algorithm_1_stands_in_one_run(program):
    """From the schedule to the loop, in this order, with nothing between but Run and constants."""
    body = tree(program).body
    first, last = (definition(program, name) for name in (ALGORITHM[0], ALGORITHM[-1]))
    between = [node for node in body if first.lineno <= node.lineno <= last.lineno]
    constants = [node for node in between if isinstance(node, ast.Assign)]
    assert all(name.isupper() for node in constants for name in names_of(node))
    others = [node.name for node in between if node not in constants]
    assert [name for name in others if name != "Run"] == ALGORITHM
    assert last.end_lineno - first.lineno + 1 <= LIMIT_ALGORITHM
    assert length(definition(program, "distillation_loss")) <= LIMIT_LOSS


@pytest.mark.parametrize("program", TRAINERS)
def test_the_loop_shows_the_symbols(program):
    """Batch, loss and update as Algorithm 1 writes them, in a function that is seen at once."""
    loop = definition(program, "train")
    assert length(loop) <= LIMIT_LOOP
    text = ast.get_source_segment((ROOT / program).read_text(), loop)
    parts = ("z, c, noise, t_nk, omega = ", "loss = distillation_loss(", "# theta = theta - ")
    places = [text.find(part) for part in parts]
    assert places == sorted(places) and places[0] > 0


@pytest.mark.parametrize("path", EVERY_PROGRAM, ids=lambda path: path.name)
def test_programs_start_on_any_system(path):
    """No module that only POSIX systems have is imported, not even inside a function.

    Only measuring programs may do that there: nothing else tells the most memory of a process.
    """
    nodes = ast.parse(path.read_text()).body
    if path.parent.name == "measure":
        nodes = [node for node in nodes if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    nodes = [inner for node in nodes for inner in ast.walk(node)]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names & POSIX_ONLY == set()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_words_are_the_fields(path):
    """The same thing has the same name in all programs, and it is the one that others use."""
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [f"{i}: {match[0]}" for i, line in lines if (match := re.search(WORDS, line))] == []


@pytest.mark.parametrize("program", TRAINERS)
def test_help_is_a_page_to_read(program):
    """A usage of a few lines, defaults, units, no line wider than a terminal."""
    done = run(sys.executable, ROOT / program, "--help")
    usage, *rest = done.stdout.split("\n\n")
    assert usage.startswith("usage: ") and len(usage.splitlines()) <= 4
    text = "\n\n".join(rest)
    assert re.search(r"--lora_rank R +rank .* \(default: 64\)\n", text)
    assert text.count("(default: ") > 30 and "None" not in text and "==SUPPRESS==" not in text
    assert max(len(line) for line in done.stdout.splitlines()) <= COLUMNS


@pytest.mark.parametrize("program", TRAINERS)
def test_help_loads_no_library(program):
    """So it comes at once."""
    path = str(ROOT / program)
    code = "import runpy, sys; sys.argv = ['x', '--help']\n"
    code += f"try: runpy.run_path({path!r}, run_name='__main__')\n"
    done = run(
        sys.executable,
        "-c",
        code + "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)",
    )
    assert done.stdout.endswith("False False\n") and "--train_data_dir" in done.stdout


def test_trainers_have_not_drifted(capsys):
    """What bears one name in both trainers is byte-identical, save six definitions or fewer."""
    assert drift.main([]) == 0, capsys.readouterr().out
    assert len(drift.DIFFERS) <= 6
    one, other = (drift.definitions((ROOT / name).read_text()) for name in drift.TRAINERS)
    assert one.keys() == other.keys() and len(one) > 50


def test_drift_is_found_and_mended(tmp_path, capsys):
    """A changed function, a changed constant and a changed comment are named.

    --fix makes them the same again.
    """
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
    text = 'set -e\nA=1 accelerate launch --n "$(f "$(g)" x)" \\\n  a.py --out "$out" '
    text += '"two words" "$@" && exec python b.py # c\n'
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


def test_infer_is_short():
    """In lines as wide as a reader's window, and in the order of its sections."""
    lines = (ROOT / "infer.py").read_text().splitlines()
    assert len(lines) <= 1475
    assert [line for line in lines if len(line) > 100] == []
    sections = re.findall(r"^# -+ (\d)\. (.*)$", "\n".join(lines), re.MULTILINE)
    titles = ["Arguments", "The LoRA file", "The pipeline", "Generate", "Save", "Main"]
    assert sections == [(str(number), title) for number, title in enumerate(titles, 1)]
