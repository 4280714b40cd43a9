"""scripts/generate_data.py: the teacher's own latents and paths, the same after kills, in parts."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, command_line, launch, load_script, log, run
from PIL import Image
from safetensors.torch import load_file, save_file

PROGRAM = "scripts/generate_data.py"
TEACHERS = {"sd15": "teacher", "sdxl": "xl_teacher"}
PROMPTS = ["red apple", "a house", "two cats"]
# A training that fits what `generate` makes with PATHS
PATHS = {"num_ddim_timesteps": 10, "w_min": 2.0, "w_max": 4.0}
# The program with files of two records, forked for each line of the input, so that it starts at
# once; it says the process's number, at its end how it ended
DRIVER = """
import importlib, os, signal, sys

sys.path.insert(0, sys.argv[1])
import generate_data, check_data, infer

trainer = importlib.import_module("train_lcm_lora_sd15")
generate_data.ROWS = 2
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the program begins
        try:
            generate_data.main(sys.argv[2:] + line.split())
        except SystemExit as error:
            if isinstance(error.code, int):
                os._exit(error.code)
            print(error.code, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
TWO = """
import os, sys

sys.path.insert(0, sys.argv[1])
import generate_data

generate_data.ROWS = 1
generate, rank = generate_data.generate_batch, os.environ["RANK"]

def tell(trainer, run, prompts, batch, features, args):
    os.write(1, f"rank {rank}: batch {batch}\\n".encode())  # in one write: they share the pipe
    return generate(trainer, run, prompts, batch, features, args)

generate_data.generate_batch = tell
generate_data.main(sys.argv[2:])
"""


@pytest.fixture(params=TEACHERS)
def layout(request):
    """The name of each trainer."""
    return request.param


@pytest.fixture
def trainer(request, layout):
    """It as a module."""
    return request.getfixturevalue(layout)


@pytest.fixture
def base(request, layout):
    """The folder of a teacher for it."""
    return request.getfixturevalue(TEACHERS[layout])


@pytest.fixture
def train(trainer, train_by, base):
    """train(flag=value, ...) -> output folder of a training of few steps and layers."""
    train = train_by(trainer, base)
    return lambda **flags: train(**{"lora_target_modules": "to_q"} | flags)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of three prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="session")
def program():
    """generate_data.py as a module."""
    return load_script(PROGRAM)


@pytest.fixture
def generate(layout, base, program, prompts, tmp_path):
    """generate(flag=value, ...) -> folder of generated data, without a contact sheet."""
    names = (tmp_path / f"out-{i}" for i in range(100))

    def generate(**flags):
        sources = {"prompts_file", "train_data_dir", "dataset_name", "train_shards_path_or_url"}
        source = {} if flags.keys() & sources else {"prompts_file": prompts}
        given = {"family": layout, "pretrained_teacher_model": base, "output": next(names)}
        given |= {"resolution": 32, "num_images": 5, "batch_size": 2, "solver_steps": 3}
        given |= {"no-contact_sheet": True} | source | flags
        AcceleratorState._reset_state(True)
        torch.set_num_threads(1)
        program.main(command_line(given))
        return given["output"]

    return generate


@pytest.fixture
def paths(generate):
    """paths(flag=value, ...) -> folder of trajectories."""
    return lambda **flags: generate(**{"trajectories": True, "solver_steps": None} | PATHS | flags)


def content(folder):
    """{name: bytes} of the files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


@contextlib.contextmanager
def refused(*words):
    """A block that ends with exit status 1 and one line, which has all these words in it."""
    with pytest.raises(SystemExit) as ended:
        yield
    line = str(ended.value)
    assert re.match(r"(\w+\.py: )?error: ", line) and "\n" not in line, line
    assert all(str(word) in line for word in words), line


def noise_and_omega(trainer, i, w_min, w_max, shape=(4, 8, 8)):
    """What record i of seed 0 starts from, [1,C,h,w], and its omega."""
    omega = trainer.rng(0, 2**32, i, "guidance").uniform(w_min, w_max)
    return trainer.normal(0, 2**32, [i], "noise", shape), omega


# -------------------------------------------------------------------------------- what is generated


@pytest.mark.parametrize("solver", ["dpm++", "ddim"])
def test_latents_are_those_of_diffusers_pipeline(generate, trainer, base, layout, solver):
    """With the omega of each record as guidance, the negative prompt and the rescale."""
    recipe = {"negative_prompt": "rain", "guidance_rescale": 0.6, "w_min": 2.0, "w_max": 6.0}
    folder = generate(solver=solver, solver_steps=5, **recipe)
    data = datasets.load_from_disk(folder).with_format("torch")
    assert data["captions"][:] == [[PROMPTS[i % 3]] for i in range(5)]
    assert {*data["name"]} == {f"image {i}" for i in range(5)} and not any(data["unusable"])
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    kind = {"dpm++": "DPMSolverMultistepScheduler", "ddim": "DDIMScheduler"}[solver]
    settings = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False}
    # DDIMScheduler's last step goes to alpha = 1
    settings |= {"final_sigmas_type": "zero"} if solver == "dpm++" else {"set_alpha_to_one": True}
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **settings)
    pipe.set_progress_bar_config(disable=True)
    for i in 0, 4:
        noise, omega = noise_and_omega(trainer, i, 2, 6)
        settings = {"negative_prompt": "rain", "guidance_rescale": 0.6, "height": 32, "width": 32}
        settings |= {"num_inference_steps": 5, "guidance_scale": 1 + omega, "latents": noise}
        expected = pipe(PROMPTS[i % 3], **settings, output_type="latent").images[0]
        moments = data[i]["moments"]
        z = trainer.sample_posterior(moments[None], torch.randn(1, 4, 8, 8), 0.18215)[0]
        assert moments.shape == (8, 8, 8) and (z - expected).abs().max() < 1e-4 * expected.std()
        if layout == "sdxl":
            assert data[i]["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]


def by_hand(trainer, base, args, row, z, omega, times):
    """The DDIM path of a record, by the trainer's own functions: [z at times[0], times[1], ...]."""
    pipe = trainer.load_teacher(args, torch.float32)
    the_run = trainer.Run()
    the_run.pipe, the_run.teacher = pipe, pipe.unet.eval()
    schedule = trainer.NoiseSchedule(pipe.scheduler.config, "cpu")
    the_run.c_null = trainer.conditions(pipe, {"caption": [""]}, torch.device("cpu"), 1)
    batch = {"caption": row["captions"]}
    batch |= {"time_ids": row["time_ids"][None]} if "time_ids" in row else {}
    c, path = trainer.conditions(pipe, batch, torch.device("cpu"), 1), [z]
    for t, t_to in zip(times[:-1], times[1:], strict=True):
        with torch.no_grad():
            t, t_to = torch.tensor([t]), torch.tensor([t_to])
            output = trainer.guided_output(the_run, z, t, c, torch.full((1, 1, 1, 1), omega), args)
            z = schedule.ddim_step(output, z, t, t_to)
        path.append(z)
    return path


@pytest.mark.parametrize("steps", [10, 20])
def test_a_path_is_the_trainers_ddim_steps(paths, trainer, base, steps):
    """At the training's timesteps, though the solver may have more; the last is pure noise."""
    data = datasets.load_from_disk(paths(solver_steps=steps)).with_format("torch")
    args = trainer.parse_args(
        command_line({"pretrained_teacher_model": base, "dataset_name": "x"} | PATHS)
        + ["--max_train_steps", "1"]
    )
    args.mixed_precision = "no"
    skip = 1000 // steps
    times = [*range(999, 0, -skip), 0]
    noise, omega = noise_and_omega(trainer, 3, 2, 4)
    expected = by_hand(trainer, base, args, data[3], noise, omega, times)[:: steps // 10]
    assert data.features["path"].shape == (11 * 4, 8, 8)
    assert data.features["path"].dtype == "float16"
    path = data[3]["path"].float().unflatten(0, (11, 4))
    assert torch.equal(path[10], noise[0].half().float())
    for place, z in enumerate(expected[::-1]):
        assert (path[place] - z[0]).abs().max() < 2e-3 * z.abs().max(), place


@pytest.mark.parametrize("layout", ["sd15"])
def test_a_finer_solver_is_nearer_the_ode(paths):
    """DPM-Solver++ in 40 steps is nearer to the path in 200 than it is in 10, or DDIM."""

    def end(**flags):
        data = datasets.load_from_disk(paths(num_images=1, **flags)).with_format("torch")
        return data[0]["path"].float()

    ddim, coarse, fine, best = (
        end(**flags)
        for flags in (
            {"solver": "ddim"},
            {"solver": "dpm++"},
            {"solver": "dpm++", "solver_steps": 40},
            {"solver": "dpm++", "solver_steps": 200},
        )
    )
    assert torch.equal(ddim[-4:], best[-4:])  # the same noise
    errors = [(path - best).abs().mean() for path in (ddim, coarse, fine)]
    assert errors[2] < 0.5 * min(errors[:2])


@pytest.mark.parametrize("layout", ["sd15"])
def test_zero_terminal_snr(generate, trainer, v_teacher):
    """A v-prediction teacher whose last timestep is pure noise."""
    flags = {"pretrained_teacher_model": v_teacher, "trajectories": True, "solver_steps": None}
    for solver in "ddim", "dpm++":
        data = datasets.load_from_disk(generate(**flags, **PATHS, solver=solver))
        assert np.isfinite(data.with_format("numpy")["path"][:]).all()


# ------------------------------------------------------------------------------------- a training


def test_training_on_generated_data(generate, train, layout):
    """Other guidance than that of the data is no matter: z is what counts."""
    folder = generate()
    for flags in {}, {"w_max": 5.0, "negative_prompt": "rain"}:
        losses = [row["loss"] for row in log(train(dataset_name=folder, **flags))]
        assert len(losses) == 4 and np.isfinite(losses).all() and min(losses) > 0


@pytest.mark.parametrize("target", ["network", "trajectory"])
def test_the_loss_on_a_path(paths, train, trainer, base, layout, target):
    """That of the first step, computed from the stored path in another way."""
    folder = paths(num_images=4)
    flags = {"dataset_name": folder, "target": target, "max_train_steps": 2} | PATHS
    loss = log(train(**flags))[0]["loss"]
    data = datasets.load_from_disk(folder).with_format("torch")
    unet = diffusers.UNet2DConditionModel.from_pretrained(base / "unet")
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    alpha_bar = diffusers.DDIMScheduler.from_config(config).alphas_cumprod

    def f(z, t, row):
        """The consistency function, from its definition."""
        more = {k: row[k][None] for k in ("time_ids",) if k in row}
        more |= {k: row[k] for k in ("text_embeds",) if k in row}
        with torch.no_grad():
            eps = unet(z[None], t, row["prompt"], added_cond_kwargs=more).sample[0]
        x0 = (z - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x = 10 * t
        return 0.25 / (x**2 + 0.25) * z + x / (x**2 + 0.25) ** 0.5 * x0

    errors = []
    for place, number in enumerate(trainer.rng(0, 0, 0, "order").permutation(4)[:2]):
        row, j = data[int(number)], int(trainer.rng(0, 0, place, "timestep").integers(10)) + 1
        path = row["path"].float().unflatten(0, (11, 4))
        after = path[0]
        if target == "network":
            after = f(path[j - 1], max(100 * (j - 1) - 1, 0), row)
        errors.append(f(path[j], 100 * j - 1, row) - after)
    expected = ((torch.stack(errors).square() + 1e-6).sqrt() - 1e-3).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("layout", ["sd15"])
def test_what_a_training_on_paths_refuses(paths, train, make_teacher, base, tmp_path):
    """Each by name: it would not be what the paths are."""
    folder = paths()
    other = shutil.copytree(base, tmp_path / "other")
    shutil.rmtree(other / "unet")
    shutil.copytree(make_teacher(seed=5) / "unet", other / "unet")
    for word, changes in {
        "w_max": {"w_max": 5.0},
        "negative_prompt": {"negative_prompt": "rain"},
        "guidance_rescale": {"guidance_rescale": 0.5},
        "num_ddim_timesteps": {"num_ddim_timesteps": 20},
        "UNet": {"pretrained_teacher_model": other},
        "resolution": {"resolution": 16},
        "--random_flip": {"random_flip": True},
        "--proportion_empty_prompts": {"proportion_empty_prompts": 0.1},
    }.items():
        with refused(word):
            train(**{"dataset_name": folder} | PATHS | changes)


# ------------------------------------------------------------------------------------------ sizes


def test_sizes(paths, generate, trainer, train, layout):
    """Batches take turns among them; a training has them all; the latents are those of the size."""
    sizes = {"aspect_ratio_buckets": "32,32;16,48;48,16"}
    folder = paths(**sizes, num_images=12)
    data = datasets.load_from_disk(folder).with_format("torch")
    found = [tuple(size.tolist()) for size in data["size"]]
    assert found[::2] == found[1::2] and Counter(found) == {(8, 8): 4, (4, 12): 4, (12, 4): 4}
    i = found.index((4, 12))
    path = data[i]["path"].T.unflatten(1, (4, 12)).float().unflatten(0, (11, 4))
    noise, _ = noise_and_omega(trainer, i, 2, 4, (4, 4, 12))
    assert torch.equal(path[10], noise[0].half().float())
    if layout == "sdxl":
        assert data[i]["time_ids"].tolist() == [16, 48, 0, 0, 16, 48]
    assert len(log(train(dataset_name=folder, **PATHS))) == 4
    square = {"aspect_ratio_buckets": "32,32"}
    one, plain = (content(generate(**flags)) for flags in (square, {}))
    assert one == plain
    with refused("--aspect_ratio_buckets", "30,32"):
        generate(aspect_ratio_buckets="30,32")


@pytest.mark.parametrize("layout", ["sdxl"])
def test_the_size_of_a_recipe(generate, train, base, tmp_path):
    """It is taken where no flag says another; guidance and negative prompt are the trainer's."""
    teacher = shutil.copytree(base, tmp_path / "teacher")
    recipe = {"format": 1, "width": 24, "height": 40, "guidance_scale": 5, "negative_prompt": "fog"}
    (teacher / "recipe.json").write_text(json.dumps(recipe))
    flags = {"pretrained_teacher_model": teacher, "resolution": None}
    folder = generate(**flags)
    data = datasets.load_from_disk(folder)
    assert data["size"][:] == [[10, 6]] * 5 and data["time_ids"][0] == [40, 24, 0, 0, 40, 24]
    stamp = json.loads((folder / "encoded.json").read_text())
    assert (stamp["w_min"], stamp["w_max"], stamp["negative_prompt"]) == (4, 4, "fog")
    assert stamp["buckets"] == [[40, 24]] and stamp["resolution"] == 32
    assert len(log(train(**flags, dataset_name=folder))) == 4
    assert "size" not in datasets.load_from_disk(generate(**flags | {"resolution": 16})).features
    (teacher / "recipe.json").write_text('{"format": 1, "width": 24}')
    assert datasets.load_from_disk(generate(**flags, num_images=1))["size"][0] == [8, 6]
    for wrong in 24.5, "24", 0, None, 22:
        (teacher / "recipe.json").write_text(json.dumps(recipe | {"width": wrong}))
        with refused("recipe.json", "width"):
            generate(**flags)


# ---------------------------------------------------------------------------------------- prompts


def test_files_of_prompts(program, sd15, tmp_path, capsys):
    """Each prompt once, in its order; what is left out is counted."""
    file, args = tmp_path / "my prompts.txt", sd15.argparse.Namespace()
    args.prompts_file = file
    for text, expected in {
        "a cat": ["a cat"],
        "\ufeffa cat\r\n\r\n  # a comment\r\n a dog \r\n": ["a cat", "a dog"],
        "b\na\nb\n b\nc": ["b", "a", "c"],
        "яблоко\n苹果\n🍎": ["яблоко", "苹果", "🍎"],
    }.items():
        file.write_text(text, encoding="utf-8", newline="")
        assert program.read_prompts(sd15, args) == expected
    capsys.readouterr()
    file.write_text("\n".join(f"prompt {i % 9000}" for i in range(10000)))
    assert len(program.read_prompts(sd15, args)) == 9000
    assert "9000 prompts; left out: 1000 duplicates" in capsys.readouterr().out
    args.prompts_file = tmp_path / "prompts.jsonl"
    args.prompts_file.write_text('{"prompt": "a cat"}\n{"prompt": "a cat"}\n')
    assert program.read_prompts(sd15, args) == ["a cat"]
    args.prompts_file.write_text('{"prompt": "a cat", "seed": 3}')
    with refused("--prompts_file", "seed"):
        program.read_prompts(sd15, args)
    for wrong in b"", b"\n# none\n\n", b"\xff\xfe\x00a", b"caf\xe9":
        file.write_bytes(wrong)
        args.prompts_file = file
        with refused(f"--prompts_file {file}"):
            program.read_prompts(sd15, args)
    for args.prompts_file in tmp_path, tmp_path / "none.txt":
        with refused(f"--prompts_file {args.prompts_file}"):
            program.read_prompts(sd15, args)


@pytest.mark.parametrize("layout", ["sd15"])
def test_long_prompts(generate, tmp_path, capsys):
    """They are read in chunks; those that are longer still are counted and named."""
    (tmp_path / "prompts.txt").write_text("abcde fghij klmno pqrst\nshort\n")
    flags = {"prompts_file": tmp_path / "prompts.txt", "num_images": 2, "solver_steps": 1}
    warning = "warning: 1 prompts are longer than 14 tokens and cut"
    for chunks, said in (1, True), (2, False):
        data = datasets.load_from_disk(generate(**flags, max_prompt_chunks=chunks))
        assert np.shape(data[0]["prompt"]) == (1, 16 * chunks, 32)
        assert (warning in capsys.readouterr().err) == said
    generate(**flags, max_prompt_chunks=2, negative_prompt="abcde fghij klmno pqrst uvwxy zabcd ef")
    assert "longer than 28 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["sd15"])
def test_captions_of_data(generate, make_images, monkeypatch, tmp_path, capsys):
    """Every caption of a record is a prompt; not one image is opened, broken ones do not matter."""
    monkeypatch.setattr(Image, "open", None)
    folder = make_images(3, broken=(0, 1, 2))
    for image in folder.glob("*.png"):
        image.chmod(0)
    data = datasets.load_from_disk(generate(train_data_dir=folder, num_images=None))
    assert data["captions"][:] == [["red apple"], ["green pear"], ["a house"]]
    rows = {"image": [{"bytes": b"no", "path": None}] * 4}
    rows["text"] = [["a cat", "a dog"], [" a cat", ""], [], ["a fish"]]
    features = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}
    rows = datasets.Dataset.from_dict(rows, datasets.Features(features))
    rows.save_to_disk(tmp_path / "rows")
    capsys.readouterr()
    # (saved data are undecoded bytes: nothing has looked into them)
    data = datasets.load_from_disk(generate(dataset_name=tmp_path / "rows", num_images=None))
    assert data["captions"][:] == [["a cat"], ["a dog"], ["a fish"]]
    assert "3 prompts; left out: 1 duplicates, 2 empty ones" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["sdxl"])
def test_each_prompt_is_encoded_once(generate, trainer, monkeypatch):
    """And the null prompt; no VAE is loaded where nothing is decoded."""
    encoded, loaded = [], []
    encode, load = trainer.encode_captions, diffusers.AutoencoderKL.from_pretrained.__func__

    def captions(pipe, captions, *more):
        encoded.extend(captions)
        return encode(pipe, captions, *more)

    monkeypatch.setattr(trainer, "encode_captions", captions)
    kind = diffusers.AutoencoderKL
    remember = classmethod(
        lambda cls, *args, **more: loaded.append(cls) or load(cls, *args, **more)
    )
    monkeypatch.setattr(kind, "from_pretrained", remember)
    generate(num_images=9)
    assert Counter(encoded) == {"": 2} | dict.fromkeys(PROMPTS, 1) and loaded == []


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("layout", ["sd15"])
def test_flags_that_do_not_go_together(generate, images, prompts, tmp_path):
    out = {"output": tmp_path / "out"}
    path = {"trajectories": True, "num_ddim_timesteps": 8}
    for words, flags in (
        (["--prompts_file", "required"], {"prompts_file": None}),
        (["not allowed with"], {"prompts_file": prompts, "train_data_dir": images}),
        (["--num_images", "0"], {"num_images": 0}),
        (["--num_images"], {"num_images": 10**15}),
        (["--num_images"], {"num_images": "many"}),
        (["--batch_size"], {"batch_size": -1}),
        (["--solver_steps"], {"solver_steps": 0}),
        (["--solver"], {"solver": "euler"}),
        (["--random_flip"], {"random_flip": True}),
        (["--proportion_empty_prompts"], path | {"proportion_empty_prompts": 0.1}),
        (["--target trajectory", "--trajectories"], {"target": "trajectory"}),
        (["--solver_steps 12", "8, 40, 200"], path | {"solver_steps": 12}),
        (["--solver_steps 16", "8, 40, 200"], path | {"solver_steps": 16}),
        (
            ["--solver_steps 1000", "fewer"],
            path | {"solver_steps": 1000, "num_ddim_timesteps": 1000},
        ),
        (["--tiny_vae"], {"tiny_vae": tmp_path}),
        (["--tiny_vae"], {"tiny_vae": tmp_path, "no-contact_sheet": None}),
        (["--output", "data"], {"output": images, "train_data_dir": images}),
        (["--resolution", "multiple"], {"resolution": 30}),
        (["--train_data_dir"], {"train_data_dir": tmp_path / "none"}),
        (["--pretrained_teacher_model"], {"pretrained_teacher_model": tmp_path / "none"}),
        (["--no_such_flag"], {"no_such_flag": True}),
    ):
        with refused(*words):
            generate(**out | flags)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["sd15"])
def test_an_output_made_from_something_else(generate, make_teacher, tmp_path):
    folder = generate()
    whole = content(folder)
    (tmp_path / "other.txt").write_text("a snail")
    for word, changes in {
        "seed": {"seed": 1},
        "records": {"num_images": 6},
        "batch_size": {"batch_size": 3},
        "solver_steps": {"solver_steps": 4},
        "solver": {"solver": "ddim"},
        "w_min": {"w_min": 2.0},
        "prompts": {"prompts_file": tmp_path / "other.txt"},
        "what": {"trajectories": True, "num_ddim_timesteps": 10, "solver_steps": None},
        "buckets": {"aspect_ratio_buckets": "16,48"},
    }.items():
        with refused(f"--output {folder}", word):
            generate(output=folder, **changes)
    generate(output=folder, num_ddim_timesteps=20)  # which plain data do not depend on
    assert content(folder) == whole


def test_help_and_mistakes_are_quick():
    """They are answered before torch is loaded."""
    code = f"""
import runpy, sys
sys.argv = ["generate_data.py", "--help"]
try:
    runpy.run_path({str(ROOT / PROGRAM)!r}, run_name="__main__")
finally:
    print("torch" in sys.modules, "numpy" in sys.modules)
"""
    done = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT / "scripts"))
    assert done.returncode == 0 and "--trajectories" in done.stdout
    assert done.stdout.endswith("False False\n")


# ----------------------------------------------------------------------------- unusable, the sheet


@pytest.mark.parametrize("layout", ["sd15"])
def test_latents_that_are_not_finite(generate, train, base, tmp_path, capsys):
    """A prompt that the teacher breaks at: its record has prompt and seed in its message."""
    teacher = shutil.copytree(base, tmp_path / "teacher")
    file = teacher / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    vocabulary = json.loads((teacher / "tokenizer" / "vocab.json").read_text())
    tensors[name][vocabulary["z</w>"]] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    (tmp_path / "prompts.txt").write_text("a cat\nbuzz\na dog")
    flags = {"pretrained_teacher_model": teacher, "prompts_file": tmp_path / "prompts.txt"}
    for more in {}, {"trajectories": True, "solver_steps": None} | PATHS:
        folder = generate(**flags, **more, num_images=6)
        said = capsys.readouterr()
        assert "6 records generated, 2 of them unusable" in said.out
        assert "warning: unusable: image 1: " in said.err and "seed 0, prompt 'buzz'" in said.err
        data = datasets.load_from_disk(folder)
        assert [bool(why) for why in data["unusable"]] == [False, True, False] * 2
        more = PATHS if more else {}
        out = train(dataset_name=folder, pretrained_teacher_model=teacher, **more)
        assert np.isfinite([row["loss"] for row in log(out)]).all()
    (tmp_path / "prompts.txt").write_text("buzz")
    with refused("not one record", "buzz"):
        generate(**flags)


@pytest.mark.parametrize("layout", ["sdxl"])
def test_the_contact_sheet(generate, base, tmp_path):
    """The first images over their prompts, by the VAE or a tiny one; the data are the same."""
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    flags = {"no-contact_sheet": None, "num_images": 10}
    folder = generate(**flags)
    sheet = Image.open(folder / "contact_sheet.png")
    assert sheet.size == (8 * 128, 2 * (32 + 56))
    vae = diffusers.AutoencoderKL.from_pretrained(base / "vae")
    data = datasets.load_from_disk(folder).with_format("torch")
    with torch.no_grad():
        image = vae.decode(data[9]["moments"][None, :4]).sample[0]
    expected = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    cell = np.asarray(sheet)[92 : 92 + 32, 132 : 132 + 32]
    assert abs(cell - expected).max() < 1 and expected.std() > 3
    by_tiny, plain = content(generate(**flags, tiny_vae=tmp_path / "tiny")), content(folder)
    assert by_tiny.pop("contact_sheet.png") != plain.pop("contact_sheet.png")
    assert by_tiny == plain
    (folder / "contact_sheet.png").unlink()
    generate(**flags, output=folder)
    assert (folder / "contact_sheet.png").exists()


# -------------------------------------------------------------------------------- nothing is lost


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("layout", ["sd15"])
def test_a_full_disk(generate):
    """One line, and with space again the same command ends the work."""
    flags = {"no-contact_sheet": None}
    folder = generate(**flags)
    whole = content(folder)
    for name in "state.json", "data-00000-of-00001.arrow", "contact_sheet.png":
        (folder / name).unlink()
        (folder / "state.json").unlink(missing_ok=True)
        (folder / f"{name}.part").symlink_to("/dev/full")
        with refused(folder, "No space left"):
            generate(**flags, output=folder)
        (folder / f"{name}.part").unlink(missing_ok=True)
        generate(**flags, output=folder)
        assert content(folder) == whole


class Generations:
    """Runs of the program, by a forking driver."""

    def __init__(self, tmp_path, teacher, prompts, count):
        driver = tmp_path / "driver.py"
        driver.write_text(DRIVER)
        flags = {"family": "sd15", "pretrained_teacher_model": teacher, "prompts_file": prompts}
        flags |= {"resolution": 16, "num_images": count, "batch_size": 1, "solver_steps": 2}
        command = [sys.executable, driver, ROOT / "scripts", *command_line(flags)]
        self.said = open(tmp_path / "stderr", "w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*map(str, command)]
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def start(self, folder):
        """Start one; its process id."""
        self.process.stdin.write(f"--output {folder}\n")
        self.process.stdin.flush()
        return int(self.line())

    def line(self):
        """The driver's next number, past what the program says."""
        lines = map(str.strip, self.process.stdout)
        return next(line for line in lines if line.lstrip("-").isdigit())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills(teacher, prompts, train_by, sd15, tmp_path, kills):
    """Runs killed at random moments, then one to its end: the content of an undisturbed run.

    Every other kill is a Ctrl-C, which ends with one line.
    """
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    count, random = 20 + 10 * kills, np.random.default_rng(kills)
    runs = Generations(tmp_path, teacher, prompts, count)
    runs.start(calm)
    assert runs.line() == "0"
    expected, counts = content(calm), []
    assert len(expected) == count // 2 + 5
    for i in range(kills):
        before = len([*killed.glob("*.arrow")])
        child, end = runs.start(killed), time.monotonic() + 60
        # A library that is being loaded may take Ctrl-C for an error of its own
        files = before + int(random.integers(i % 2, 2 + i % 2))
        while len([*killed.glob("*.arrow")]) < files and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02 if files > before else 0.5))
        number = signal.SIGINT if i % 2 else signal.SIGKILL
        os.kill(child, number)
        assert runs.line() == ("130" if i % 2 else "-9")
        left = content(killed) if killed.exists() else {}
        counts.append(sum(name.endswith(".arrow") for name in left))
        assert all(name.endswith(".part") or expected[name] == left[name] for name in left)
    assert counts == sorted(counts) and counts[-1] < count // 2
    with refused("--dataset_name", "not finished"):
        train_by(sd15, teacher)(dataset_name=killed, resolution=16)
    runs.start(killed)
    assert runs.line() == "0"
    runs.process.communicate(timeout=60)
    runs.said.seek(0)
    lines = [line for line in runs.said.read().splitlines() if line and "record/s" not in line]
    stopped = "stopped: the same command goes on, whole files are kept"
    assert lines == [stopped] * (kills // 2)
    left = content(killed)
    assert {name for name in left if name.endswith(".part")} <= {"dataset_info.json.part"}
    assert {name: left[name] for name in expected} == expected
    assert len(datasets.load_from_disk(killed)) == count


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd15"])
def test_two_processes(generate, program, prompts, teacher, monkeypatch, tmp_path):
    """Each makes a part, nothing twice; the content is that of one process."""
    driver, folder = tmp_path / "driver.py", tmp_path / "two"
    driver.write_text(TWO)
    flags = {"family": "sd15", "pretrained_teacher_model": teacher, "prompts_file": prompts}
    flags |= {"resolution": 32, "num_images": 5, "batch_size": 2, "solver_steps": 3}
    words = [ROOT / "scripts", *command_line(flags | {"output": folder})]
    done = launch(driver, *words, count=2)
    assert done.returncode == 0, done.stderr
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert told == ["rank 0: batch 0", "rank 0: batch 2", "rank 1: batch 1"]
    monkeypatch.setattr(program, "ROWS", 1)
    assert content(folder) == content(generate(**{"no-contact_sheet": None}))
