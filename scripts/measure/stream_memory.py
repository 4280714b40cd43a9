"""Memory and start of streamed training: tar shards of many small records, by the trainer's loader.

    python scripts/measure/stream_memory.py    # half a gigabyte in a temporary folder

Shards of 20,000 and of 200,000 records. Prints the seconds from opening the shards to the first
batch for both sizes, medians over fresh processes, and for the larger one the resident memory after
200 and after 2,000 batches of 16. The exit code is 1 unless the memory differs by less than 5% and
the larger size starts in at most 20% more time than the smaller one. Other work on the machine
makes the times useless.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the trainers, help_formatter.py
from help_formatter import HelpFormatter

SHARDS, BATCH = 20, 16
MOST_GROWTH, MOST_DELAY = 0.05, 0.2


def write_shards(folder, count):
    """Tar shards with `count` records in all: 8 x 8 images of one colour each, and captions."""
    from PIL import Image

    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for i in range(shard, count, SHARDS):
                image, colour = io.BytesIO(), (i % 256, i // 256 % 256, i // 65536)
                Image.new("RGB", (8, 8), colour).save(image, "PNG")
                for ending, data in (("png", image.getvalue()), ("txt", f"colour {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def resident():
    """Resident memory of this process in MiB, now."""
    return psutil.Process().memory_info().rss / 2**20


def read(folder, batches):
    """Print, as JSON, the seconds to the first batch and the memory after numbers of batches."""
    import train_lcm_lora_sd15 as trainer

    flags = ["--pretrained_teacher_model", "none", "--train_shards_path_or_url", folder]
    flags += ["--streaming", "--train_batch_size", BATCH, "--resolution", 8]
    flags += ["--max_train_steps", max(batches)]
    args = trainer.parse_args([str(word) for word in flags])
    start, memory = time.perf_counter(), {}
    loader = iter(trainer.make_loader(trainer.load_records(args), None, args, 0, 0, 1))
    first = next(loader)
    seconds = time.perf_counter() - start
    for i, batch in enumerate(itertools.chain([first], loader), 1):
        if len(batch["caption"]) != BATCH:
            sys.exit(f"{folder}: batch {i} has not {BATCH} records")
        if i in batches:
            memory[i] = resident()
    print(json.dumps({"seconds": seconds, "memory": memory}))


def main(argv=None):
    """Write the shards, read them in other processes, report; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add, count = parser.add_argument, {"type": int, "metavar": "N"}
    add("--records", **count, nargs=2, default=[20_000, 200_000], help="in the two sets of shards")
    add("--batches", **count, nargs=2, default=[200, 2_000], help="after which memory is read")
    add("--repeats", **count, default=9, help="processes for each time")
    where = "where the shards are written (default: a temporary folder)"
    add("--work_dir", type=Path, metavar="FOLDER", help=where)
    add("--read", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read:
        read(args.read, args.batches)
        return 0
    results = {count: [] for count in args.records}
    small, large = args.records
    with tempfile.TemporaryDirectory(dir=args.work_dir) as work:
        for count in results:
            write_shards(Path(work, str(count)), count)
        for i, count in itertools.product(range(args.repeats), results):
            batches = (
                args.batches if count == large and i == 0 else [1, 1]
            )  # else the start is enough
            shards = Path(work, str(count))
            command = [sys.executable, __file__, "--read", shards, "--batches", *batches]
            command = [str(word) for word in command]
            env = os.environ | {"HF_HOME": str(Path(work, "home")), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            results[count].append(json.loads(done.stdout))
    start = {
        count: statistics.median(row["seconds"] for row in rows) for count, rows in results.items()
    }
    early, late = (results[large][0]["memory"][str(n)] for n in args.batches)
    growth, delay = late / early - 1, start[large] / start[small] - 1
    times = f"{start[small]:.3f} s of {small} records, {start[large]:.3f} s of {large}"
    print(f"first batch: {times} ({delay:+.1%})")
    first, last = args.batches
    memory = f"{early:.0f} MiB after {first} batches, {late:.0f} MiB after {last}"
    print(f"memory: {memory} ({growth:+.1%})")
    return 0 if abs(growth) < MOST_GROWTH and delay < MOST_DELAY else 1


if __name__ == "__main__":
    sys.exit(main())
