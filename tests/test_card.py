"""What a GPU needs, seen on a CPU: memory at its peaks, transfers, and that it need not wait.

Where only CUDA takes a path, its device is a name and what is called there is noted.
"""

import importlib
import re
from types import SimpleNamespace

import encode_data
import generate_data
import memory
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import command_line
from diffusers import AutoencoderKL, LCMScheduler
from diffusers.optimization import get_scheduler

import infer

CUDA = torch.device("cuda", 0)
NEEDED = {"pretrained_teacher_model": "m", "train_data_dir": "d", "max_train_steps": 9}
BOTH = pytest.mark.parametrize("family", ["sd15", "sdxl"])


def arguments(trainer, **flags):
    """A run's arguments."""
    return trainer.parse_args(command_line(NEEDED | flags))


# ------------------------------------------------------------------------------------------ the VAE


@BOTH
@pytest.mark.parametrize(
    "side, given, batches",
    [
        ((512, 512), None, [8, 1]),
        ((384, 672), None, [8, 1]),
        ((1024, 1024), None, [1] * 9),
        ((640, 1536), None, [1] * 9),
        ((1024, 1024), 4, [4, 4, 1]),
    ],
)
def test_large_images_are_encoded_one_at_a_time(request, family, side, given, batches):
    """Unless a flag says otherwise; in the VAE's precision."""
    trainer, seen = request.getfixturevalue(family), []

    def encode(x):
        seen.append((len(x), x.dtype))
        moments = SimpleNamespace(parameters=x[:, :1, :1, :1])
        return SimpleNamespace(latent_dist=moments)

    vae = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, encode=encode)
    pixels = torch.arange(9.0)[:, None, None, None].expand(9, 3, *side)
    size = arguments(trainer, vae_encode_batch_size=given).vae_encode_batch_size
    made = trainer.encode_images(vae, pixels, size)
    assert seen == [(count, torch.bfloat16) for count in batches]
    assert made.flatten().tolist() == [*range(9)]


def test_infer_decodes_one_image_at_a_time():
    """The images are those of a whole batch, to less than a tone."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8).eval()
    z, sizes = torch.randn(3, 4, 16, 16), []
    with torch.no_grad():
        whole = vae.decode(z).sample
        infer.guard(vae)
        vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        (one_by_one,) = vae.decode(z, return_dict=False)
    assert sizes == [1, 1, 1]
    assert (one_by_one - whole).abs().max() < 2 / 255 and one_by_one.shape == whole.shape


class Vae:
    """Stands for a VAE that is somewhere."""

    dtype, config = torch.float32, SimpleNamespace(scaling_factor=0.5)

    def __init__(self, device, seen):
        self.device, self.seen = torch.device(device), seen

    def to(self, device):
        self.device = torch.device(device)
        self.seen.append(f"to {self.device}")

    def decode(self, z):
        assert z.device == self.device
        self.seen.append(f"decode on {self.device}")
        return SimpleNamespace(sample=torch.zeros(1, 3, 8, 8))


class Pipe:
    """Stands for a teacher's pipeline whose UNet is on a device that holds no numbers."""

    components, scheduler = {}, SimpleNamespace(config=LCMScheduler().config)
    unet = SimpleNamespace(dtype=torch.float32)

    def __call__(self, **_):
        return SimpleNamespace(images=torch.empty(1, 4, 2, 2, device="meta"))

    def set_progress_bar_config(self, **_):
        pass


@BOTH
@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_validation_decodes_where_the_unet_is(request, tmp_path, family, home):
    """The VAE of a run on encoded data is on the host, and is there again afterwards."""
    trainer, pipe = request.getfixturevalue(family), Pipe()
    pipe.vae = Vae(home, [])
    args = arguments(trainer, output_dir=tmp_path, validation_prompts=["a", "b"], resolution=16)
    run = SimpleNamespace(pipe=pipe, target=None, step=1, prompts=[{}, {}], c_null={})
    run.accelerator = SimpleNamespace(trackers=[])
    trainer.validate(run, args)
    seen = [what for what in pipe.vae.seen if home == "cpu" or what.startswith("decode")]
    one = ["to meta", "decode on meta", "to cpu"] if home == "cpu" else ["decode on meta"]
    assert seen == 2 * one and pipe.vae.device.type == home


# ------------------------------------------------------------------------------------ out of memory


@pytest.mark.parametrize("program, work", [(encode_data, "encode"), (generate_data, "generate")])
def test_out_of_memory_names_flags_of_the_program(sd15, program, work, tmp_path, monkeypatch):
    """Each of them is one that it takes, with the value that is named."""
    words = {"pretrained_teacher_model": "m", "family": "sd15", "train_data_dir": "d"}
    words = command_line(words | {"center_crop": True, "output": tmp_path / "out"})

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(sd15, "__file__", sd15.__file__)  # which the program sets
    monkeypatch.setattr(program, work, full)
    with pytest.raises(SystemExit) as end:
        program.main(words)
    advice = re.search(r"out of memory \(.*2 GiB.\); (.*)", str(end.value))[1]
    named = re.findall(r"(--[\w-]+)(?: ([\w/-]*[\d/]+[\w/-]*))?", advice)
    named = [[flag, value or "1"][: 1 if flag.startswith("--no-") else 2] for flag, value in named]
    _, args = program.parse_args([*words, *(word for pair in named for word in pair)])
    assert args.mixed_precision == "fp16" and len(named) == (3 if work == "encode" else 4)
    assert (args.vae_encode_batch_size if work == "encode" else args.batch_size) == 1


@BOTH
def test_out_of_memory_names_what_is_not_yet_given(request, family, tmp_path):
    """And no VAE flag for encoded data."""
    trainer = request.getfixturevalue(family)
    every = "--gradient_checkpointing --use_8bit_adam --quantize_base --vae_encode_batch_size"
    assert re.findall(r"--\w+", trainer.less_memory(arguments(trainer)))[1:] == every.split()
    given = {"gradient_checkpointing": True, "use_8bit_adam": True, "vae_encode_batch_size": 1}
    assert re.findall(r"--\w+", trainer.less_memory(arguments(trainer, **given)))[1:] == [
        "--quantize_base"
    ]
    for name in trainer.STAMP, "state.json":
        (tmp_path / name).touch()
    encoded = {"train_data_dir": None, "dataset_name": tmp_path}
    text = trainer.less_memory(arguments(trainer, **encoded))
    assert "--vae" not in text and "encode_data.py" not in text and "--quantize_base nf4" in text


# ------------------------------------------------------------------------------------------ the log


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


def start_log(trainer, monkeypatch, device):
    """(the log of a run on that device, the rows that it writes, its clock)."""
    rows, clock, tracker = [], Clock(), SimpleNamespace(store_init_configuration=lambda _: None)
    run = trainer.Run()
    run.global_batch, run.resumed = 4, None
    run.accelerator = SimpleNamespace(device=device, is_main_process=False, trackers=[tracker])
    run.accelerator.log = lambda row, step: rows.append(row)
    monkeypatch.setattr(trainer.time, "perf_counter", clock.perf_counter)
    return trainer.Log(run, arguments(trainer)), rows, clock


@BOTH
def test_the_peak_of_loading_is_forgotten(request, family, monkeypatch):
    """memory_gib is that of the training."""
    trainer, peak = request.getfixturevalue(family), {CUDA: 7 * 2**30}
    cuda = trainer.torch.cuda
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: peak.update({device: 0}))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: peak[device])
    log, rows, clock = start_log(trainer, monkeypatch, CUDA)
    peak[CUDA] = max(peak[CUDA], 3 * 2**30)
    clock.now, log.run.step = 1.0, 1
    log.add({"loss": 1.0, "grad_norm": 1.0, "lr": 1e-4}, True, False, [])
    assert rows[0]["memory_gib"] == 3


@BOTH
def test_the_share_of_waiting_for_data(request, family, monkeypatch):
    """Three seconds of four; after a save it starts anew. The status line has it too."""
    trainer, shown = request.getfixturevalue(family), []
    log, rows, clock = start_log(trainer, monkeypatch, torch.device("cpu"))
    monkeypatch.setattr(log.bar, "set_postfix_str", lambda text, _: shown.append(text))

    def slow():
        for batch in range(3):
            clock.now += 3
            yield {"batch": batch}

    for number, batch in enumerate(log.timed(slow())):
        assert batch == {"batch": number}
        clock.now, log.run.step = clock.now + 1, number + 1
        log.add({"loss": 1.0, "grad_norm": 1.0, "lr": 1e-4}, True, False, [])
        if number == 1:
            log.restart_clock()
            log.waited = 1.0
    assert [row["data_wait"] for row in rows] == [0.75, 0.75, 1.0]
    assert "data wait 75%" in shown[0]


# -------------------------------------------------------------------------- the GPU never waits


class Moved:
    """Stands for a tensor of the host; notes what is done with it."""

    def __init__(self, *done):
        self.done = done

    def pin_memory(self):
        return Moved(*self.done, "pinned")

    def to(self, *where, **how):
        return Moved(*self.done, (*where, how))


@BOTH
def test_transfers_do_not_block(request, family):
    """From pinned memory to a GPU; on a CPU nothing is copied."""
    trainer = request.getfixturevalue(family)
    moved = trainer.to_device(Moved(), CUDA)
    assert moved.done == ("pinned", (CUDA, {"non_blocking": True}))
    batch = {"prompt": Moved(), "time_ids": Moved()}
    pipe = SimpleNamespace(unet=SimpleNamespace(dtype=torch.float16))
    c = trainer.conditions(pipe, batch, CUDA, 1)
    assert c["prompt"].done == (*moved.done, (torch.float16, {}))
    assert c["time_ids"].done == moved.done
    tensor = torch.ones(2)
    assert trainer.to_device(tensor, torch.device("cpu")) is tensor


@BOTH
@pytest.mark.parametrize("device, given, workers", [
    (CUDA, None, 4), (CUDA, 0, 0), (CUDA, 7, 7), (torch.device("cpu"), None, 0),
    (torch.device("mps"), None, 0),
])  # fmt: skip
def test_images_are_read_beside_a_gpu(request, family, monkeypatch, device, given, workers):
    """Unless a flag says otherwise; a CPU is busy with the training."""
    trainer = request.getfixturevalue(family)
    plugin = SimpleNamespace(backend=SimpleNamespace(value="NO"))
    made = SimpleNamespace(device=device, mixed_precision="no", distributed_type=SimpleNamespace(
        value="NO"), state=SimpleNamespace(dynamo_plugin=plugin))  # fmt: skip
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: made)
    args = arguments(trainer, dataloader_num_workers=given)
    assert trainer.make_accelerator(args) is made and args.dataloader_num_workers == workers


@BOTH
@pytest.mark.parametrize("cuda", [False, True])
def test_batches_are_pinned_for_a_gpu(request, family, monkeypatch, cuda):
    trainer = request.getfixturevalue(family)
    monkeypatch.setattr(trainer.torch.cuda, "is_available", lambda: cuda)
    loader = trainer.make_loader([0] * 9, {}, arguments(trainer), 0, 0, 1)
    assert loader.pin_memory == cuda and loader.num_workers == 0


# ------------------------------------------------------------------- gradients, optimizer state


@BOTH
def test_gradients_are_not_twice_in_memory(request, family):
    """On several GPUs they are what is exchanged."""
    trainer = request.getfixturevalue(family)
    AcceleratorState._reset_state(True)
    accelerator = trainer.make_accelerator(arguments(trainer, report_to="none"))
    assert accelerator.ddp_handler.gradient_as_bucket_view
    assert accelerator.init_handler.timeout.total_seconds() >= 7200


def paged_run(trainer, folder):
    """A run with a paged optimizer over a large weight and a small one, which is not paged."""
    import bitsandbytes

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(400, 300)), torch.nn.Parameter(torch.randn(80, 80))]
    optimizer = bitsandbytes.optim.AdamW8bit(weights, lr=0.1, is_paged=True)
    run = trainer.Run()
    run.optimizer, run.ema, run.resumed, run.trained = optimizer, None, folder, weights
    run.lr_scheduler = get_scheduler("constant", optimizer)
    run.accelerator = SimpleNamespace(scaler=None, device=torch.device("cpu"))
    return run


def take_step(optimizer, weights, seed):
    """A step with some gradients."""
    random = torch.Generator().manual_seed(seed)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=random)
    optimizer.step()


@BOTH
def test_paged_state_is_paged_after_a_resume(request, family, tmp_path, monkeypatch):
    """bitsandbytes loads plain tensors; a resumed run goes on as the one that was not stopped."""
    trainer = request.getfixturevalue(family)
    optimizers = importlib.import_module("bitsandbytes.optim.optimizer")
    paged, fetched = [], []

    def buffer(self, p, dtype=torch.float32):  # as on CUDA, from 1e5 numbers on
        made = torch.zeros(p.shape, dtype=dtype)
        if p.numel() >= 1e5:
            made.is_paged = True
            paged.append(made)
        return made

    monkeypatch.setattr(optimizers.Optimizer8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(optimizers.F, "prefetch_tensor", fetched.append)
    whole = paged_run(trainer, tmp_path)
    take_step(whole.optimizer, whole.trained, 1)
    state = {"optimizer": whole.optimizer.state_dict(), "step": 1}
    state["lr_scheduler"] = whole.lr_scheduler.state_dict()
    torch.save(state, tmp_path / trainer.STATE_FILE)
    resumed = paged_run(trainer, tmp_path)
    with torch.no_grad():
        for new, old in zip(resumed.trained, whole.trained, strict=True):
            new.copy_(old)
    given = resumed.optimizer
    resumed.optimizer = SimpleNamespace(
        optimizer=given, load_state_dict=given.load_state_dict, param_groups=given.param_groups
    )
    trainer.load_state(resumed)
    large, small = (given.state[p] for p in resumed.trained)
    for name in "state1", "state2":
        assert getattr(large[name], "is_paged", False) and not hasattr(small[name], "is_paged")
        assert torch.equal(large[name], whole.optimizer.state[whole.trained[0]][name])
    fetched.clear()
    take_step(whole.optimizer, whole.trained, 2)
    assert len(fetched) == 2
    take_step(given, resumed.trained, 2)
    assert len(fetched) == 4 and len(paged) == 4
    assert all(map(torch.equal, whole.trained, resumed.trained))


# ---------------------------------------------------------------------------------------- memory.py


def test_what_a_run_takes_beside_its_step(xl_teacher, capsys):
    """encode_data.py, validation, EMA and several GPUs have lines; a card has room for all."""
    flags = ["--model", str(xl_teacher), "--resolution", "64", "--encoded", "--lora_rank", "4"]
    memory.main(flags)
    lines = capsys.readouterr().out.splitlines()
    found = {line[:26].strip(): float(line[26:34]) for line in lines if " GiB" in line}
    assert {"total of encode_data.py", "total of validation", "with --ema_decay, more",
            "on several GPUs, more"} <= found.keys()  # fmt: skip
    vae = memory.vae_memory(str(xl_teacher), 64, "no")
    teacher = AutoencoderKL.from_pretrained(xl_teacher, subfolder="vae")
    assert vae["VAE"] == 4 * teacher.num_parameters()
    parts = {"base": 10, "VAE and text encoders": 0, "LoRA": 4, "optimizer state": 8}
    parts |= {"gradients at the peak": 1, "total": 30}
    beside = memory.others(parts, vae | {"VAE": 5, "decoding": 20})
    assert beside["validation"] == 47 and beside["with --ema_decay, more"] == 4
    assert beside["on several GPUs, more"] == 3
    few = {"VAE": 5, "text encoders": 6, "encoding": 50, "decoding": 1}
    assert memory.needed(parts, few) == 61  # encode_data.py
    assert memory.needed(parts, few | {"encoding": 7, "decoding": 40}) == 67  # validation
    assert memory.needed(parts, few | {"encoding": 7}) == 30  # the step
    raw, few = parts | {"VAE and text encoders": 9}, few | {"encoding": 3}
    assert memory.others(raw, few)["validation"] == 10 + 4 + 8 + 5 + 6 + 3
    assert memory.needed(raw, few) == 36 and memory.needed(raw | {"total": 40}, few) == 42


def test_the_vae_takes_as_much_as_its_images(xl_teacher):
    """One at a time above 512 px, as encode_data.py; twice as much in float32."""
    name = str(xl_teacher)
    one, eight = (memory.vae_memory(name, 520, "no", count)["encoding"] for count in (1, 8))
    assert memory.vae_memory(name, 520, "no")["encoding"] == one
    assert memory.vae_memory(name, 512, "no")["encoding"] > 4 * one
    assert 7 * one < eight <= 8 * one * 1.01
    assert (
        memory.vae_memory(name, 520, "bf16")["decoding"]
        < 0.6 * (memory.vae_memory(name, 520, "no")["decoding"])
    )


def test_the_table_does_not_fall():
    """A larger card never has a smaller batch; the first one without checkpointing is named."""
    gb, batches = 10**9, memory.COMPUTED_BATCHES
    for base, slope, more in ((1, 0.2, 2), (4, 1, 5), (7, 0.4, 3), (3, 3, 4), (12, 1.9, 3)):
        curves = {
            options: {b: gb * (base - i * base / 5 + slope * b) for b in batches}
            for i, options in enumerate(memory.LADDER)
        }
        *cells, without = memory.row(curves, {b: gb * (base + more * slope * b) for b in batches})
        sizes = [0 if cell == "no" else int(cell.split()[0]) for cell in cells]
        assert sizes == sorted(sizes) and len(sizes) == len(memory.CARDS)
        room = {card: card * gb - memory.ALLOWANCE for card in memory.CARDS}
        first = next((c for c in room if base + more * slope * 4 <= room[c] / gb), None)
        assert without.startswith(f"{first} GB: " if first else "no")
