#!/usr/bin/env python
"""Time the trainer's own training step, on a GPU or a CPU, with random weights: nothing is downloaded.

    python scripts/benchmark.py                                                              # the demo's SDXL layout
    python scripts/benchmark.py --model sdxl --resolution 1024 --precision bf16 --batch 1 4 12        # for a GPU

--model is an official shape (sd15, sd21, ssd1b, sdxl) or a teacher folder, of which only the configs are read. A cell of the grid is a
batch, a precision and a set of --options, `+` between the members; each runs in a process of its own. A cell and the same cell
without one of its options stand side by side and are timed in turn: what the option buys is the median of the rounds' ratios.

images/s and seconds are of whole optimizer steps without the reading of data. TFLOP are counted, not timed: the matrix products,
convolutions and attention of one step (teacher 2, target 1, student forward and backward; VAE and text encoders where they run),
2 for a multiplication and its addition; what checkpointing computes again is not counted. The share is of the rate of a large square
matrix product in the same precision, timed here. Memory is CUDA's peak of allocated tensors, on a CPU the peak of the whole process.

Writes benchmark.csv, benchmark.md and benchmark.png into --output_dir. The exit code is 1 if a cell failed for another reason
than memory.
"""

import argparse
import csv
import importlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from evaluate import provenance
from full_size import ROOT, SD15, UNETS, random_module
from PIL import Image, ImageDraw, ImageFont
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(ROOT))  # the trainers

SD21 = SD15 | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
MODELS = UNETS | {"sd21": SD21 | {"use_linear_projection": True}}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "sample_size": 512,
}  # fmt: skip
# Width and layers of the text encoders.
ENCODERS = {
    "sd15": [(768, 12)],
    "sd21": [(1024, 23)],
    "sdxl": [(768, 12), (1280, 32)],
    "ssd1b": [(768, 12), (1280, 32)],
}
# What can be switched on, and the trainer's flags for it.
OPTIONS = {
    "caches": ["--cache_latents", "--cache_text_embeddings"],
    "gradient_checkpointing": ["--gradient_checkpointing"],
    "torch_compile": ["--torch_compile"],
    "nf4": ["--quantize_base", "nf4"],
    "int8": ["--quantize_base", "int8"],
    "use_8bit_adam": ["--use_8bit_adam"],
    "allow_tf32": ["--allow_tf32"],
}
WARM_UP = 3  # steps


def fail(message):
    """End with one line and exit status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


# ------------------------------------------------------------------------------------------ the step that is timed


def check_model(name):
    """An argparse type: an official shape or a teacher folder."""
    if name not in MODELS and not Path(name, "model_index.json").is_file():
        fail(f"--model {name}: give {', '.join(MODELS)} or a teacher folder with model_index.json")
    return name


def describe(model):
    """(family, folder of tokenizers and scheduler, config of the UNet, of the VAE, configs of the text encoders)."""
    if model not in MODELS:
        family = "sdxl" if "XL" in DiffusionPipeline.load_config(model)["_class_name"] else "sd15"
        unet, vae = (
            UNet2DConditionModel.load_config(model, subfolder="unet"),
            AutoencoderKL.load_config(model, subfolder="vae"),
        )
        folders = ["text_encoder", "text_encoder_2"][: 1 + (family == "sdxl")]
        return (
            family,
            Path(model),
            unet,
            vae,
            [CLIPTextConfig.from_pretrained(model, subfolder=name) for name in folders],
        )
    family = "sdxl" if len(ENCODERS[model]) == 2 else "sd15"
    encoders = [
        CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=width, vocab_size=49408, max_position_embeddings=77,
        )
        for width, layers in ENCODERS[model]
    ]  # fmt: skip
    return family, ROOT / f"demo/teacher-{family}", MODELS[model], VAE | {"force_upcast": family == "sdxl"}, encoders


def random_pipe(model, dtype, device, cached):
    """A pipeline as the trainer's load_teacher gives it, but of random weights, which need no loading."""
    family, folder, unet, vae, encoders = describe(model)
    parts = {"scheduler": DDIMScheduler.from_pretrained(folder, subfolder="scheduler")}
    parts["unet"] = random_module(lambda: UNet2DConditionModel.from_config(unet), dtype, device)
    # As there: SDXL's VAE is float32 where the base is fp16; of one whose latents are cached only the config is needed
    exact = dtype == torch.float16 and family == "sdxl" and vae["force_upcast"]
    where = "meta" if cached else device
    parts["vae"] = random_module(lambda: AutoencoderKL.from_config(vae), torch.float32 if exact else dtype, where)
    kinds = CLIPTextModel, CLIPTextModelWithProjection
    for name, config, kind in zip(("text_encoder", "text_encoder_2"), encoders, kinds):
        length = config.max_position_embeddings
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=name.replace("text_encoder", "tokenizer"))
        tokenizer.model_max_length = length
        config.eos_token_id = tokenizer.eos_token_id
        parts[name.replace("text_encoder", "tokenizer")] = tokenizer
        parts[name] = None if cached else random_module(lambda c=config, k=kind: k(c), dtype, device)
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


class Training:
    """All that a training step needs, made by the trainer's own functions; `step` takes one, and data are random."""

    def __init__(self, model, resolution, batch, precision, options, more=()):
        family, *_ = describe(model)
        self.trainer = trainer = importlib.import_module(f"train_lcm_lora_{family}")
        flags = [
            "--pretrained_teacher_model",
            model,
            "--train_data_dir",
            "none",
            "--report_to",
            "none",
            "--center_crop",
        ]
        flags += [
            "--train_batch_size",
            str(batch),
            "--mixed_precision",
            precision,
            "--max_train_steps",
            "1000000",
            *more,
        ]
        self.args = args = trainer.parse_args(flags + [flag for option in options for flag in OPTIONS[option]])
        AcceleratorState._reset_state(True)
        self.accelerator = trainer.make_accelerator(args)
        device, dtype = self.accelerator.device, trainer.DTYPES[precision]
        torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
        self.cached = ["vae", *trainer.TEXT_ENCODERS] if "caches" in options else []
        self.pipe = pipe = random_pipe(model, dtype, device, self.cached)
        self.teacher, args.resolution = pipe.unet, resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
        if args.resolution % pipe.vae_scale_factor:
            fail(f"--resolution {args.resolution}: it must be a multiple of the VAE's factor, {pipe.vae_scale_factor}")
        self.schedule = trainer.NoiseSchedule(pipe.scheduler.config, device)
        self.target = trainer.make_student(pipe, args, device, self.cached)
        self.trained = [p for p in self.target.parameters() if p.requires_grad]
        self.timesteps = trainer.ddim_timesteps(args.num_ddim_timesteps, len(self.schedule.alpha)).to(device)
        self.batch, self.c_null = self.random_batch(batch, dtype)
        optimizer, _ = trainer.make_optimizer(self.trained, args)
        self.student, self.optimizer = self.accelerator.prepare(self.target, optimizer)

    def random_batch(self, size, dtype):
        """(a batch as the trainer's loader gives it, the conditions of the empty prompt)."""
        side, device, config = self.args.resolution, self.accelerator.device, self.teacher.config
        batch = {"place": list(range(size))}
        if config.addition_embed_type == "text_time":
            batch["time_ids"] = torch.tensor([[side, side, 0, 0, side, side]] * size)
        if not self.cached:
            batch |= {"pixels": torch.rand(size, 3, side, side) * 2 - 1, "caption": ["a red apple on a table"] * size}
            return batch, self.trainer.encode_captions(self.pipe, [""])
        side //= self.pipe.vae_scale_factor
        shapes = {"prompt": (self.pipe.tokenizer.model_max_length, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            sizes = 6 * config.addition_time_embed_dim
            shapes["text_embeds"] = (config.projection_class_embeddings_input_dim - sizes,)
        c = {name: torch.randn(size, *shape).to(dtype) for name, shape in shapes.items()}
        moments = torch.randn(size, 2 * config.in_channels, side, side).to(dtype)
        return batch | c | {"moments": moments}, {name: value[:1].to(device) for name, value in c.items()}

    def step(self, number=0):
        """One optimizer step: (loss, gradient norm, whether they are finite)."""
        trainer, args = self.trainer, self.args
        drawn = trainer.draw_batch(self.pipe, self.batch, self.c_null, self.timesteps, number, args)
        loss = trainer.distillation_loss(self.teacher, self.student, self.target, *drawn, self.schedule, args)
        self.accelerator.backward(loss)
        return trainer.optimizer_step(self.accelerator, self.optimizer, self.trained, [loss.detach()], args)


class Fetched(TorchDispatchMode):
    """Numbers that a step fetches from its tensors are 1 where the tensors hold none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_tensors():
    """Tensors made within have shapes and types but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), Fetched():
        yield


def count_flops(model, resolution, cached):
    """Floating-point operations of a step for each picture of its batch, counted without computing anything."""
    with fake_tensors(), sdpa_kernel(SDPBackend.MATH):  # its matrix products are those of attention, none made twice
        training = Training(model, resolution, 1, "no", ["caches"] * cached)
        with FlopCounterMode(display=False) as counter:
            training.step()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------- measurements


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(model, resolution, cell):
    """The process of a cell: each line it reads is a number of steps, and is answered with seconds a step and peak memory."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    training, number = Training(model, resolution, *cell), 0
    for line in sys.stdin:
        synchronize()
        start = time.perf_counter()
        for _ in range(int(line)):
            training.step(number := number + 1)
        synchronize()
        seconds = (time.perf_counter() - start) / int(line)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # for the cell that is next
        print(json.dumps({"seconds": seconds, "memory": memory / 2**30}), file=answers, flush=True)


class Cell:
    """A running cell of the grid."""

    def __init__(self, args, cell):
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--model", args.model, "--serve", json.dumps([args.resolution, cell])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.run(WARM_UP)

    def run(self, steps):
        """Take some steps: {"seconds" a step, "memory" in GiB}; RuntimeError says why it cannot."""
        try:
            print(steps, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer is missing then
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"exit status {code}"]
        short = code == -9 or "OutOfMemoryError" in lines[-1] or "not enough memory" in lines[-1]
        raise RuntimeError("out of memory" if short else lines[-1])

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def matrix_rate(precision):
    """Floating-point operations a second of a large square matrix product here, the best of some."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, dtype = (
        (8192, 1024)[device == "cpu"],
        {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision],
    )
    a, times = torch.randn(size, size, device=device).to(dtype), []
    torch.set_float32_matmul_precision("highest")
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def measure(args, cells):
    """{cell: {"error"} or {"seconds": [one a round], "memory", "gains": {option: [ratios of time, ratio of memory]}}}."""
    results, running = {}, {}

    def take_turns(*wanted):
        """Time cells side by side, round after round: for each round their answers."""
        for cell in running.keys() - {*wanted}:
            running.pop(cell).close()
        try:
            for cell in wanted:
                running[cell] = running.get(cell) or Cell(args, cell)
            return [[running[cell].run(args.steps) for cell in wanted] for _ in range(args.rounds)]
        except RuntimeError:
            while running:
                running.popitem()[1].close()
            raise

    for cell in cells:
        result = results[cell] = {"seconds": [], "gains": {}}
        partners = {option: (*cell[:2], tuple(o for o in cell[2] if o != option)) for option in cell[2]}
        partners = {option: other for option, other in partners.items() if "seconds" in results.get(other, {})}
        for option, other in partners.items() or [(None, None)]:
            try:
                rounds = take_turns(other, cell) if option else take_turns(cell)
            except RuntimeError as error:
                try:  # perhaps there was no room for two
                    option, rounds = None, take_turns(cell) if option else []
                except RuntimeError as alone:
                    error, rounds = alone, []
                if not rounds:
                    results[cell] = {"error": str(error)}
                    break
            result["seconds"] += [answers[-1]["seconds"] for answers in rounds]
            result["memory"] = rounds[-1][-1]["memory"]
            if option:
                ratios = [before["seconds"] / after["seconds"] for before, after in rounds]
                result["gains"][option] = ratios, result["memory"] / rounds[-1][0]["memory"]
        print(
            describe_cell(cell),
            results[cell].get("error") or f"{statistics.median(result['seconds']):.3f} s a step",
            flush=True,
        )
    while running:
        running.popitem()[1].close()
    return results


# ------------------------------------------------------------------------------------------------------ the report

COLUMNS = {
    "batch": "batch", "precision": "precision", "options": "options", "seconds": "s a step", "images_per_s": "images/s",
    "tflop": "TFLOP a step", "tflops": "TFLOP/s", "share": "% of the matrix rate", "memory_gib": "peak GiB", "gains": "what it buys",
}  # fmt: skip


def describe_cell(cell):
    """A cell in words."""
    return f"batch {cell[0]}, {cell[1]}, {'+'.join(cell[2]) or 'plain'}:"


def table_rows(results, flops, rates):
    """The rows of the table, a dict by COLUMNS for each cell."""
    for (batch, precision, options), result in results.items():
        row = {"batch": batch, "precision": precision, "options": "+".join(options) or "plain"}
        if "error" in result:
            yield dict.fromkeys(COLUMNS, "") | row | {"gains": result["error"]}
            continue
        seconds, work = statistics.median(result["seconds"]), batch * flops["caches" in options]
        row |= {"seconds": f"{seconds:.4g}", "images_per_s": f"{batch / seconds:.4g}", "tflop": f"{work / 1e12:.4g}"}
        row |= {"tflops": f"{work / seconds / 1e12:.4g}", "share": f"{100 * work / seconds / rates[precision]:.1f}"}
        gains = (
            f"{option}: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times as fast, {memory:.2f} of the memory"
            for option, (ratios, memory) in result["gains"].items()
        )
        yield row | {"memory_gib": f"{result['memory']:.2f}", "gains": "; ".join(gains)}


def write_plot(rows, title, path):
    """images/s of each cell as a bar."""
    font, line, left = ImageFont.load_default(14), 24, 420
    picture = Image.new("RGB", (1000, line * (len(rows) + 2)), "white")
    draw, longest = ImageDraw.Draw(picture), max([float(row["images_per_s"] or 0) for row in rows] + [1e-9])
    draw.text((10, 5), title, "black", font)
    for i, row in enumerate(rows, 1):
        speed, y = float(row["images_per_s"] or 0), line * i + 5
        width = round(480 * speed / longest)
        draw.text(
            (left - 10, y), f"{row['options']}, {row['precision']}, batch {row['batch']}", "black", font, anchor="ra"
        )
        draw.rectangle((left, y, left + width, y + line - 8), "steelblue")
        draw.text((left + width + 8, y), row["images_per_s"] or row["gains"][:60], "black", font)
    picture.save(path)


def write_report(args, argv, rows, rates):
    """benchmark.csv, benchmark.md and benchmark.png in the output folder; the Markdown."""
    rates = ", ".join(f"{rate / 1e12:.4g} TFLOP/s in {precision}" for precision, rate in rates.items())
    about = provenance(argv, "scripts/benchmark.py").strip().replace("\n\n", " ")
    what = "CUDA's peak of allocated tensors" if torch.cuda.is_available() else "the whole process's peak"
    head = f"{about} {torch.get_num_threads()} threads. Matrix rate: {rates}. Memory: {what}."
    lines = [
        " | ".join(COLUMNS.values()),
        " | ".join("---" for _ in COLUMNS),
        *(" | ".join(map(str, row.values())) for row in rows),
    ]
    text = f"{head}\n\n" + "".join(f"| {line} |\n" for line in lines)
    (args.output_dir / "benchmark.md").write_text(text)
    with (args.output_dir / "benchmark.csv").open("w", newline="") as file:
        file.write(f"# {head}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_plot(rows, f"images/s, {args.model}, {args.resolution or 'its own'} px", args.output_dir / "benchmark.png")
    return text


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add(
        "--model",
        type=check_model,
        default=str(ROOT / "demo/teacher-sdxl"),
        help=f"{', '.join(MODELS)}, or a teacher folder",
    )
    add("--resolution", type=int, help="side of the pictures in pixels (default: what the teacher draws)")
    add("--batch", type=int, nargs="+", default=[4], help="pictures in a batch")
    add("--precision", choices=["no", "bf16", "fp16"], nargs="+", default=["no"])
    default = [name for name in OPTIONS if name != "allow_tf32"]
    add("--options", nargs="*", default=default, metavar="A+B", help=f"beside the plain cell; of {', '.join(OPTIONS)}")
    add("--product", action="store_true", help="all combinations of the --options, instead of each of them")
    add("--steps", type=int, default=2, help="optimizer steps in a round")
    add("--rounds", type=int, default=5, help="rounds in which cells side by side take turns")
    add("--output_dir", type=Path, default="outputs/benchmark", help="the tables and the plot")
    add("--serve", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.steps, args.rounds, *args.batch, args.resolution or 1) < 1:
        fail("--steps, --rounds, --batch and --resolution must be 1 or more")
    sets = [option.split("+") for option in args.options]
    if unknown := {name for names in sets for name in names} - OPTIONS.keys():
        fail(
            f"--options {' '.join(sorted(unknown))}: give some of {', '.join(OPTIONS)}, with + between those of one cell"
        )
    if args.product:
        sets = [sum(some, []) for n in range(len(sets) + 1) for some in itertools.combinations(sets, n)]
        sets = [names for names in sets if not {"nf4", "int8"} <= {*names}]
    if clash := [names for names in sets if {"nf4", "int8"} <= {*names}]:
        fail(f"--options {'+'.join(clash[0])}: the base is in 4 bits or in 8; give one of nf4 and int8")
    # The fewest first, so that what a cell is compared with is there before it
    args.sets = sorted({tuple(name for name in OPTIONS if name in names) for names in [[], *sets]}, key=len)
    return args


def main(argv=None):
    """Measure the grid and write the report; the exit code."""
    args = parse_args(argv)
    if args.serve:
        resolution, cell = json.loads(args.serve)
        return serve(args.model, resolution, cell)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    flops = {cached: count_flops(args.model, args.resolution, cached) for cached in {"caches" in s for s in args.sets}}
    rates = {precision: matrix_rate(precision) for precision in args.precision}
    results = measure(args, [*itertools.product(args.batch, args.precision, args.sets)])
    rows = [*table_rows(results, flops, rates)]
    print(write_report(args, sys.argv[1:] if argv is None else argv, rows, rates))
    return int(any(result.get("error", "out of memory") != "out of memory" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
