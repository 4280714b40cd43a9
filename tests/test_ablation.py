"""scripts/demo/ablation.py: its rows are trainings that exist, its figures means of paired ones."""

import csv
import importlib
import re
from types import SimpleNamespace

import ablation
import pytest
import torch
from conftest import ROOT
from PIL import Image

FLAG = re.compile(r"(--\w+) ([^-\s]\S*)")


def test_recipe_is_the_quickstarts():
    """But for what is about data, place and how it is shown."""
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    command = text[text.index("python ") : text.index('"$@"')]
    theirs, ours = (dict(FLAG.findall(words)) for words in (command, " ".join(ablation.RECIPE)))
    assert len(ours) >= 9 and ours.items() <= theirs.items()
    others = theirs.keys() - ours.keys()
    assert all(re.search("model|dataset|checkpoint|valid|report|resume|out", f) for f in others)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_rows_are_trainings(family, tmp_path):
    """The trainer takes each row's flags, and each but the default's changes something."""
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    given = ["--pretrained_teacher_model", "x", "--dataset_name", "y", "--output_dir", tmp_path]

    def parsed(row):
        flags = ablation.FLAGS[row].format(generated="z").split()
        return vars(trainer.parse_args([*map(str, given), *ablation.RECIPE, *flags]))

    rows = [parsed(row) for row in ablation.FLAGS]
    assert len(rows) > 25 and all(rows.count(row) == 1 for row in rows)
    for question, settings in ablation.QUESTIONS.items():
        assert list(settings.values()).count("") == 1, f"{question}: the default has its place"


@pytest.fixture
def kits(tmp_path, monkeypatch):
    """Commands in the place of programs; a training leaves its LoRA."""
    commands = []

    def run(program, *words):
        words = [*map(str, words)]
        commands.append([program, *words])
        for flag in "--output_dir", "--output":
            if flag in words:
                folder = tmp_path / words[words.index(flag) + 1]
                folder.mkdir(parents=True, exist_ok=True)
                name = "state.json" if flag == "--output" else ablation.evaluate.infer.WEIGHTS_NAME
                (folder / name).write_text("")

    monkeypatch.setattr(ablation, "run", run)
    return commands


def test_commands(kits, tmp_path):
    """Data are made once; rows and seeds are trained in order, each into its own folder."""
    flags = ["--seed", "0", "3", "--only_train", "--output", str(tmp_path)]
    assert ablation.main(["default", "omega-2to4", "data-generated", *flags]) == 0
    programs = [command[0] for command in kits]
    encode, generate = "scripts/encode_data.py", "scripts/generate_data.py"
    trainer = "train_lcm_lora_sd15.py"
    assert programs == [encode, *[trainer] * 4, generate, trainer, trainer]
    names = [command[command.index("--output_dir") + 1] for command in kits if "--seed" in command]
    rows = [row for row in ("default", "omega-2to4", "data-generated") for _ in range(2)]
    seeds = ["seed0", "seed3"] * 3
    expected = [f"{row}-{seed}" for row, seed in zip(rows, seeds)]
    assert [name.split("/")[-1] for name in names] == expected
    assert kits[3][-6:-4] == ["--w_max", "4"] and "--w_max" in ablation.RECIPE
    args = SimpleNamespace(folder=tmp_path / "sd15", rows=[])
    assert [*ablation.trained(args)] == ["default", "omega-2to4", "data-generated"]
    assert [*ablation.trained(args)["default"]] == [0, 3]


def test_unknown_row_and_nothing_to_measure(kits, tmp_path, capsys):
    """Both end with a line."""
    for words, says in (["phases-3"], "no row"), ([], "name a row"):
        with pytest.raises(SystemExit, match=says):
            ablation.main([*words, "--output", str(tmp_path)])


def test_figures_are_means_of_pairs(kits, tmp_path, monkeypatch, capsys):
    """A row of one seed is compared with the default of that seed alone; the report says so."""
    torch.manual_seed(0)
    noise = torch.cat([torch.zeros(1), torch.randn(100)]).double()
    levels = {("default", 0): 3.0, ("default", 3): 5.0, ("phases-1", 3): 9.0}

    def measure(args, found):
        assert {row: [*seeds] for row, seeds in found.items()} == {
            "default": [0, 3],
            "phases-1": [3],
        }
        ours = {
            (row, seed, steps): {f: (level + noise) / 1000 for f in ablation.FIGURES}
            for (row, seed), level in levels.items()
            for steps in ablation.STEPS
        }
        solver = {s: {f: (50 + noise) / 1000 for f in ablation.FIGURES} for s in (4, 8, "floor")}
        return ours, solver

    monkeypatch.setattr(ablation, "measure", measure)
    flags = ["--output", str(tmp_path)]
    ablation.main(["default", "--seed", "0", "3", "--only_train", *flags])
    assert ablation.main(["phases-1", "--seed", "3", *flags]) == 0
    with open(tmp_path / "sd15" / "figures.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["steps"] == "4"]
    found = {(row["row"], row["figure"]): row for row in rows}
    value = {key: 1000 * float(row["value"]) for key, row in found.items()}
    assert value["default", "kid"] == pytest.approx(4)
    assert value["phases-1", "kid, less default's"] == pytest.approx(4)
    seeds = found["default", "kid, of the seeds"]
    assert 1000 * float(seeds["low"]) == pytest.approx(3)
    assert 1000 * float(seeds["high"]) == pytest.approx(5)
    text = (tmp_path / "sd15" / "README.md").read_text()
    assert "| phases-1 | `--phases 1 --num_ddim_timesteps 40` | 1 |" in text
    assert "| phases-1 | 4.00 [4.00, 4.00] |" in text and "| DPM-Solver++ |  |  |" in text
    assert value["default", "kid, less DPM-Solver++'s"] == pytest.approx(-46)
    assert Image.open(tmp_path / "sd15" / "plot.png").width == 880


def test_measure_is_the_rulers(tmp_path, monkeypatch):
    """Roles of evaluate.py become rows and seeds; its flags are ones that it takes."""
    (tmp_path / "sd15").mkdir()
    folders = {"default": {0: tmp_path / "a", 1: tmp_path / "b"}}
    kind = ablation.evaluate.Lora
    loras = [kind("x", f / "file", 1.0, ("tcd",), 20, "") for f in folders["default"].values()]
    roles = [(lora, "tcd", steps) for lora in loras for steps in (1, 2)]
    columns = {role: SimpleNamespace(lora=role[0]) for role in roles}
    figures = {role: {"kid": index} for index, role in enumerate(columns)}
    figures |= {"floor": {"kid": -1}, "reference": {}, (ablation.evaluate.SOLVER, 4): {"kid": 9}}
    seen = []

    def measured_columns(args):
        seen.append(args)
        return None, loras, columns, None, figures

    monkeypatch.setattr(ablation.evaluate, "measured_columns", measured_columns)
    args = ablation.parse_args(["--output", str(tmp_path), "--num_prompts", "77"])
    ours, solver = ablation.measure(args, folders)
    expected = {("default", 0, 1): 0, ("default", 0, 2): 1, ("default", 1, 1): 2}
    assert {key: ours[key]["kid"] for key in expected} == expected
    assert solver == {"floor": {"kid": -1}, 4: {"kid": 9}}
    assert seen[0].num_prompts == 77 and seen[0].lora == [str(tmp_path / "a"), str(tmp_path / "b")]
