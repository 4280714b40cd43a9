"""scripts/train_*.sh: their commands, parsed by the programs they name; scripts/accelerate/.

And scripts/environment.sh.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, load_script, log, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

LAUNCHERS = sorted(path.name for path in (ROOT / "scripts").glob("train_*.sh"))
DATA = {"DATA": "some/dataset", "DATASET": "some/dataset"}


def printed(name, *words, cwd=ROOT, **environment):
    """The command that a launcher would run: (the trainer, its arguments, the line before it)."""
    done = run(
        "bash", ROOT / "scripts" / name, *words, cwd=cwd, DRY_RUN="1",
        **{"CARD": "12", **DATA, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    # `accelerate launch` would die of Ctrl-C before the trainer has saved
    assert command[0] == "python"
    program = command[1].removeprefix(f"{ROOT}/")
    return program, load_script(program).parse_args(command[2:]), done.stderr


def test_there_are_four():
    """The launchers of the design."""
    assert LAUNCHERS == [
        "train_sd15.sh",
        "train_sdxl.sh",
        "train_sdxl_pokemon.sh",
        "train_ssd1b.sh",
    ]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher(name, tmp_path):
    """Its family's trainer, from any folder; extra arguments win; without data it says so."""
    program, args, line = printed(name, "--seed", "77", "--lora_rank", "3", cwd=tmp_path)
    assert program == f"train_lcm_lora_{'sd15' if 'sd15' in name else 'sdxl'}.py"
    assert args.mixed_precision == "fp16"
    assert (args.seed, args.lora_rank, args.dataset_name) == (77, 3, "some/dataset")
    assert "sdxl-vae-fp16-fix" in (args.pretrained_vae_model_name_or_path or "") or "sd15" in name
    assert args.pretrained_teacher_model in line and args.output_dir in line and "12 GB" in line
    if "sd15" not in name:
        assert printed(name, VAE="")[1].pretrained_vae_model_name_or_path is None
    without = run("bash", ROOT / "scripts" / name, DRY_RUN="1")
    assert without.returncode != 0 and "DATA" in without.stderr


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if "pokemon" not in name])
def test_environment_overrides(name, images):
    """Variables change the model, the data and the settings."""
    own = {
        "MODEL": "my/model",
        "DATA": images,
        "STEPS": 7,
        "BATCH_SIZE": 5,
        "OUTPUT": "a b",
        "PROMPT": "two words",
        "MIXED_PRECISION": "bf16",
    }
    _, args, _ = printed(name, **{key: str(value) for key, value in own.items()})
    assert (args.pretrained_teacher_model, args.train_data_dir) == ("my/model", str(images))
    assert (args.max_train_steps, args.train_batch_size, args.output_dir) == (7, 5, "a b")
    assert (args.gradient_accumulation_steps, args.mixed_precision) == (3, "bf16")
    assert args.validation_prompts == ["two words"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_home_folder(name, tmp_path):
    """In quotes a shell leaves "~" to the program; names have spaces."""
    (tmp_path / "my images").mkdir()
    (tmp_path / "my images" / "a.png").touch()
    (tmp_path / "a model").mkdir()
    own = {"MODEL": "~/a model", "OUTPUT": "~/out put", "DATA": "~/my images", "VAE": "~/vae"}
    _, args, line = printed(name, HOME=str(tmp_path), DATASET=own["DATA"], **own)
    paths = args.pretrained_teacher_model, args.output_dir, args.train_data_dir
    assert [*paths] == [f"{tmp_path}/{n}" for n in ("a model", "out put", "my images")]
    assert args.pretrained_vae_model_name_or_path in (None, f"{tmp_path}/vae")
    del own["OUTPUT"]
    _, args, line = printed(name, HOME=str(tmp_path), DATASET=own["DATA"], **own)
    assert "a-model" in args.output_dir and "/" not in args.output_dir.removeprefix("outputs/")


SOURCES = {
    "train_data_dir": [
        "a.png a.txt", "deep/er/A.JPG deep/er/A.txt", "metadata.jsonl x", "metadata.csv x",
        "a.webp all.tar", "00000/a.jpg 00000.parquet", "a.heic", "",
    ],
    "train_shards_path_or_url": ["0.tar 1.tar", "0.tar 0.parquet 0_stats.json"],
    "dataset_name": ["data/0.parquet README.md", "state.json data.arrow", "encoded.json",
                     "dataset_dict.json train/state.json"],
}  # fmt: skip


@pytest.mark.parametrize(
    "flag,files", [(flag, files) for flag, kinds in SOURCES.items() for files in kinds]
)
def test_a_folder_is_given_by_its_flag(tmp_path, flag, files):
    """Images with captions in any layout, tars, parquet, what `datasets` saved or is encoded."""
    folder = tmp_path / "my pics[1]"
    folder.mkdir()
    for name in files.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    _, args, _ = printed("train_sd15.sh", DATA=str(folder))
    assert getattr(args, flag) == str(folder)
    given = [args.train_data_dir, args.train_shards_path_or_url, args.dataset_name]
    assert given.count(None) == 2


def test_a_folder_of_many_images(tmp_path):
    """More names than a pipe holds, the first of which decides."""
    for number in range(3000):
        (tmp_path / f"{number:040}.png").touch()
    assert printed("train_sd15.sh", DATA=str(tmp_path))[1].train_data_dir == str(tmp_path)


@pytest.mark.parametrize("name,flag", [
    ("someone/images", "dataset_name"),
    ("shards/{000..009}.tar", "train_shards_path_or_url"),
    ("https://host/0.tar?x=1", "train_shards_path_or_url"),
    ("pipe:curl -L -s https://host/0.tar", "train_shards_path_or_url"),
])  # fmt: skip
def test_a_name_is_given_by_its_flag(name, flag):
    given = getattr(printed("train_sdxl.sh", DATA=name)[1], flag)
    assert given == name.removeprefix("pipe:curl -L -s ")


@pytest.mark.parametrize("stamp", [None, (True, True), (True, False), (False, True)])
def test_encoded_data_are_cut_as_they_were(tmp_path, stamp):
    """By their stamp, as encode_data.py writes it; other images at random places, mirrored."""
    if stamp:
        text = json.dumps(dict(zip(("center_crop", "random_flip"), stamp)), indent=2)
        (tmp_path / "encoded.json").write_text(text)
    _, args, _ = printed("train_sd15.sh", DATA=str(tmp_path))
    assert (args.center_crop, args.random_flip) == (stamp or (False, True))


@pytest.mark.parametrize("kind", ["generated", "trajectories"])
def test_generated_data_are_taken_as_they_are(tmp_path, kind):
    """Their size and steps, and no mirrored images; what is given on the command line wins."""
    stamp = {"what": ["captions", kind], "resolution": 768, "buckets": [[40, 24]]}
    stamp |= {"num_ddim_timesteps": 8} if kind == "trajectories" else {}
    (tmp_path / "encoded.json").write_text(json.dumps(stamp, indent=2))
    _, args, _ = printed("train_sdxl.sh", DATA=str(tmp_path))
    steps = 8 if kind == "trajectories" else 40
    assert (args.resolution, args.num_ddim_timesteps, args.random_flip) == (768, steps, False)
    assert printed("train_sdxl.sh", "--resolution", "64", DATA=str(tmp_path))[1].resolution == 64


def test_a_teacher_with_a_recipe_has_its_vae(tmp_path):
    """The one that make_teacher.py put there, unless VAE names another."""
    (tmp_path / "recipe.json").write_text('{"format": 1}')
    own = {"MODEL": str(tmp_path)}
    assert printed("train_sdxl.sh", **own)[1].pretrained_vae_model_name_or_path is None
    assert printed("train_sdxl.sh", VAE="a/b", **own)[1].pretrained_vae_model_name_or_path == "a/b"


def test_each_model_has_an_output_folder(tmp_path):
    """No two models share one, and a model keeps its own however it is written."""
    for name in ("a/model", "b/model", "a b", "a-b", "ab", "a\u00e4b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a/x.safetensors", "b/x.safetensors", "x.safetensors"):
        (tmp_path / name).touch()

    def output(model, name="train_sd15.sh"):
        folder = printed(name, MODEL=str(model), cwd=tmp_path)[1].output_dir
        assert re.fullmatch(r"outputs/[\w.-]+", folder, re.ASCII), folder
        return folder

    local = [p for p in tmp_path.rglob("*") if p.is_file() or not [*p.iterdir()]]
    models = [*local, "org/x", "other/x", "org-x", "org--x/y", "/gone/x", "/other/x", "../x"]
    assert len({output(model) for model in models}) == len(models) == 16
    assert "model" in output(tmp_path / "a/model") and "org--x" in output("org/x")
    (tmp_path / "link").symlink_to("a/model")
    for other in ("a/model/", "./a/model//", tmp_path / "b/../a/model", "link"):
        assert output(other) == output(tmp_path / "a/model")
    assert output("./x.safetensors") == output(tmp_path / "x.safetensors")
    assert output("org/x/") == output("org/x")
    assert len({output("org/x", name) for name in LAUNCHERS}) == len(LAUNCHERS)


@pytest.fixture
def fake_python(tmp_path):
    """fake_python(shell text) -> the PATH on which that is `python`."""

    def fake(text):
        (tmp_path / "bin").mkdir(exist_ok=True)
        path = tmp_path / "bin" / "python"
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
        return f"{path.parent}:{os.environ['PATH']}"

    return fake


@pytest.mark.parametrize(
    "gb,batch", [(0, 6), (5, 6), (8, 6), (12, 4), (15, 4), (25, 12), (141, 12)]
)
def test_the_card_is_asked(fake_python, gb, batch):
    """It decides batch and precision; without a GPU no precision is forced."""
    _, args, line = printed("train_sd15.sh", CARD="", PATH=fake_python(f"echo {gb}"))
    assert args.mixed_precision == ("fp16" if gb else None)
    assert args.train_batch_size == batch
    assert args.train_batch_size * args.gradient_accumulation_steps == 12
    assert ("no GPU" in line and "float32" in line) if gb == 0 else "fp16" in line


def test_no_gpu_is_seen_here():
    """By PyTorch, as the trainer will see it; and CARD and BATCH_SIZE are numbers."""
    python = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert "no GPU" in printed("train_sdxl.sh", CARD="", PATH=python, **hidden)[2]
    for name in ("CARD", "BATCH_SIZE", "ACCUMULATION"):
        done = run("bash", ROOT / "scripts/train_sd15.sh", DATA="x", **{"CARD": "8", name: "8GB"})
        assert done.returncode == 1 and done.stderr.startswith(f"{name}=8GB: "), done.stderr


def test_ctrl_c_while_the_card_is_asked(fake_python, tmp_path):
    """The launcher ends without a word."""
    (tmp_path / "torch.py").write_text("import time\nopen('here', 'w')\ntime.sleep(60)")
    env = {"DATA": "x", "PATH": fake_python(f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')}
    job = subprocess.Popen(
        ["bash", ROOT / "scripts/train_sd15.sh"], cwd=tmp_path, env=os.environ | env,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "here").exists():
        assert job.poll() is None
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    assert job.communicate(timeout=20)[1] == "" and job.returncode in (-2, 130)


def test_without_pytorch(fake_python, tmp_path):
    """One line, which says what to install."""
    (tmp_path / "torch.py").write_text("raise ImportError")
    path = fake_python(f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    done = run("bash", ROOT / "scripts/train_sd15.sh", DATA="x", PATH=path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "requirements.txt" in done.stderr


def test_what_accelerate_finds_in_the_environment_is_void(fake_python):
    """The trainer gets what the launcher printed, and its exit code is the launcher's."""
    path = fake_python("env; exit 9")
    set_there = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "RANK": "8",  # PyTorch's: messages are those of process 0
    }
    done = run("bash", ROOT / "scripts/train_sd15.sh", CARD="8", DATA="x", PATH=path, **set_there)
    assert done.returncode == 9 and "ACCELERATE" not in done.stdout and "PATH=" in done.stdout
    assert "\nRANK=" not in done.stdout
    command = printed("train_sd15.sh", RANK="8")[1]
    assert command.lora_rank == 8


def test_the_documented_settings():
    """The page's table has what the launchers give to each card."""
    page = (ROOT / "docs/memory-and-speed.md").read_text()
    table = page.partition("| launcher |")[2].partition("\n\n")[0].splitlines()
    cards = [int(cell.split()[0]) for cell in table[0].strip("|").split("|") if cell.strip()]
    assert cards == [8, 12, 16, 24, 48, 80] and len(table) == 5
    for row in table[2:]:
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        for card, cell in zip(cards, cells, strict=True):
            _, args, _ = printed(name.strip("`"), CARD=str(card))
            words = [str(args.train_batch_size)]
            words += ["gc"] * args.gradient_checkpointing
            words += ["8bit"] * (args.optimizer == "adamw8bit")
            words += [args.quantize_base] * bool(args.quantize_base)
            assert cell == " ".join([*words, "(c)"]), f"{name}, {card} GB"
            assert args.vae_encode_batch_size == 1 and args.resolution in (512, 1024)
            assert args.train_batch_size * args.gradient_accumulation_steps == 12


def test_ctrl_c_ends_in_one_line(teacher, images, tmp_path):
    """It reaches the trainer alone, and the prompt comes back when the checkpoint is saved."""
    out, text = tmp_path / "out", tmp_path / "text"
    own = {
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "OUTPUT": out,
        "MODEL": teacher, "DATA": images, "CARD": 0, "STEPS": 100_000, "BATCH_SIZE": 2,
        "RESOLUTION": 32, "RANK": 4, "PROMPT": "rain", "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    command = ["bash", ROOT / "scripts/train_sd15.sh", "--report_to", "none"]
    command += ["--dataloader_num_workers", "0"]
    env = os.environ | {name: str(value) for name, value in own.items()}
    with text.open("wb") as file:
        job = subprocess.Popen(
            command, stdout=file, stderr=file, env=env, start_new_session=True, cwd=tmp_path
        )
    try:
        while not (out / "log.jsonl").is_file() or len(log(out)) < 2:
            assert job.poll() is None, text.read_text()
            time.sleep(0.1)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(60) == 128 + signal.SIGINT
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError):  # nothing goes on behind the prompt
        os.killpg(job.pid, 0)
    assert (out / f"checkpoint-{log(out)[-1]['step']}" / "manifest.json").is_file()
    lines = text.read_text().strip().splitlines()
    assert "stopped by SIGINT" in lines[-1] and "Traceback" not in text.read_text()


def test_the_source_pages_recipe():
    """lcm_xl_lora_pokemon_blip of diffengine."""
    _, args, _ = printed("train_sdxl_pokemon.sh", CARD="80")
    recipe = {
        "pretrained_teacher_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "resolution": 1024,
        "lora_rank": 8,
        "lora_alpha": 8,
        "learning_rate": 1e-5,
        "optimizer": "adamw8bit",
        "adam_weight_decay": 0,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 50,
        "max_train_steps": None,
        "loss_type": "huber",
        "w_min": 3,
        "w_max": 15,
        "num_ddim_timesteps": 50,
        "phases": [1],
        "validation_prompts": ["yoda pokemon"] * 4,
    }
    assert {name: getattr(args, name) for name in recipe} == recipe


CONFIGS = {
    "one_gpu": ("NO", 1, 1),
    "eight_gpus": ("MULTI_GPU", 1, 8),
    "two_nodes": ("MULTI_GPU", 2, 16),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_config(name):
    """As accelerate reads it, and as its launcher takes it."""
    path = f"{ROOT}/scripts/accelerate/{name}.yaml"
    config = load_config_from_file(path)
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == CONFIGS[
        name
    ]
    assert config.mixed_precision == "fp16" and not config.use_cpu
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path, "train.py"])
    )
    assert (args.multi_gpu, args.num_machines, args.num_processes) == (
        name != "one_gpu",
        *CONFIGS[name][1:],
    )
    assert name != "two_nodes" or (args.rdzv_backend, args.main_process_port) == ("static", 29500)


@pytest.fixture
def slurm(tmp_path):
    """slurm(accelerate=shell text) -> slurm.sh, running with stand-ins for Slurm and accelerate."""
    show = 'if [ "$1" = show ]; then echo first; echo second'
    programs = {
        "srun": 'SLURM_NODEID=1 exec "$@"',
        "scontrol": f'{show}; else echo "$@" > requeued; fi',
        "scancel": 'echo "$@" > cancelled',
    }

    def slurm(accelerate, **environment):
        for name, text in {
            **programs,
            "accelerate": f'printf "%q " "$@" > command\n{accelerate}',
        }.items():
            path = tmp_path / name
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        for name in ("sd15", "sdxl"):
            (tmp_path / f"train_lcm_lora_{name}.py").touch()
        places = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "nodes", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "48"}
        words = [
            "bash",
            ROOT / "scripts/accelerate/slurm.sh",
            "--pretrained_teacher_model",
            "m",
            "--train_data_dir",
            "a b",
        ]
        return subprocess.Popen(
            words, env=os.environ | places | job | environment, stderr=subprocess.PIPE, text=True
        )

    return slurm


def slurm_command(folder):
    """(accelerate's arguments as its launcher takes them, the trainer's words) of slurm.sh."""
    words = shlex.split((folder / "command").read_text())
    assert words[0] == "launch"
    outer, *_ = _validate_launch_command(launch_command_parser().parse_args(words[1:]))
    return outer, outer.training_script_args


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_runs_to_the_end(slurm, tmp_path, sdxl, code):
    """Each node's command parses; without a signal the job ends with its code."""
    assert slurm(f"exit {code}").wait(20) == code and not (tmp_path / "requeued").exists()
    outer, words = slurm_command(tmp_path)
    assert (outer.machine_rank, outer.main_process_ip) == (1, "first")
    assert (outer.num_machines, outer.num_processes, outer.multi_gpu) == (2, 16, True)
    assert (outer.rdzv_backend, outer.main_process_port) == ("static", 29500)
    assert outer.training_script == "train_lcm_lora_sdxl.py" and outer.mixed_precision == "fp16"
    args = sdxl.parse_args(words)
    assert (args.resume_from_checkpoint, args.train_data_dir) == ("latest", "a b")


def test_slurm_with_other_nodes_and_trainer(slurm, tmp_path):
    """Nodes, GPUs and cores are said once, to sbatch; the trainer by a variable."""
    one = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}
    own = one | {"TRAINER": "train_lcm_lora_sd15.py", "MIXED_PRECISION": "bf16"}
    assert slurm("env > environment", **own).wait(20) == 0
    outer, _ = slurm_command(tmp_path)
    assert (outer.num_machines, outer.num_processes, outer.multi_gpu) == (1, 1, False)
    assert (outer.training_script, outer.mixed_precision) == ("train_lcm_lora_sd15.py", "bf16")
    assert "SRUN_CPUS_PER_TASK=48" in (tmp_path / "environment").read_text().split()
    lines = (ROOT / "scripts/accelerate/slurm.sh").read_text()
    assert "#SBATCH --cpus-per-task=" in lines and "two_nodes" not in lines
    for wrong in ({"TRAINER": "train.py"}, {"SLURM_GPUS_ON_NODE": ""}):
        job = slurm("exit 0", **wrong)
        assert job.wait(20) == 1
        text = job.stderr.read()
        assert text.count("\n") == 1 and ("TRAINER" in text or "--gpus-per-node" in text), text


def test_slurm_queues_again(slurm, tmp_path):
    """On the signal before the time limit: passed to the trainers; the launchers outlive it."""
    job = slurm(
        "kill -USR1 $$; touch survived; until [ -f cancelled ]; do sleep 0.1; done; "
        "sleep 0.5; touch ended; exit 1"
    )
    while not (tmp_path / "survived").exists():
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0 and (tmp_path / "ended").exists()
    assert (tmp_path / "cancelled").read_text() == "--signal=USR1 7\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert "#SBATCH --signal=B:USR1@" in (ROOT / "scripts/accelerate/slurm.sh").read_text()


# ---------------------------------------------------------------------------------- environment.sh

OLD = 'case "$*" in *version_info*) exit 1 ;; *) exit 0 ;; esac'
NEW = f'exec {sys.executable} "$@"'
SOURCE = f"set -euo pipefail; source {ROOT}/scripts/environment.sh empty.txt; python -c '{{}}'"
WHERE = "import sys; print(sys.prefix, sys.version_info >= (3, 11))"


@pytest.fixture
def environment(tmp_path):
    """environment(python3=shell text, ...): environment.sh where only these Pythons are."""
    folder, bin_ = tmp_path / "a project", tmp_path / "bin"
    folder.mkdir()
    bin_.mkdir()
    (folder / "empty.txt").touch()
    for tool in ("bash", "env", "dirname"):
        (bin_ / tool).symlink_to(shutil.which(tool))

    def environment(**pythons):
        for name, text in pythons.items():
            path = bin_ / name.replace("_", ".")
            path.write_text(f"#!{bin_}/bash\n{text}\n")
            path.chmod(0o755)
        return run("bash", "-c", SOURCE.format(WHERE), cwd=folder, PATH=str(bin_), PYTHON="")

    environment.folder = folder
    return environment


def test_a_python_is_looked_for_by_name(environment):
    """Where `python3` is too old; and then the .venv is kept. Not by activate, so it may move."""
    done = environment(python3=OLD, python3_12=NEW, python3_11="exit 1")
    venv = environment.folder / ".venv"
    assert done.returncode == 0 and f"{venv} True" in done.stdout, done.stderr + done.stdout
    assert "making .venv" in done.stdout
    (venv / "kept").touch()
    moved = environment.folder.rename(environment.folder.with_name("moved"))
    environment.folder.symlink_to("gone")  # where bin/activate would lead
    done = run("bash", "-c", SOURCE.format(WHERE), cwd=moved)
    assert done.returncode == 0 and f"{moved}/.venv True" in done.stdout, done.stderr
    assert (moved / ".venv/kept").exists() and "making" not in done.stdout


@pytest.mark.parametrize("state", ["old", "half made", "dangling"])
def test_a_wrong_environment_is_made_anew(environment, state):
    """One of an older Python, one without pip, one whose Python is gone."""
    python = environment.folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    if state == "dangling":
        python.symlink_to("/gone/python3")
    else:
        without_pip = f'case "$*" in *pip*) exit 1 ;; *) {NEW} ;; esac'
        python.write_text(f"#!/bin/bash\n{OLD if state == 'old' else without_pip}\n")
        python.chmod(0o755)
    done = environment(python3=NEW)
    assert done.returncode == 0 and f"{environment.folder}/.venv True" in done.stdout, done.stderr
    assert "making .venv" in done.stdout


@pytest.mark.parametrize("text", [OLD, 'case "$*" in *ensurepip*) exit 1 ;; esac', None])
def test_no_python_will_do(environment, text):
    """Too old, without its venv module, or none at all: one line, and no .venv is left."""
    done = environment(**{"python3": text} if text else {})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "Python 3.11" in done.stderr and not (environment.folder / ".venv").exists()


def test_one_oldest_python_is_named():
    """Everywhere the same, which all pinned packages take, and the one before it not all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = re.search(r"Python (3\.\d+) or newer", (ROOT / "README.md").read_text())[1]
    assert project["project"]["requires-python"] == f">={oldest}"
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    script = (ROOT / "scripts/environment.sh").read_text()
    assert f"({oldest.replace('.', ', ')})" in script and f"Python {oldest} or newer" in script
    lines = [
        line.split("#")[0].strip()
        for name in ("requirements.txt", "tests/requirements.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    asked = [
        SpecifierSet(importlib.metadata.metadata(Requirement(line).name)["Requires-Python"] or "")
        for line in filter(None, lines)
    ]
    before = f"3.{int(oldest.split('.')[1]) - 1}"
    assert len(asked) > 15 and all(spec.contains(f"{oldest}.0") for spec in asked)
    assert not all(spec.contains(f"{before}.99") for spec in asked)
