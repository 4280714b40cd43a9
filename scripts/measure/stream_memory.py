"""Memory and start of streamed training: tar shards of many small records through the trainer's own loader.

    python scripts/measure/stream_memory.py        # shards of 20,000 and of 200,000 records, half a gigabyte in a temporary folder

Prints the seconds from opening the shards to the first batch for both sizes, medians over fresh processes, and for the larger
one the resident memory after 200 and after 2,000 batches of 16. The exit code is 1 unless the memory differs by less than 5%
and the larger size starts in at most 20% more time than the smaller one. Other work on the machine makes the times useless.
"""

import argparse
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARDS, BATCH = 20, 16
MOST_GROWTH, MOST_DELAY = 0.05, 0.2


def write_shards(folder, count):
    """Tar shards with `count` records in all: 8 x 8 pictures of one colour each, and captions."""
    from PIL import Image

    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for i in range(shard, count, SHARDS):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (i % 256, i // 256 % 256, i // 65536)).save(picture, "PNG")
                for ending, data in (("png", picture.getvalue()), ("txt", f"colour {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def resident():
    """Resident memory of this process in MiB, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def read(folder, batches):
    """Print, as JSON, the seconds to the first batch and the resident memory after each of the numbers of batches."""
    sys.path.insert(0, str(ROOT))
    import train_lcm_lora_sd15 as trainer

    flags = [
        "--pretrained_teacher_model",
        "none",
        "--train_shards_path_or_url",
        folder,
        "--streaming",
    ]
    flags += ["--train_batch_size", BATCH, "--max_train_steps", max(batches), "--resolution", 8]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", type=int, nargs=2, default=[20_000, 200_000], help="in the two sets of shards"
    )
    parser.add_argument(
        "--batches", type=int, nargs=2, default=[200, 2_000], help="after which memory is read"
    )
    parser.add_argument("--repeats", type=int, default=9, help="processes for each time")
    parser.add_argument(
        "--work_dir", type=Path, help="where the shards are written (default: a temporary folder)"
    )
    parser.add_argument("--read", metavar="FOLDER", help=argparse.SUPPRESS)
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
            command = [
                sys.executable,
                __file__,
                "--read",
                Path(work, str(count)),
                "--batches",
                *batches,
            ]
            env = os.environ | {"HF_HOME": str(Path(work, "home")), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [str(word) for word in command],
                env=env,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[count].append(json.loads(done.stdout))
    start = {
        count: statistics.median(row["seconds"] for row in rows) for count, rows in results.items()
    }
    early, late = (results[large][0]["memory"][str(n)] for n in args.batches)
    growth, delay = late / early - 1, start[large] / start[small] - 1
    print(
        f"first batch: {start[small]:.3f} s of {small} records, {start[large]:.3f} s of {large} ({delay:+.1%})"
    )
    print(
        f"memory: {early:.0f} MiB after {args.batches[0]} batches, {late:.0f} MiB after {args.batches[1]} ({growth:+.1%})"
    )
    return 0 if abs(growth) < MOST_GROWTH and delay < MOST_DELAY else 1


if __name__ == "__main__":
    sys.exit(main())
