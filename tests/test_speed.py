"""What makes a step faster or smaller leaves the maths alone: 20 losses beside float32's."""

import copy
import re
import sys

import compare_speed
import decode_speed
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, SMOOTH, command_line, load_script, run, same, series

STEPS = SMOOTH | {"max_train_steps": 20, "lora_rank": 32, "center_crop": True}
COMPILED = {"torch_compile": True}
# {option: (its flags, the largest relative difference of a loss that it may make)}
OPTIONS = {
    "vae_encode_batch_size": ({"vae_encode_batch_size": 1}, 1e-5),
    "encoded data": ({}, 1e-5),
    "torch_compile": (COMPILED, 1e-5),
    "torch_compile, checkpointing": (COMPILED | {"gradient_checkpointing": True}, 1e-5),
    "use_8bit_adam": ({"use_8bit_adam": True}, 1e-3),
    "bf16": ({"mixed_precision": "bf16"}, 0.05),
    "nf4": ({"quantize_base": "nf4"}, 0.1),
}


@pytest.fixture(scope="module")
def plain(train_xl):
    return train_xl(**STEPS)


@pytest.fixture(scope="module")
def encoded(xl_teacher, images, tmp_path_factory):
    """The data of the other runs as scripts/encode_data.py makes them."""
    folder = tmp_path_factory.mktemp("encoded") / "data"
    flags = {"pretrained_teacher_model": xl_teacher, "train_data_dir": images, "resolution": 32}
    words = command_line(flags | {"center_crop": True, "family": "sdxl", "output": folder})
    AcceleratorState._reset_state(True)
    load_script("scripts/encode_data.py").main(words)
    return folder


def distance(a, b):
    """The largest relative difference of a loss between two runs."""
    return abs(np.array(series(a)) / series(b) - 1).max()


@pytest.mark.parametrize(
    "option",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "torch_compile" else ())
        for name in OPTIONS
    ],
)
def test_option_leaves_the_losses(train_xl, plain, option, request):
    flags, tolerance = OPTIONS[option]
    if option == "encoded data":
        flags = {"dataset_name": request.getfixturevalue("encoded")}
    torch._dynamo.reset()  # or the blocks would be those of another test
    before = torch._dynamo.utils.counters["stats"]["calls_captured"]
    assert 0 < distance(train_xl(**STEPS, **flags), plain) < tolerance
    compiled = torch._dynamo.utils.counters["stats"]["calls_captured"] > before
    assert compiled == ("torch_compile" in flags)


def test_channels_last_leaves_the_losses(train_xl, plain, monkeypatch):
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    assert 0 < distance(train_xl(**STEPS), plain) < 1e-5


def test_fused_adam_leaves_the_losses(train_xl, plain, monkeypatch):
    adam = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, fused, **settings: adam(parameters, **settings)
    )
    assert 0 < distance(train_xl(**STEPS), plain) < 1e-5


def test_quantized_base(sdxl, xl_teacher):
    """Teacher and student share one base: only its transformers' linear layers in 4 bits."""
    words = [
        "--pretrained_teacher_model",
        str(xl_teacher),
        "--train_data_dir",
        "x",
        "--quantize_base",
        "nf4",
    ]
    args = sdxl.parse_args(words)
    pipe = sdxl.load_teacher(args, torch.float32)
    before = copy.deepcopy(pipe.unet)
    student = sdxl.make_student(pipe, args, torch.device("cpu"))
    old, new, theirs = (dict(unet.named_modules()) for unet in (before, pipe.unet, student))
    linears = {path for path, module in old.items() if isinstance(module, torch.nn.Linear)}
    quantized = {path for path, module in new.items() if getattr(module, "weight", None) is not None
                 and not module.weight.is_floating_point()}  # fmt: skip
    assert quantized == {path for path in linears if ".attentions." in path} and len(quantized) > 20
    for path in quantized:
        base = getattr(theirs[path], "base_layer", theirs[path])
        assert base.weight is new[path].weight
        assert base.quant_state is new[path].quant_state
        assert new[path].weight.numel() == old[path].weight.numel() / 2
    kept = {id(p) for p in pipe.unet.parameters()}
    assert all(
        id(p) in kept or p.dtype == torch.float32 and p.requires_grad for p in student.parameters()
    )


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_quantized_run_resumes(train, train_xl, layout):
    """Checkpoints of a run on a quantized base go on to the bit."""
    train = {"sd15": train, "sdxl": train_xl}[layout]
    flags = {"quantize_base": "nf4", "checkpointing_steps": 2}
    whole = train(**flags)
    half = train(**flags, resume_from_checkpoint=whole / "checkpoint-2")
    assert same(whole, half)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_base_in_8_bits_is_refused(request, family):
    """On CUDA it would round the layers' inputs too, which is another algorithm."""
    words = "--pretrained_teacher_model m --train_data_dir d --quantize_base int8".split()
    with pytest.raises(SystemExit, match="error: .*--quantize_base.*'int8'.*nf4"):
        request.getfixturevalue(family).parse_args(words)


@pytest.mark.cpu("a GPU is not refused")
def test_paged_adam_needs_a_gpu(train):
    with pytest.raises(SystemExit, match="error: --optimizer paged_adamw8bit .*GPU"):
        train(optimizer="paged_adamw8bit")


def test_use_8bit_adam_is_the_optimizer_of_that_name(sd15, sdxl):
    for trainer in (sd15, sdxl):
        words = ["--pretrained_teacher_model", "m", "--train_data_dir", "d"]
        kinds = [
            trainer.parse_args([*words, *more]).optimizer for more in ([], ["--use_8bit_adam"])
        ]
        assert kinds == ["adamw", "adamw8bit"]


BAR = """
import sys, time
name = sys.argv[sys.argv.index("--output_dir") + 1].split("/")[-1]
print("started", name, file=open({log!r}, "a"))
for step in range(1, 10**6):
    time.sleep({seconds})
    print(f"{{step}}/9999999 [", flush=True)
"""


@pytest.fixture
def bars(tmp_path, monkeypatch):
    """bars(gpu, *flags) -> (exit code, names of what was started) of compare_speed.py.

    Its trainers only show steps, every 60 ms, the references a.py and b.py every 120 and 30 ms.
    `gpu` is what nvidia-smi does, None without one.
    """
    log = tmp_path / "log"
    for name, seconds in ("train_lcm_lora_sdxl.py", 0.06), ("a.py", 0.12), ("b.py", 0.03):
        (tmp_path / name).write_text(BAR.format(log=str(log), seconds=seconds))
    monkeypatch.setattr(compare_speed, "ROOT", tmp_path)
    monkeypatch.setattr(compare_speed, "make_data", lambda *_: None)

    def start(gpu, *flags):
        place = tmp_path / "bin"
        place.mkdir(exist_ok=True)
        monkeypatch.setenv("PATH", str(place))
        if gpu is not None:
            (place / "nvidia-smi").write_text(f"#!/bin/sh\n{gpu}\n")
            (place / "nvidia-smi").chmod(0o755)
        log.write_text("")
        code = compare_speed.main(["--seconds", "0.3", *map(str, flags)])
        return code, log.read_text().replace("started 16 ", "").splitlines()

    return start


@pytest.mark.parametrize("gpu", [None, "echo No devices were found", "echo 0"])
def test_an_idle_card_is_a_card(bars, capsys, gpu):
    """On it each round starts each program anew, and its memory has a column."""
    code, started = bars(gpu, "--rounds", 2, "--least", 0)
    card = gpu == "echo 0"
    assert (code, started) == (0, ["ours", "ours, encoded"] * (1 + card))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| 16 |" in line]
    assert [row[-1] for row in rows] == ["0.0, 0.0 |" if card else " |"] * 2
    rounds = compare_speed.parse_args([]).rounds
    assert rounds == (3 if card else 12)


def test_several_references_run_beside_ours(bars, tmp_path, capsys):
    """Gains are over the first, and --least has a number for each."""
    both = ("--rounds", 2, "--reference", tmp_path / "a.py", tmp_path / "b.py")
    code, started = bars(None, *both, "--least", 2.8, 1.2, 1.2)
    assert (code, started) == (0, ["reference", "reference 2", "ours", "ours, encoded"])
    said = capsys.readouterr().out
    assert f"reference: {tmp_path}/a.py\nreference 2: {tmp_path}/b.py\n" in said
    named = ", ".join(f"{name} (.*?) times.*?" for name in started[1:])
    gains = map(float, re.search(f"median of 2, over reference: {named}\n", said).groups())
    assert all(abs(gain / want - 1) < 0.4 for gain, want in zip(gains, (4, 2, 2)))
    with pytest.raises(SystemExit):
        bars(None, *both, "--least", 1, 1)
    assert "--least: give a number for each gain, here 3" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_speed(xl_teacher, tmp_path):
    """Beside a reference that sleeps in each step ours is faster; nothing stays behind."""
    slow, ours = tmp_path / "slow.py", str(ROOT / "train_lcm_lora_sdxl.py")
    slow.write_text(
        "import runpy, time\n"
        "import accelerate\n"
        "backward = accelerate.Accelerator.backward\n"
        "accelerate.Accelerator.backward = lambda *words: (time.sleep(2), backward(*words))\n"
        f"runpy.run_path({ours!r}, run_name='__main__')\n"
    )
    program = sys.executable, "scripts/measure/compare_speed.py"
    data = ["--teacher", xl_teacher, "--resolution", 32, "--batch", 2]  # the demo's images
    turns = "--rounds 2 --seconds 1 --lora_rank 4".split()
    done = run(*program, "--reference", slow, *data, *turns)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("| 2 | ")[1].split(" |")[0]) > 2
    alone = run(*program, *data, *"--rounds 1 --seconds 1 --least 1000".split())
    assert alone.returncode == 1, alone.stderr
    assert "gain: ours, encoded" in alone.stdout and "reference" not in alone.stdout
    done = run(*program, "--family", "sdxl", "--teacher", tmp_path / "nothing")
    assert done.returncode == 1
    assert f"error: --pretrained_teacher_model {tmp_path}/nothing: " in done.stderr
    done = run(*program, "--reference", "nothing.py")
    assert done.returncode == 2 and "--reference nothing.py: no such file" in done.stderr


def test_decode_speed(capsys):
    """Both decoders make an image of the size that was asked for, which it checks."""
    decode_speed.main(["--resolution", "32", "--rounds", "1"])
    said = r"VAE .* an image of 32 px: .*\n.* [\d.]+ times as fast\n"
    assert re.fullmatch(said, capsys.readouterr().out)
    with pytest.raises(SystemExit):
        decode_speed.main(["--resolution", "100"])
    assert "--resolution 100: give a multiple of 8" in capsys.readouterr().err
