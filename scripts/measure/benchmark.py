#!/usr/bin/env python
"""Time the trainer's own training step, on a GPU or a CPU, with random weights: no downloads.

    python scripts/measure/benchmark.py    # the demo's SDXL layout
    python scripts/measure/benchmark.py --model sdxl --resolution 1024 --precision fp16 \\
        --batch 1 4 12    # for a GPU

--model is an official shape (sd15, sd21, ssd1b, sdxl) or a teacher folder, of which only the
configs are read. A cell of the grid is a batch, a precision and a set of --options, `+` between the
members; each runs in a process of its own. A cell and the same cell without one of its options are
timed in turn: what the option buys is the median of the rounds' ratios.

images/s and seconds are of whole optimizer steps without the reading of data. TFLOP are counted,
not timed: the matrix products, convolutions and attention of one step (teacher 2, target 1, student
forward and backward, fewer with trajectories; VAE and text encoders unless the data are encoded), 2
for a multiplication and its addition; what checkpointing computes again is not counted. The share
is of the rate of a large square matrix product in the same precision, timed here. Memory is CUDA's
peak of allocated tensors in the steps, on a CPU the peak of the whole process.

Writes benchmark.csv, benchmark.md and benchmark.png into --output_dir. The exit code is 1 if a cell
failed for another reason than memory.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageDraw, ImageFont
from random_training import DATA, OPTIONS, ROOT, Training, add_model_flags, fail, fake_tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

WARM_UP = 3  # steps


def data_of(options):
    """The kind of data of a cell: those of its options that leave out some of the work."""
    return tuple(option for option in options if option in DATA)


def count_flops(model, resolution, data):
    """Floating-point operations of a step for each image of its batch; nothing is computed."""
    # The matrix products of this kernel are those of attention, none made twice.
    with fake_tensors(), sdpa_kernel(SDPBackend.MATH):
        training = Training(model, resolution, 1, "no", data)
        with FlopCounterMode(display=False) as counter:
            training.take_step()
    return counter.get_total_flops()


# ------------------------------------------------------------------------------------- measurements


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory():
    """Bytes at the peak: of CUDA's tensors, whose cache is then emptied, or of the process."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 2**10 * peak


def serve(model, resolution, cell):
    """The process of a cell: for each line, a number of steps, it prints their time and memory."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    training, number = Training(model, resolution, *cell), 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # loading is no part of a step
    for line in sys.stdin:
        synchronize()
        start = time.perf_counter()
        for _ in range(int(line)):
            training.take_step(number := number + 1)
        synchronize()
        seconds = (time.perf_counter() - start) / int(line)
        answer = json.dumps({"seconds": seconds, "memory": peak_memory() / 2**30})
        print(answer, file=answers, flush=True)


class Cell:
    """A running cell of the grid."""

    def __init__(self, args, cell):
        """Start its process, and take some steps to warm up."""
        self.errors, cell = tempfile.TemporaryFile("w+"), json.dumps([args.resolution, cell])
        command = [sys.executable, __file__, "--model", args.model, "--serve", cell]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.run(WARM_UP)

    def run(self, steps):
        """Take some steps: {"seconds" a step, "memory" in GiB}; RuntimeError says why it cannot."""
        with contextlib.suppress(BrokenPipeError):  # the answer is missing then
            print(steps, file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"exit status {code}"]
        words = "OutOfMemoryError", "allocate memory"
        short = code == -9 or any(word in lines[-1] for word in words)
        raise RuntimeError("out of memory" if short else lines[-1])

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def matrix_rate(precision):
    """Floating-point operations a second of a large square matrix product, the best of some."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 1024 if device == "cpu" else 8192
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    a, times = torch.randn(size, size, device=device).to(dtype), []
    torch.set_float32_matmul_precision("highest")
    while len(times) < 20 and sum(times) < 2:
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def measure(args, cells):
    """{cell: {"error"} or {"seconds": [one a round], "memory", "gains"}}.

    The gains of a cell are {option: (ratios of time, ratio of memory)}.
    """
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
        partners = {}
        for option in cell[2]:
            other = (*cell[:2], tuple(o for o in cell[2] if o != option))
            if "seconds" in results.get(other, {}):
                partners[option] = other
        for option, other in partners.items() or [(None, None)]:
            try:
                try:
                    rounds = take_turns(*filter(None, (other, cell)))
                except RuntimeError:  # perhaps there is no room for two
                    option, rounds = None, take_turns(cell)
            except RuntimeError as error:
                result = results[cell] = {"error": str(error)}
                break
            result["seconds"] += [answers[-1]["seconds"] for answers in rounds]
            result["memory"] = rounds[-1][-1]["memory"]
            if option:
                ratios = [before["seconds"] / after["seconds"] for before, after in rounds]
                result["gains"][option] = ratios, result["memory"] / rounds[-1][0]["memory"]
        found = result.get("error") or f"{statistics.median(result['seconds']):.3f} s a step"
        name = f"batch {cell[0]}, {cell[1]}, {'+'.join(cell[2]) or 'plain'}"
        print(f"{name}: {found}", file=sys.stderr, flush=True)
    while running:
        running.popitem()[1].close()
    return results


# --------------------------------------------------------------------------------------- the report

COLUMNS = {
    "batch": "batch",
    "precision": "precision",
    "options": "options",
    "seconds": "s a step",
    "images_per_s": "images/s",
    "tflop": "TFLOP a step",
    "tflops": "TFLOP/s",
    "share": "% of the matrix rate",
    "memory_gib": "peak GiB",
    "gains": "what it buys",
}


def table_rows(results, flops, rates):
    """The rows of the table, a dict by COLUMNS for each cell."""
    for (batch, precision, options), result in results.items():
        row = {"batch": batch, "precision": precision, "options": "+".join(options) or "plain"}
        if "error" in result:
            yield dict.fromkeys(COLUMNS, "") | row | {"gains": result["error"]}
            continue
        seconds = statistics.median(result["seconds"])
        work = batch * flops[data_of(options)]
        rate = work / seconds
        gains = []
        for option, (ratios, memory) in result["gains"].items():
            faster = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            gains.append(f"{option}: {faster} times as fast, {memory:.2f} of the memory")
        yield row | {
            "seconds": f"{seconds:.4g}",
            "images_per_s": f"{batch / seconds:.4g}",
            "tflop": f"{work / 1e12:.4g}",
            "tflops": f"{rate / 1e12:.4g}",
            "share": f"{100 * rate / rates[precision]:.1f}",
            "memory_gib": f"{result['memory']:.2f}",
            "gains": "; ".join(gains),
        }


def write_plot(rows, title, path):
    """images/s of each cell as a bar."""
    font, line, left = ImageFont.load_default(14), 24, 420
    image = Image.new("RGB", (1000, line * (len(rows) + 2)), "white")
    pen, longest = ImageDraw.Draw(image), max([float(row["images_per_s"] or 0) for row in rows])
    pen.text((10, 5), title, "black", font)
    for i, row in enumerate(rows, 1):
        speed, y = float(row["images_per_s"] or 0), line * i + 5
        width = round(480 * speed / (longest or 1))
        label = f"{row['options']}, {row['precision']}, batch {row['batch']}"
        pen.text((left - 10, y), label, "black", font, anchor="ra")
        pen.rectangle((left, y, left + width, y + line - 8), "steelblue")
        pen.text((left + width + 8, y), row["images_per_s"] or row["gains"][:60], "black", font)
    image.save(path)


def write_report(args, argv, rows, rates):
    """benchmark.csv, benchmark.md and benchmark.png in the output folder; the Markdown."""
    rates = ", ".join(
        f"{rate / 1e12:.4g} TFLOP/s in {precision}" for precision, rate in rates.items()
    )
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
        model = lines[0].split(": ")[1].strip() if lines else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {gpu}"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    on_gpu = torch.cuda.is_available()
    what = "CUDA's peak of allocated tensors" if on_gpu else "the whole process's peak"
    command = shlex.join(["python", "scripts/measure/benchmark.py", *argv])
    head = f"`{command}`. Commit {commit}. {machine}. {versions}. "
    head += f"Matrix rate: {rates}. Memory: {what}."
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
    title = f"images/s, {Path(args.model).name}, {args.resolution or 'its own'} px"
    write_plot(rows, title, args.output_dir / "benchmark.png")
    return text


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model MODEL] [--resolution PIXELS] [--batch N ...] [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.error, add, count = fail, parser.add_argument, {"type": int, "metavar": "N"}
    add_model_flags(add)
    add("--batch", **count, nargs="+", default=[4], help="images in a batch")
    precisions = ["no", "bf16", "fp16"]
    add("--precision", choices=precisions, nargs="+", default=["no"], help="of the base")
    default = [name for name in OPTIONS if name != "allow_tf32"]
    cells = f"cells beside the plain one; of {', '.join(OPTIONS)}"
    add("--options", nargs="*", default=default, metavar="A+B", help=cells)
    add("--product", action="store_true", help="all combinations of the --options, not just each")
    add("--steps", **count, default=2, help="optimizer steps in a round")
    add("--rounds", **count, default=5, help="rounds in which cells side by side take turns")
    out = "gets the tables and the plot"
    add("--output_dir", type=Path, metavar="FOLDER", default="outputs/benchmark", help=out)
    add("--serve", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.steps, args.rounds, *args.batch, args.resolution or 1) < 1:
        fail("--steps, --rounds, --batch and --resolution must be 1 or more")
    sets = [option.split("+") for option in args.options]
    if unknown := {name for names in sets for name in names} - OPTIONS.keys():
        known = f"{', '.join(OPTIONS)}, with + between those of one cell"
        fail(f"--options {' '.join(sorted(unknown))}: give some of {known}")
    if args.product:
        counts = range(len(sets) + 1)
        sets = [sum(some, []) for n in counts for some in itertools.combinations(sets, n)]
    # The fewest first, so that what a cell is compared with is there before it
    sets = [tuple(option for option in OPTIONS if option in names) for names in [[], *sets]]
    args.sets = sorted(dict.fromkeys(sets), key=len)
    return args


def main(argv=None):
    """Measure the grid and write the report; the exit code."""
    args = parse_args(argv)
    if args.serve:
        resolution, cell = json.loads(args.serve)
        return serve(args.model, resolution, cell)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    kinds = {data_of(options) for options in args.sets}
    flops = {data: count_flops(args.model, args.resolution, data) for data in kinds}
    results = measure(args, [*itertools.product(args.batch, args.precision, args.sets)])
    # Others may be no precision of this machine.
    measured = dict.fromkeys(cell[1] for cell, result in results.items() if "error" not in result)
    rates = {precision: matrix_rate(precision) for precision in measured}
    rows = [*table_rows(results, flops, rates)]
    print(write_report(args, sys.argv[1:] if argv is None else argv, rows, rates))
    errors = {result["error"] for result in results.values() if "error" in result}
    return int(bool(errors - {"out of memory"}))


if __name__ == "__main__":
    sys.exit(main())
