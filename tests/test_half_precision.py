"""A step in half precision: no autocast, LoRA layers that cast A and B only; what that moves."""

import contextlib
from unittest import mock

import count_bytes
import memory
import numpy as np
import peft
import pytest
import torch
from conftest import SMOOTH, command_line, difference, series

PEFTS = peft.tuners.lora.Linear, peft.tuners.lora.Conv2d
STEPS = SMOOTH | {"max_train_steps": 20, "lora_rank": 32, "center_crop": True}


@pytest.fixture
def as_before(sdxl):
    """as_before(part, ...): these parts of the step as they were, by CUDA's rules, for a block.

    "teacher", "student" (and the target): under autocast, which normalises in float32, and x0 of
    latents that are not rounded; "layers": PEFT's own, which cast their input to float32.
    """

    @contextlib.contextmanager
    def go_back(*parts):
        predict, functional = sdxl.predict, torch.nn.functional

        def under_autocast(unet, *given):
            part = "student" if hasattr(unet, "peft_config") else "teacher"
            dtype = next(unet.parameters()).dtype
            enabled = part in parts and dtype != torch.float32
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                return predict(unet, *given)

        fakes = [(sdxl, "predict", under_autocast)]
        for name in ("group_norm", "layer_norm"):
            fakes.append((functional, name, memory.in_float32(getattr(functional, name))))
        if "student" in parts:
            fakes.append((sdxl, "rounded", lambda z_t, unet: z_t))
        if "layers" in parts:
            ours = sdxl.HalfLinear, sdxl.HalfConv2d
            fakes += [(own, "forward", kind.forward) for own, kind in zip(ours, PEFTS)]
        with contextlib.ExitStack() as stack:
            for fake in fakes:
                stack.enter_context(mock.patch.object(*fake))
            yield

    return go_back


ALL = "teacher", "student", "layers"


@pytest.fixture(scope="module")
def plain(train_xl):
    """A run in float32."""
    return train_xl(**STEPS)


def distance(a, b):
    """The largest relative difference of a loss between two runs."""
    return abs(np.array(series(a)) / series(b) - 1).max()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kept",
    [
        (),
        pytest.param(("student", "layers"), marks=SLOW),
        pytest.param(("layers",), marks=SLOW),
    ],
    ids=["all changes", "teacher", "teacher and student"],
)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16", 0.05), pytest.param("fp16", 0.01, marks=SLOW)]
)
def test_losses_are_those_of_before(
    request, train_xl, plain, as_before, precision, tolerance, kept
):
    """20 losses, after each change, beside float32's and beside those under autocast."""
    if precision == "fp16":
        request.getfixturevalue("fp16_on_the_cpu")
    runs = []
    for parts in (ALL, kept):
        with as_before(*parts):
            runs.append(train_xl(**STEPS, mixed_precision=precision))
    before, now = runs
    assert 0 < distance(now, plain) < tolerance
    assert 0 < distance(now, before) < tolerance


def test_layers_are_pefts_to_the_bit(sdxl):
    """Without a base, whose sum with the LoRA PEFT rounds once more: outputs and gradients."""
    config = peft.LoraConfig(r=4, lora_alpha=8)
    cases = {
        PEFTS[0]: (sdxl.HalfLinear, torch.nn.Linear(24, 16), (2, 3, 24)),
        PEFTS[1]: (sdxl.HalfConv2d, torch.nn.Conv2d(6, 16, 3, 2, 1), (2, 6, 8, 8)),
    }
    for kind, (own, base, shape) in cases.items():
        for p in base.bfloat16().requires_grad_(False).parameters():
            p.zero_()
        results = []
        for make, autocast in ((kind, True), (own, False)):
            torch.manual_seed(0)
            layer = make(base, "default", config=config, r=4, lora_alpha=8).float()
            base.bfloat16()
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            x = torch.randn(shape).bfloat16().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            y.backward(torch.randn(y.shape).bfloat16())
            trained = [p for p in layer.parameters() if p.requires_grad]
            assert [p.grad.dtype for p in trained] == [torch.float32] * 2
            results.append([y, x.grad, *(p.grad for p in trained)])
        for before, now in zip(*results):
            assert torch.equal(before, now) and now.abs().max() > 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_float32_keeps_pefts_layers(sdxl, xl_teacher, precision):
    """A float32 run is that of before to the bit; in half precision every layer is ours."""
    flags = {"pretrained_teacher_model": xl_teacher, "train_data_dir": "x", "lora_rank": 4}
    args = sdxl.parse_args(command_line(flags))
    pipe = sdxl.load_teacher(args, sdxl.DTYPES[precision])
    student = sdxl.make_student(pipe, args, torch.device("cpu"))
    kinds = {type(m) for m in student.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert kinds == ({*PEFTS} if precision == "no" else {sdxl.HalfLinear, sdxl.HalfConv2d})


def test_bf16_resumes_to_the_bit(train_xl):
    """With dropout, accumulation, a moving average, and checkpointing in the second half only."""
    flags = {"mixed_precision": "bf16", "lora_dropout": 0.5, "ema_decay": 0.9}
    flags |= {"gradient_accumulation_steps": 2, "checkpointing_steps": 2}
    whole = train_xl(**flags)
    half = train_xl(
        **flags, gradient_checkpointing=True, resume_from_checkpoint=whole / "checkpoint-2"
    )
    assert difference(whole, half) == 0 and series(half) == series(whole)[2:]


def test_count_of_single_operations():
    """Bytes and kernels of operations whose counts are known."""
    x, weight, out = torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(8, 4)
    image, kernel = torch.zeros(2, 4, 10, 10), torch.zeros(4, 4, 3, 3)
    as_kernel = image.nbytes + kernel.nbytes + torch.zeros(2, 4, 8, 8).nbytes
    last = kernel.to(memory_format=torch.channels_last)
    size, small = x.nbytes, weight.nbytes
    cases = [
        (lambda: x.view(4, 8).t()[1:].unsqueeze(0), 0, 0),
        (lambda: torch.empty(3), 0, 0),
        (lambda: x + 1, 2 * size, 1),
        (lambda: x.add_(out), 3 * size, 1),
        (lambda: x.copy_(out), 2 * size, 1),
        (lambda: x.zero_(), size, 1),
        (lambda: x @ weight, 2 * size + small, 1),
        (lambda: torch.addmm(weight[0], x, weight), 2 * size + small + 16, 1),
        (lambda: out.addmm_(x, weight), 3 * size + small, 1),
        (lambda: torch.addmm(out, x, weight), 5 * size + small, 2),
        (lambda: x[:1].expand(8, 4) * 1, size + x[0].nbytes, 1),
        (lambda: torch.conv2d(image, kernel), as_kernel, 1),
        (lambda: torch.conv2d(image, last), as_kernel + 2 * image.nbytes, 2),
    ]
    for operation, moved, kernels in cases:
        with count_bytes.BytesMoved() as counter, counter.during("target"):
            operation()
        assert counter.table()["sum"][:2] == (kernels, moved)


def test_a_step_moves_less(xl_teacher, as_before, capsys):
    """A third of the bytes and of the kernels of the teacher, of the whole step nearly as much."""
    with as_before(*ALL):
        before = count_bytes.count_step(str(xl_teacher), 32, 4, "bf16")
    count_bytes.main(["--model", str(xl_teacher), "--resolution", "32", "--batch", "4"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == [*count_bytes.PASSES, "sum"] == [*before]
    for _, name, kernels, *_ in rows:
        assert 0 < int(kernels.replace(",", "")) < 0.8 * before[name.strip()][0]
    now = count_bytes.count_step(str(xl_teacher), 32, 4, "bf16")
    for name, (_, moved, kinds) in now.items():
        assert moved == sum(kinds.values()) < 0.76 * before[name][1]
