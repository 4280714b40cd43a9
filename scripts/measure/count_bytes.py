#!/usr/bin/env python
"""Bytes moved and kernels started by a training step on a GPU, counted without one, by pass.

    python scripts/measure/count_bytes.py --model sdxl --resolution 1024 --batch 4
    python scripts/measure/count_bytes.py --model sd15 --resolution 512 --batch 12

Most operations of a step compute little and wait for memory, so the bytes that they read and write
say more about its time than its products do. The trainer's own step runs on tensors that have
shapes but no memory, and each operation counts with the bytes of its inputs and outputs, as if
nothing stayed in the GPU's caches; views are free. A kernel is an operation that moves bytes.

As in memory.py they are a CPU's tensors with rules of CUDA's. To its two (autocast normalises in
float32, attention never stores the L x L matrix) come those that move bytes: GroupNorm wants its
input with the channels first, a convolution copies what has not the layout of its weight, and a
product that is added to a matrix copies that first, unless it is added in place.

The data are encoded. Not counted: the batch, the loss and the optimizer, what a compiler would
fuse, workspaces of libraries, and the 4 bits of a quantized base.
"""

import argparse
import contextlib
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from memory import stand_ins
from random_training import OPTIONS, Training, add_model_flags, fail
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

PASSES = "teacher", "target", "student forward", "backward"
KINDS = {
    "products": "mm addmm bmm baddbmm convolution attention",
    "norms": "group_norm layer_norm",
    "casts and copies": "_to_copy copy_ clone contiguous",
}
OVERWRITTEN = "copy_ fill_ zero_ normal_ uniform_".split()  # these do not read what they write to


def kind_of(name):
    """The kind of an operation, by the words in its name."""
    for kind, words in KINDS.items():
        if any(word in name for word in words.split()):
            return kind
    return "elementwise"


def size_of(tensor):
    """The bytes of a tensor that an operation reads or writes, those of an expanded one once."""
    sizes = [size for size, step in zip(tensor.shape, tensor.stride()) if step]
    return math.prod(sizes) * tensor.element_size()


def tensors(tree):
    """The tensors in arguments or results, each once."""
    return {id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}


def layout_copies(args):
    """Bytes that a convolution moves before it computes: what has not the layout of its weight."""
    maps = [t for t in args if isinstance(t, torch.Tensor) and t.ndim > 3]
    others = [t for t in maps if not t.is_contiguous(memory_format=torch.channels_last)]
    return [2 * size_of(t) for t in others] if len(others) < len(maps) else []


class BytesMoved(TorchDispatchMode):
    """Adds up bytes and kernels by (pass, kind); `now` is the pass, or None."""

    def __init__(self):
        """With nothing counted."""
        super().__init__()
        self.bytes, self.kernels, self.now = Counter(), Counter(), None

    def add(self, kind, size):
        """A kernel of a kind."""
        self.bytes[self.now, kind] += size
        self.kernels[self.now, kind] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count an operation, by its name and by what of its arguments it changes."""
        made, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        given, results = tensors((args, kwargs)), tensors(made)
        names = zip(func._schema.arguments, args, strict=False)
        changed = tensors([arg for about, arg in names if about.is_write])
        storages = {t.untyped_storage()._cdata for t in given.values()}
        is_view = all(t.untyped_storage()._cdata in storages for t in results.values())
        if name.startswith("empty") or name.startswith("new_empty") or is_view and not changed:
            return made
        read = given.keys() - changed.keys() if name in OVERWRITTEN else given.keys()
        read, written = [given[i] for i in read], (results | changed).values()
        self.add(kind_of(name), sum(map(size_of, [*read, *written])))
        copies = layout_copies(args) if name.startswith("convolution") else []
        if name in ("addmm", "baddbmm") and args[0].ndim == made.ndim:
            copies = [2 * size_of(made)]
        for size in copies:
            self.add("casts and copies", size)
        return made

    @contextlib.contextmanager
    def during(self, name):
        """All of a block belongs to this pass."""
        self.now, before = name, self.now
        try:
            yield
        finally:
            self.now = before

    def table(self):
        """{row: (kernels, bytes, {kind: bytes})} of the passes and their sum."""
        kinds = [*KINDS, "elementwise"]
        groups = {name: [name] for name in PASSES} | {"sum": PASSES}
        return {
            row: (
                sum(self.kernels[name, kind] for name in names for kind in kinds),
                sum(self.bytes[name, kind] for name in names for kind in kinds),
                {kind: sum(self.bytes[name, kind] for name in names) for kind in kinds},
            )
            for row, names in groups.items()
        }


def channels_first(norm):
    """GroupNorm as CUDA has it: of the channels-first copy of its input."""
    return lambda x, *more, **options: norm(x.contiguous(), *more, **options)


def count_step(model, resolution, batch, precision, options=(), more=()):
    """`BytesMoved.table` of one step."""
    with stand_ins(True), contextlib.ExitStack() as stack:
        counter, patch = BytesMoved(), mock.patch.object
        functional = torch.nn.functional
        norm = channels_first(functional.group_norm)
        stack.enter_context(patch(functional, "group_norm", norm))
        training = Training(model, resolution, batch, precision, ["encoded", *options], more)
        predict, backward = training.trainer.predict, training.accelerator.backward

        def counted_predict(unet, *given):
            name = "teacher" if unet is training.teacher else PASSES[1 + torch.is_grad_enabled()]
            with counter.during(name):
                return predict(unet, *given)

        def counted_backward(loss):
            with counter.during("backward"):
                backward(loss)

        stack.enter_context(patch(training.trainer, "predict", counted_predict))
        stack.enter_context(patch(training.accelerator, "backward", counted_backward))
        stack.enter_context(counter)
        training.take_step()
        return counter.table()


def report(table):
    """The table in Markdown; GB are 10^9 bytes."""
    kinds = list(table["sum"][2])
    yield f"| pass | kernels | GB moved | {' | '.join(kinds)} |"
    yield "|---" + "|---:" * (2 + len(kinds)) + "|"
    for row, (kernels, size, parts) in table.items():
        cells = " | ".join(f"{part / 1e9:.1f}" for part in parts.values())
        yield f"| {row} | {kernels:,} | {size / 1e9:.1f} | {cells} |"


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model MODEL] [--resolution PIXELS] [--batch N] [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.error, add, count = fail, parser.add_argument, {"type": int, "metavar": "N"}
    add_model_flags(add)
    add("--batch", **count, default=1, help="images in a batch")
    add("--precision", choices=["no", "fp16", "bf16"], default="bf16", help="as for the trainers")
    add("--lora_rank", **count, default=64, help="rank of the LoRA")
    for option in ("gradient_checkpointing", "nf4", "use_8bit_adam"):
        add(f"--{option}", action="store_true", help="as for memory.py")
    args = parser.parse_args(argv)
    if min(args.batch, args.lora_rank, args.resolution or 1) < 1:
        fail("--batch, --resolution and --lora_rank must be 1 or more")
    options = [name for name in OPTIONS if vars(args).get(name)]
    more = ["--lora_rank", str(args.lora_rank)]
    table = count_step(args.model, args.resolution, args.batch, args.precision, options, more)
    print(*report(table), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
