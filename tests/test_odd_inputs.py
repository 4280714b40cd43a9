"""scripts/proofs/odd_inputs.py: what its judge lets pass and what it does not; and all of it."""

import subprocess
import sys

import odd_inputs
import odd_kinds
import pytest
from conftest import ROOT
from odd_inputs import judge
from odd_kinds import Case

# {what is wrong: (a program, what the judge says)}
PROGRAMS = {
    "nothing": ("", ""),
    "one line": ("raise SystemExit('x.py: error: --flag 3: give 4')", ""),
    "a traceback": ("1 / 0", "traceback"),
    "another flag": ("raise SystemExit('x.py: error: --other: give 4')", "has none of"),
    "no line": ("raise SystemExit(3)", "0 lines"),
    "two lines": ("raise SystemExit('error: a\\nerror: b')", "2 lines"),
    "a crash": ("import os; os.abort()", "crash"),
    "a hang": ("import time; time.sleep(60)", "hang"),
    "a half image": ("open('out/a.png', 'wb').write(b'PNG')", "a.png is not whole"),
    "half a LoRA": ("open('out/a.safetensors', 'wb').write(b'1')", "a.safetensors is not whole"),
    "no JSON": ("open('out/a.json', 'w').write('[NaN]')", "a.json is not whole"),
    "a part": ("open('out/a.png.part', 'wb').write(b'')", "left over"),
    "elsewhere": ("open('b.txt', 'w').write('')", "elsewhere: 'b.txt'"),
    "an input": ("open('input.txt', 'w').write('')", "elsewhere: 'input.txt'"),
    "a lost input": ("import os; os.remove('input.txt')", "elsewhere: 'input.txt'"),
    "what is shared": ("open('../shared/x', 'w').write('')", "elsewhere"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a case, with an input and a folder for outputs."""
    monkeypatch.setattr(odd_kinds, "SHARED", tmp_path / "shared")
    monkeypatch.setattr(odd_inputs, "LIMIT", 3)
    folder = tmp_path / "case"
    (folder / "out").mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    (folder / "input.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_judge(name, place, tmp_path):
    """Each way to end badly is seen, and the good ones pass."""
    text, wanted = PROGRAMS[name]
    (tmp_path / "x.py").write_text(text)
    wrong = judge(Case("A1", [[tmp_path / "x.py"]], names=("--flag",)), place)
    assert wanted in wrong
    assert bool(wrong) == bool(wanted)


def test_what_is_right_is_asked(place, tmp_path):
    """Exit code 0 is not enough: the result is checked, and what must be refused is."""
    (tmp_path / "x.py").write_text("print('six images')")
    (tmp_path / "y.py").write_text("raise SystemExit('error: no')")
    works, fails = [[tmp_path / "x.py"]], [[tmp_path / "y.py"]]
    six, seven = odd_kinds.has("six"), odd_kinds.has("seven")
    assert judge(Case("A1", works, six), place) == ""
    assert "seven" in judge(Case("A1", works, seven), place)
    assert judge(Case("A1", works, None, "refuse"), place) == "not refused"
    assert "refused: error: no" in judge(Case("A1", fails, None, "work"), place)
    assert "refused" in judge(Case("A1", [*fails, *works], six), place)


@pytest.mark.parametrize("closed", [False, True])
def test_a_program_has_the_last_word(place, tmp_path, closed):
    """Its own excepthook is called, as Python does: a line of it is no traceback."""
    says = "lambda *_: print('error: --flag 3: stopped', file=sys.stderr)"
    text = f"import sys\nsys.excepthook = {says}\nprint('a')\n1 / 0\n"
    (tmp_path / "x.py").write_text(text)
    assert judge(Case("D21", [[tmp_path / "x.py"]], names=("--flag",), closed=closed), place) == ""


def test_a_seed_deals_the_same_cases():
    """Another seed deals others; none comes twice before all have come; --only keeps to a kind."""
    cases = [odd_inputs.deal(odd_inputs.parse_args(["--seed", seed])) for seed in "112"]
    assert cases[0] == cases[1] != cases[2]
    assert len({*cases[0]}) == len(cases[0]) == 200
    assert {kind.__name__ for kind, _ in cases[0]} == {kind.__name__ for kind in odd_kinds.KINDS}
    only = odd_inputs.deal(odd_inputs.parse_args(["--only", "tars", "--cases", "30"]))
    assert {kind for kind, _ in only} == {odd_kinds.tars}


@pytest.mark.slow
def test_two_hundred_cases():
    """Each ends in a right result or in one clear line."""
    command = [sys.executable, ROOT / "scripts/proofs/odd_inputs.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    failed = [line for line in result.stdout.splitlines() if not line.endswith("holds")]
    assert result.returncode == 0, "\n".join(failed)
