#!/usr/bin/env python
"""Peak GPU memory of a training step, computed without a GPU, by part; and what fits on which card.

    python scripts/measure/memory.py --model sdxl --resolution 1024 --batch 1 --encoded \\
        --quantize_base nf4 --gradient_checkpointing --use_8bit_adam
    python scripts/measure/memory.py --table      # the documentation's table, an hour or so
    python scripts/measure/memory.py --real       # the demo's step with memory too, to compare

The trainer's own step runs on tensors that have shapes but no memory, and the bytes of all that are
alive are added up at every operation; the largest sum counts. They are a CPU's tensors with two
rules of CUDA's: autocast normalises in float32, and attention is a kernel that never stores the
L x L matrix, as on a CPU. The host's copy of the batch is counted too. The step of fp16 is computed
as that of bf16, which has as many bytes; SDXL's own VAE is float32 in a run in fp16.

Beside the step it counts what else a run and its preparation take:
    encode_data.py   the VAE at its batch, beside the text encoders
    validation       the VAE decodes an image beside base, LoRA and optimizer state (encoded data:
                     it is moved to the GPU for that), or encodes, where data are not encoded
    --ema_decay      another copy of the LoRA, in addition
    several GPUs     gradients that stay in DDP's buckets, in addition
A card is large enough where the step, encode_data.py and validation fit.

bitsandbytes does not run on such tensors: its layers and optimizer have stand-ins that hold as many
bytes (NF4: half a byte a weight, a byte for 64 of them, 4 for 16,384; 8-bit Adam: 2 bytes a
weight, 8 for 256) and make the same temporary tensors: the layer's weight in full precision.

What cannot be seen from here (CUDA's context, workspaces of its libraries) is allowed for with 0.8
GiB. A card of N GB is taken to hold N x 10^9 bytes; that it has 2^30 for each, 7% more, is left to
fragmentation.
"""

import argparse
import contextlib
import importlib
import math
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKL
from official_unets import random_module
from random_training import OPTIONS, Training, add_model_flags, describe, fail, fake_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

ALLOWANCE = int(0.8 * 2**30)
CARDS = 8, 12, 16, 24, 48, 80  # GB
BATCHES = 1, 2, 4, 8, 12, 16, 24, 32
ENOUGH = 4  # a batch for which no more memory is worth saving
# Between these memory is at most on the straight line, as it is a maximum of straight lines.
COMPUTED_BATCHES = 1, 8, 32
# The table's rows, and its sets of options, the fastest first.
TABLE = {
    "SD 1.5": ("sd15", 512),
    "SD 2.1": ("sd21", 768),
    "SSD-1B": ("ssd1b", 1024),
    "SDXL": ("sdxl", 1024),
}
FASTEST = ("encoded",)
LADDER = [
    ("encoded", "gradient_checkpointing"),
    ("encoded", "gradient_checkpointing", "use_8bit_adam"),
    ("encoded", "gradient_checkpointing", "use_8bit_adam", "nf4"),
]
SHORT = {"use_8bit_adam": "8bit", "nf4": "nf4"}


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make, alive; `peak` is the most."""

    def __init__(self):
        """With nothing alive."""
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count what an operation makes."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen[storage] = True
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.end, storage.nbytes())
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        return made

    def end(self, size):
        """A tensor is gone."""
        self.live -= size

    def restart(self, trained):
        """Forget the peak so far; what is alive stays counted."""
        self.peak = self.gradients = 0
        for p in trained:
            p.register_post_accumulate_grad_hook(self.add_gradient)

    def add_gradient(self, p):
        """A gradient is there."""
        self.gradients += size_of([p.grad])


class Quantized(torch.autograd.Function):
    """A quantized layer's product, with bitsandbytes' temporary tensors."""

    @staticmethod
    def forward(ctx, x, bias, shape):
        """The product, of no values."""
        ctx.shape = shape
        return torch.nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, grad):
        """The gradient of the input, of no values."""
        return grad @ grad.new_empty(ctx.shape), None, None


class QuantizedLinear(torch.nn.Linear):
    """Stands for Linear4bit."""

    def __init__(self, *size, compute_dtype, **_):
        """As bitsandbytes' layers are made."""
        super().__init__(*size, device="meta")
        self.compute_dtype = compute_dtype

    def forward(self, x):
        """The layer's output, of no values."""
        shape = self.out_features, self.in_features
        return Quantized.apply(x.to(self.compute_dtype), self.bias, shape).to(x.dtype)


def nf4_bytes(weight, *_, **__):
    """Stands for Params4bit: NF4 with its scales quantized again."""
    size = weight.numel() * 33 // 64 + 4 * -(-weight.numel() // 16384)
    return torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), False)


class Adam8bit(torch.optim.Optimizer):
    """Stands for AdamW8bit: its state, float32 for the smallest weights."""

    def __init__(self, parameters, is_paged=False, **settings):
        """As bitsandbytes' optimizer is made."""
        super().__init__(parameters, settings)

    def step(self, closure=None):
        """Make the state at the first step; no weight changes."""
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                count = p.numel()
                size = 8 * count if count < 4096 else 2 * count + 8 * math.ceil(count / 256)
                self.state[p]["both"] = torch.empty(size, dtype=torch.uint8)


def in_float32(norm):
    """A normalisation as in CUDA's autocast; a CPU's keeps the precision of its input."""

    def run(x, groups, weight=None, bias=None, eps=1e-5):
        """The normalisation."""
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (t if t is None else t.float() for t in (x, weight, bias))
        return norm(x, groups, weight, bias, eps)

    return run


@contextlib.contextmanager
def stand_ins(cuda_rules):
    """No memory, no bitsandbytes, and perhaps CUDA's rules."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_tensors())
        fakes = {"nn.Linear4bit": QuantizedLinear, "nn.Params4bit": nf4_bytes}
        fakes |= {"optim.AdamW8bit": Adam8bit}
        fakes = {f"bitsandbytes.{name}": fake for name, fake in fakes.items()}
        for name in ("group_norm", "layer_norm") if cuda_rules else ():
            norm = getattr(torch.nn.functional, name)
            fakes[f"torch.nn.functional.{name}"] = in_float32(norm)
        for name, fake in fakes.items():
            stack.enter_context(mock.patch(name, fake))
        yield


def size_of(tensors):
    """Bytes of tensors, those that share memory once."""
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def step_memory(model, resolution, batch, precision, options, more=(), real=False, cuda_rules=True):
    """{part: bytes} at the peak of a step that is not the first; "total" is their sum."""
    step = "bf16" if precision == "fp16" else precision
    with contextlib.nullcontext() if real else stand_ins(cuda_rules), LiveBytes() as counter:
        training = Training(model, resolution, batch, step, options, more)
        for p in training.trained:  # the first step makes the optimizer's state
            p.grad = torch.zeros_like(p)
        training.optimizer.step()
        training.optimizer.zero_grad()
        counter.restart(training.trained)
        training.take_step()
        pipe = training.pipe
        parts = {"base": size_of([*pipe.unet.parameters(), *pipe.unet.buffers()])}
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        others = [module for module in modules if module is not pipe.unet]
        parts["VAE and text encoders"] = size_of(t for part in others for t in part.parameters())
        parts["LoRA"] = size_of(training.trained)
        states = [t for s in training.optimizer.optimizer.state.values() for t in s.values()]
        parts["optimizer state"] = size_of(t for t in states if torch.is_tensor(t))
        parts["gradients at the peak"] = counter.gradients_at_peak
        parts["activations at the peak"] = counter.peak - sum(parts.values())
        return parts | {"total": counter.peak}


def vae_memory(model, resolution, precision, batch=None):
    """{part: bytes}: weights of VAE and text encoders; the most that the VAE's work takes beside.

    That is encoding `batch` images, by default as many as the trainers encode, and decoding one.
    """
    family, _, unet, config, encoders = describe(model)
    trainer = importlib.import_module(f"train_lcm_lora_{family}")
    dtype = trainer.DTYPES[precision]
    exact = precision == "fp16" and family == "sdxl" and config["force_upcast"]
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    side = resolution or unet["sample_size"] * factor
    kinds = CLIPTextModel, CLIPTextModelWithProjection
    with stand_ins(cuda_rules=False), LiveBytes() as counter, torch.no_grad():
        makers = [lambda c=c, kind=kind: kind(c) for c, kind in zip(encoders, kinds)]
        texts = [random_module(make, dtype, "cpu") for make in makers]
        precise = torch.float32 if exact else dtype
        vae = random_module(lambda: AutoencoderKL.from_config(config), precise, "cpu")
        vae.to(memory_format=torch.channels_last)
        weights = size_of(vae.parameters())
        parts = {"VAE": weights, "text encoders": size_of(t for m in texts for t in m.parameters())}
        pixels = torch.empty(batch or (8 if side <= 512 else 1), 3, side, side)
        z = torch.empty(1, config["latent_channels"], side // factor, side // factor, dtype=precise)
        for name, work in (
            ("encoding", lambda: trainer.encode_images(vae, pixels, batch)),
            ("decoding", lambda: vae.decode(z).sample),
        ):
            before = counter.live
            counter.peak = before
            work()
            parts[name] = counter.peak - before
    return parts


def others(step, vae):
    """{what: bytes} that a run and its preparation take beside the step; of the last two, more."""
    raw = (
        step["VAE and text encoders"] > 0
    )  # encoded data leave the VAE on the host till it decodes
    kept = step["base"] + step["LoRA"] + step["optimizer state"]
    kept += vae["VAE"] + raw * vae["text encoders"]
    return {
        "encode_data.py": vae["VAE"] + vae["text encoders"] + vae["encoding"],
        "validation": kept + max(vae["decoding"], raw * vae["encoding"]),
        "with --ema_decay, more": step["LoRA"],
        "on several GPUs, more": step["LoRA"] - step["gradients at the peak"],
    }


def needed(step, vae):
    """Bytes that a card must have room for: the most of the step, encode_data.py, validation."""
    beside, resident = others(step, vae), step["VAE and text encoders"]
    total = step["total"]
    if resident:  # an SDXL's own VAE is float32 where the step was computed with half of that
        total += vae["VAE"] + vae["text encoders"] - resident
    return max(total, beside["encode_data.py"], beside["validation"])


def fits(size):
    """Bytes with the allowance as the smallest card they fit on, in words."""
    card = next((f"{card} GB" for card in CARDS if size + ALLOWANCE <= card * 1e9), "none")
    return f"smallest card of {', '.join(map(str, CARDS))} GB: {card}"


def report(parts, beside):
    """The parts as lines, and what else there is to make room for; totals with the allowance."""
    total = parts["total"] + ALLOWANCE
    lines = parts | {"allowance": ALLOWANCE, "total with the allowance": total}
    for name, size in beside.items():
        more = name.endswith("more")  # on top of the others
        lines[name if more else f"total of {name}"] = size if more else size + ALLOWANCE
    return "\n".join(
        f"{name:26}{size / 2**30:8.2f} GiB {size / 1e9:8.2f} GB" for name, size in lines.items()
    )


def choose(curves, card, least=1):
    """(Options, largest batch) for a card of `card` GB, from {options: {batch: bytes}}.

    The fastest options that leave room for a batch of 4 and of `least`, that of a smaller card;
    where none do, those with the largest batch, the fastest first. It is 0 where nothing fits.
    """
    room, best = card * 1e9 - ALLOWANCE, []
    for options, sizes in curves.items():
        known = [batch for batch in BATCHES if batch <= max(sizes)]
        fitting = [batch for batch in known if interpolate(sizes, batch) <= room]
        best.append((options, max([0, *fitting])))
    largest = max(best, key=lambda found: found[1])
    return next((found for found in best if found[1] >= max(ENOUGH, least)), largest)


def interpolate(sizes, batch):
    """Bytes at a batch from those at some batches, on the straight line between two of them."""
    below, above = max(b for b in sizes if b <= batch), min(b for b in sizes if b >= batch)
    share = (batch - below) / (above - below) if above > below else 0
    return sizes[below] + share * (sizes[above] - sizes[below])


def cell(options, batch):
    """A cell of the table, such as `4 nf4 (c)`."""
    if not batch:
        return "no"
    return " ".join([str(batch), *(SHORT[option] for option in options if option in SHORT), "(c)"])


def row(curves, fastest):
    """A model's cells: the largest batch of each card, and the first one without checkpointing."""
    cells, least = [], 1
    for card in CARDS:
        options, least = choose(curves, card, least)
        cells.append(cell(options, least))
    without = [(card, choose({FASTEST: fastest}, card)[1]) for card in CARDS]
    first = next((f"{card} GB: {batch} (c)" for card, batch in without if batch >= ENOUGH), "no")
    return [*cells, first]


def table():
    """The table of what fits on which card, in Markdown."""
    yield "| model | " + " | ".join(f"{card} GB" for card in CARDS) + " | no `gc` from |"
    yield "|---" * (2 + len(CARDS)) + "|"
    for name, (model, side) in TABLE.items():
        vae, curves = vae_memory(model, side, "fp16"), {}
        for options in (FASTEST, *LADDER):
            # 8 bits and NF4 are for small cards, and so for small batches
            batches = COMPUTED_BATCHES[: 2 if {*SHORT} & {*options} else None]
            steps = {b: step_memory(model, side, b, "fp16", options) for b in batches}
            curves[options] = {b: needed(step, vae) for b, step in steps.items()}
        cells = row({options: curves[options] for options in LADDER}, curves[FASTEST])
        yield f"| {name}, {side} px | {' | '.join(cells)} |"


def main(argv=None):
    """Print what is asked for."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model MODEL] [--resolution PIXELS] [--batch N] [flags] | --table",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.error, add, count = fail, parser.add_argument, {"type": int, "metavar": "N"}
    add_model_flags(add)
    add("--batch", **count, default=1, help="images in a batch")
    precision = "fp16 takes what bf16 takes, but for SDXL's own VAE"
    add("--precision", choices=["no", "fp16", "bf16"], default="fp16", help=precision)
    add("--quantize_base", choices=["nf4"], help="the base's linear layers in 4 bits")
    add("--encoded", action="store_true", help="data of encode_data.py: no VAE, no text encoders")
    for option in ("gradient_checkpointing", "use_8bit_adam"):
        add(f"--{option}", action="store_true", help="as for the trainers")
    add("--lora_rank", **count, default=64, help="rank of the LoRA")
    add("--vae_encode_batch_size", **count, help="images that the VAE encodes at once")
    add("--table", action="store_true", help="print the table of cards instead")
    add("--real", action="store_true", help="take the step on a CPU too, and compare")
    args = parser.parse_args(argv)
    if min(args.batch, args.lora_rank, args.vae_encode_batch_size or 1, args.resolution or 1) < 1:
        flags = "--batch, --resolution, --lora_rank and --vae_encode_batch_size"
        fail(f"{flags} must be 1 or more")
    if args.table:
        for line in table():
            print(line, flush=True)
        return
    options = [name for name in OPTIONS if vars(args).get(name) or name == args.quantize_base]
    more = ["--lora_rank", str(args.lora_rank)]
    if args.vae_encode_batch_size:
        more += ["--vae_encode_batch_size", str(args.vae_encode_batch_size)]
    cell = args.model, args.resolution, args.batch, args.precision, options, more
    if args.real:
        with mock.patch.dict("os.environ", ACCELERATE_USE_CPU="true"):
            computed, real = (
                step_memory(*cell, real=real, cuda_rules=False)["total"] for real in (False, True)
            )
        both = (
            f"computed {computed / 2**20:.1f} MiB, counted on real tensors {real / 2**20:.1f} MiB"
        )
        print(f"by a CPU's rules: {both}, {computed / real:.3f} of it")
    parts = step_memory(*cell)
    vae = vae_memory(args.model, args.resolution, args.precision, args.vae_encode_batch_size)
    print(report(parts, others(parts, vae)), fits(needed(parts, vae)), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
