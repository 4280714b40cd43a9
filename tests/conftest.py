"""Small random models and images made on the spot, and helpers that run the programs on them.

Nothing is downloaded. The GPU is hidden from all tests; with --gpu it is seen by all of them.
"""

import atexit
import importlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HF_HOME = tempfile.mkdtemp(prefix="hf-home-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_HOME": HF_HOME,
}
GPUS = 0  # that the tests may use: with --gpu those of this machine
DEVICE = ["--device", "cpu"]  # flags of infer.py


def pytest_addoption(parser):
    """--gpu; pytest-xdist hands it on to its workers."""
    parser.addoption("--gpu", action="store_true", help="do not hide the GPU from the tests")


def pytest_configure(config):
    """Hide the GPU, or see that one is there: before a test module imports PyTorch.

    Equalities to the bit are asserted on a GPU too, where sums in changing order may break them.
    """
    global GPUS
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # tolerances are those of float32
    import torch

    GPUS = torch.cuda.device_count()
    if not GPUS:
        raise pytest.UsageError("--gpu: PyTorch finds no GPU here; leave it out to test on the CPU")
    DEVICE[:] = "--device", "cuda", "--dtype", "fp32"


def pytest_runtest_setup(item):
    """With --gpu a test with @pytest.mark.cpu(reason) is skipped."""
    if GPUS and (mark := item.get_closest_marker("cpu")):
        pytest.skip(f"for a CPU alone: {mark.args[0]}")


# A run of seconds: what `train` gives where a test says nothing else. The learning rate is high so
# that a few steps show.
QUICK = {
    "resolution": 32,
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "train_batch_size": 2,
    "max_train_steps": 4,
    "phases": "1",  # a plan ties a run to its length, which tests change at a resume
    "report_to": "none",
}
# For runs that must agree but for rounding. A large epsilon makes Adam's step proportional to small
# gradients: else rounding decides the sign of the smallest.
SMOOTH = {"adam_epsilon": 1e-2, "learning_rate": 3e-3, "train_batch_size": 4}
CAPTIONS = (
    "red apple,green pear,a house,two cats,blue car,old tree,the moon,fish,a boat,one star,"
    "cup of tea,rain"
).split(",")


def load_script(name):
    """A program (train_lcm_lora_sd15.py, scripts/evaluate.py ...) as a module.

    pyproject.toml has the folders of all programs on the path, and no two of them share a name.
    """
    return importlib.import_module(Path(name).stem)


def command_line(flags):
    """{"seed": 3, "scale_lr": True, "validation_prompts": ["a", "b"]} as words.

    None and False leave a flag out.
    """
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def run(*command, cwd=ROOT, **environment):
    """A program to its end, on one thread: the completed process with its text."""
    env = os.environ | {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )


def devices(count):
    """(flags of `accelerate launch`, environment) for so many processes.

    With --gpu each has its GPU; where there are too few, all are on the CPU.
    """
    one = [] if GPUS else ["--cpu"]
    kind = one if count == 1 else ["--multi_gpu"]
    hidden = {} if count <= GPUS else {"CUDA_VISIBLE_DEVICES": ""}
    return [*kind, "--num_processes", str(count)], hidden


def launch(*command, count=1, flags=(), **kwargs):
    """`accelerate launch` of a program in `count` processes."""
    machine = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    kind, environment = devices(count)
    launcher = (sys.executable, "-m", "accelerate.commands.launch", *machine, *kind, *flags)
    return run(*launcher, *command, **environment, **kwargs)


def log(folder):
    """The rows of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


LORA = "pytorch_lora_weights.safetensors"


def lora_file(folder):
    """(tensors, metadata) of a LoRA file."""
    from safetensors import safe_open

    with safe_open(folder / LORA, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def same(a, b):
    """Whether two folders hold the same LoRA: keys, tensors to the bit, metadata but the name."""
    import torch

    (ours, about), (theirs, of_theirs) = lora_file(a), lora_file(b)
    return (
        about | {"ss_output_name": ""} == of_theirs | {"ss_output_name": ""}
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[k], theirs[k]) for k in ours)
    )


def difference(a, b):
    """The largest difference of an element between two folders' LoRA files with the same keys."""
    ours, theirs = lora_file(a)[0], lora_file(b)[0]
    assert ours.keys() == theirs.keys()
    return max((ours[k] - theirs[k]).abs().max().item() for k in ours)


def series(folder, *names):
    """Columns of log.jsonl, one list a row; the loss where nothing is named."""
    return [[row[name] for name in names or ("loss",)] for row in log(folder)]


def size_of_b(folder):
    """The largest element of the LoRA's up matrices, which start at 0."""
    return max(w.abs().max().item() for k, w in lora_file(folder)[0].items() if "lora_up" in k)


def near(a, b, tolerance=1e-5):
    """Whether two runs have the same losses to `tolerance` and the same learning rates.

    Gradient norms to ten times that.
    """
    import numpy as np

    return all(
        np.allclose(series(a, name), series(b, name), rtol=rtol, atol=atol)
        for name, rtol, atol in (
            ("loss", 0, tolerance),
            ("grad_norm", 10 * tolerance, 0),
            ("lr", 1e-9, 0),
        )
    )


def image_bytes(image, kind="PNG", **settings):
    """An image as `datasets` has it undecoded."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return {"bytes": file.getvalue(), "path": None}


def write_tar(path, files):
    """A tar shard of {name: bytes}, or of such pairs; its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in dict(files).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_tokenizer(folder):
    """A CLIP tokenizer whose words are letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    words = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16
    )


def make_text_encoder(tokenizer, width=32, kind="CLIPTextModel"):
    """A random CLIP text encoder."""
    import transformers
    from transformers import CLIPTextConfig

    return getattr(transformers, kind)(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# What makes a small UNet one of SDXL's or of SSD-1B's layout: pooled prompt (32) and six
# sizes (8 each) beside the time.
XL = {
    "cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "use_linear_projection": True, "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "transformer_layers_per_block": (1, 2),
}  # fmt: skip
UNETS = {
    "sd15": {"cross_attention_dim": 32},
    "sdxl": XL,
    "ssd1b": XL
    | {"reverse_transformer_layers_per_block": [[2, 1], 1], "mid_block_type": "UNetMidBlock2D"},
}


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory):
    """A factory of teachers.

    make_teacher(layout="sd15", seed=0, force_zeros=True, **scheduler settings) -> folder.
    """

    def make(layout="sd15", seed=0, force_zeros=True, **scheduler):
        import torch
        from diffusers import (
            AutoencoderKL,
            DDIMScheduler,
            StableDiffusionPipeline,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )

        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("teacher")
        tokenizer = make_tokenizer(folder / "tokenizer")
        if layout == "sd15":
            pipeline_class = StableDiffusionPipeline
            more = {
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
        else:
            pipeline_class = StableDiffusionXLPipeline
            second = make_text_encoder(tokenizer, kind="CLIPTextModelWithProjection")
            more = {
                "text_encoder_2": second,
                "tokenizer_2": tokenizer,
                "force_zeros_for_empty_prompt": force_zeros,
            }
        pipe = pipeline_class(
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1,
                attention_head_dim=2,
                norm_num_groups=8,
                **UNETS[layout],
            ),
            vae=AutoencoderKL(
                block_out_channels=(16, 16, 16),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                latent_channels=4,
                norm_num_groups=8,
                sample_size=32,
            ),
            text_encoder=make_text_encoder(tokenizer),
            tokenizer=tokenizer,
            scheduler=DDIMScheduler(
                **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                   "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | scheduler
            ),
            **more,
        )  # fmt: skip
        pipe.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher):
    """The folder of the small epsilon teacher."""
    return make_teacher()


@pytest.fixture(scope="session")
def v_teacher(make_teacher):
    """The folder of a small v-prediction teacher with zero terminal SNR."""
    return make_teacher(prediction_type="v_prediction", rescale_betas_zero_snr=True)


@pytest.fixture(scope="session")
def xl_teacher(make_teacher):
    """The folder of the small epsilon teacher of SDXL's layout."""
    return make_teacher("sdxl")


@pytest.fixture(scope="session")
def make_images(tmp_path_factory):
    """A factory of image folders with metadata.jsonl.

    make_images(count, broken=(indices)) -> folder.
    """

    def make(count=12, broken=()):
        import numpy as np
        from PIL import Image

        folder = tmp_path_factory.mktemp("images")
        rows, random = [], np.random.default_rng(0)
        for i in range(count):
            name = f"{i:02}.png"
            colours = random.integers(0, 256, (4, 4, 3), np.uint8)
            size = (40 + 3 * (i % 5), 40 + 4 * (i % 3))
            Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(folder / name)
            if i in broken:
                (folder / name).write_bytes(b"no image at all")
            rows.append(json.dumps({"file_name": name, "text": CAPTIONS[i % len(CAPTIONS)]}))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        return folder

    return make


@pytest.fixture(scope="session")
def images(make_images):
    """A folder of twelve captioned images of mixed sizes."""
    return make_images()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The folder of a small random CLIPModel with tokenizer and image processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, image_size=32, patch_size=8, **sizes
    )
    torch.manual_seed(0)
    text = make_text_encoder(tokenizer).config
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    config.text_config.projection_dim = config.vision_config.projection_dim = 16
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture
def umask():
    """An unusual umask, for the test: written files have to have the permissions that it gives."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.fixture(autouse=True)
def another_program():
    """The next test is another program: what one leaves behind in this process is undone.

    accelerate keeps its precision; programs in scripts/ put their name into a trainer's messages.
    What no test has loaded is not loaded here.
    """

    def undo():
        if "accelerate" in sys.modules:
            sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
        for name in ("train_lcm_lora_sd15", "train_lcm_lora_sdxl"):
            if name in sys.modules:
                sys.modules[name].__file__ = sys.modules[name].__spec__.origin

    undo()
    yield
    undo()


@pytest.fixture(scope="session")
def sd15():
    """train_lcm_lora_sd15.py as a module."""
    return load_script("train_lcm_lora_sd15.py")


@pytest.fixture(scope="session")
def sdxl():
    """train_lcm_lora_sdxl.py as a module."""
    return load_script("train_lcm_lora_sdxl.py")


@pytest.fixture(scope="session")
def train_by(images, tmp_path_factory):
    """train_by(trainer, teacher) -> train(flag=value, ...) -> output folder.

    Its main() in this process, QUICK by default.
    """
    import torch
    from accelerate.state import AcceleratorState

    def train_by(trainer, teacher):
        def train(**flags):
            data = (
                {}
                if flags.keys() & {"dataset_name", "train_shards_path_or_url"}
                else {"train_data_dir": images}
            )
            out = tmp_path_factory.mktemp("run") / "out"
            flags = {"pretrained_teacher_model": teacher, "output_dir": out} | data | QUICK | flags
            AcceleratorState._reset_state(True)
            torch.set_num_threads(1)
            handlers = {number: signal.getsignal(number) for number in trainer.STOP_SIGNALS}
            try:
                trainer.main(command_line(flags))
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            return flags["output_dir"]

        return train

    return train_by


@pytest.fixture(scope="session")
def train(train_by, sd15, teacher):
    """train(flag=value, ...) -> output folder, by the SD 1.5 trainer."""
    return train_by(sd15, teacher)


@pytest.fixture(scope="session")
def train_xl(train_by, sdxl, xl_teacher):
    """train_xl(flag=value, ...) -> output folder, by the SDXL trainer."""
    return train_by(sdxl, xl_teacher)


@pytest.fixture
def fp16_on_the_cpu(sd15, sdxl, monkeypatch):
    """--mixed_precision fp16 where accelerate wants a GPU for it: with its autocast and scaler."""
    if GPUS:
        return
    import torch

    real = sd15.Accelerator

    def make(mixed_precision, **settings):
        accelerator = real(mixed_precision="no", **settings)
        if mixed_precision == "fp16":
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        return accelerator

    for trainer in (sd15, sdxl):
        monkeypatch.setattr(trainer, "Accelerator", make)


SEPARATORS = set(";&|()<>")
BEFORE_A_COMMAND = {"exec", "time", "if", "then", "do", "else", "while", "until", "!"}


def shell_commands(text):
    """The commands of a shell text as lists of words.

    Variables and $(...) become 1, assignments in front are dropped.
    """
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(
        r'"?\$\{?(@|\w+\[@\])[^"\s]*"?', "", text
    )  # "$@", "${names[@]}": any number of words
    text = re.sub(r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "1", text)
    text = re.sub(r"\$(\{[^}]*\}|\w+)", "1", text)
    commands = []
    for line in text.splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = list(lexer)
        except ValueError:  # a quotation over several lines, which no command of a program here has
            continue
        for separator, part in itertools.groupby(words, lambda word: set(word) <= SEPARATORS):
            part = list(part)
            while part and (part[0] in BEFORE_A_COMMAND or re.match(r"\w+=", part[0])):
                part.pop(0)
            if part and not separator:
                commands.append(part)
    return commands


def shell_blocks():
    """[(page, text)] of the shell blocks of README.md, CONTRIBUTING.md and docs/*.md."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (str(page.relative_to(ROOT)), re.sub(r"^\$ ", "", text, flags=re.MULTILINE))
        for page in pages
        for language, text in re.findall(
            r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
        )
        if language in ("", "bash", "sh", "shell", "console")
    ]


def documented_commands():
    """[(file, words)] of the commands that pages and scripts/*.sh give for programs of this one."""
    texts = shell_blocks()
    scripts = sorted(path for where in ("", "demo/") for path in ROOT.glob(f"scripts/{where}*.sh"))
    scripts = [path for path in scripts if not path.name.startswith("train_")]  # test_launchers
    texts += [(path.name, path.read_text().replace("$family", "sd15")) for path in scripts]
    return [
        (name, words)
        for name, text in texts
        for words in shell_commands(text)
        if words[0] in ("python", "python3", "accelerate", "bash")
        and any(w.endswith((".py", ".sh")) for w in words)
    ]
