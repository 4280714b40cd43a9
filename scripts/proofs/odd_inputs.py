#!/usr/bin/env python
"""Give the programs what people give them: each case ends in a right result or one clear line.

    python scripts/proofs/odd_inputs.py                       # 200 cases; exit code 0 if all hold
    python scripts/proofs/odd_inputs.py --seed 7              # other inputs of the same kinds
    python scripts/proofs/odd_inputs.py --only teachers --cases 20 --keep runs/inputs

A case is a file or a command line of one kind: LoRAs in other tools' namings, broken headers, data
folders, tars and tables, images in all modes and formats, damaged teachers, resumed runs with other
flags, variables of the environment, paths, prompts. It holds if the program exits with 0 and the
result is right where that is known (the same image as with the plain file, the right images and
captions, the right colours, all steps), or with another code and one line `error: ...` that names
the flag or the file. It fails on a traceback, a crash, a hang, a wrong result, a file that is not
whole, and on anything written where nobody asked for it. Teachers are random and tiny; the
libraries are loaded once, each command then runs in a fork of this process.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import odd_kinds
import psutil
from help_formatter import HelpFormatter
from PIL import Image

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for kernels, unused here
LIMIT, MEMORY = 120, 6 * 2**30  # seconds and bytes of a command


# ----------------------------------------------------------------------------------- Run and judge


def fork(function):
    """Start a function in a process of its own, which it ends with an exit code; its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = function() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
        os._exit(code)


def program(words, folder, case, pipes):
    """Run a program as `python PROGRAM WORDS` would in this folder; its exit code."""
    os.setsid()
    for number, (reader, writer) in enumerate(pipes, 1):
        os.dup2(writer, number)
        os.close(reader)
    for name, value in case.env.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (
        open(number, "w", 1, encoding, errors, closefd=False)
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = psutil.Process()
    process.rlimit(psutil.RLIMIT_DATA, (MEMORY, MEMORY))
    if case.file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        process.rlimit(psutil.RLIMIT_FSIZE, (case.file_limit,) * 2)
    os.chdir(folder)
    path = ROOT / words[0]
    sys.argv, sys.path[0] = [str(path), *map(str, words[1:])], str(path.parent)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 255
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(*sys.exc_info())  # a program may have its own, for Ctrl-C and closed pipes
        return 130 if isinstance(error, KeyboardInterrupt) else 1


def run(words, folder, case, interrupt=""):
    """Run a program: (exit code, or minus the signal that ended it, or None; stdout; stderr)."""
    pipes, texts, code = [os.pipe(), os.pipe()], [b"", b""], None
    pid, end = fork(lambda: program(words, folder, case, pipes)), time.monotonic() + LIMIT
    for reader, writer in pipes:
        os.close(writer)
        os.set_blocking(reader, False)
    if case.closed:
        os.close(pipes.pop(0)[0])
    while code is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        for i, (reader, _) in enumerate(reversed(pipes)):
            with contextlib.suppress(BlockingIOError):
                while part := os.read(reader, 2**16):
                    texts[1 - i] += part
        if ended:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        elif interrupt and [*folder.glob(interrupt)]:
            os.kill(pid, signal.SIGINT)
            interrupt = ""
        else:
            time.sleep(0.01)
    for reader, _ in pipes:
        os.close(reader)
    return code, *(text.decode(errors="replace") for text in texts)


def files(folder):
    """{path: its size and time of writing} of all files and links under a folder."""
    found = {}
    for where, _, names in os.walk(os.fsencode(folder)):
        for name in names:
            about = os.lstat(os.path.join(where, name))
            path = os.fsdecode(os.path.relpath(os.path.join(where, name), os.fsencode(folder)))
            found[path] = about.st_size, about.st_mtime_ns
    return found


def not_whole(path):
    """What is wrong with a file that a program has written, "" if it is whole."""
    import safetensors.torch

    if ".part" in str(path):
        return f"{path.name} is left over"
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8")
            for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(part, parse_constant=lambda name: int(name))  # NaN is no JSON
    except Exception as error:
        return f"{path.name} is not whole ({type(error).__name__})"
    return ""


def judge_command(case, words, folder, last):
    """Run one command; (its exit code, its text, what is wrong with how it ended)."""
    code, out, err = run(words, folder, case, case.interrupt * last)
    with open(f"{folder}.txt", "a") as file:  # for who reads what --keep has kept
        print("$", *map(repr, words), f"\n{out}{err}", file=file)
    text, lines = out + err, re.split(r"[\r\n]", err)
    errors = [line for line in lines if re.search(r"(^|: )error: ", line)]
    if code is None:
        return code, text, f"a hang: no end after {LIMIT} s"
    if "Traceback (most recent" in text or "\nKeyboardInterrupt" in text:
        where = re.findall(r'File "[^"]*?([\w.]+)", line (\d+)', text)[-1:]
        kind = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
        return code, text, f"a traceback, at {where}: {' '.join(kind[-1:])}"
    if code < 0 or code > 128 and not case.interrupt and code not in case.fails_with:
        return code, text, f"a crash: exit code {code}"
    if case.must == "refuse" and last and code == 0:
        return code, text, "not refused"
    if code == 0 or code in case.fails_with or case.interrupt and code == 130:
        return code, text, ""
    if len(errors) != 1:
        return code, text, f"exit code {code} with {len(errors)} lines of errors"
    if case.must == "work" or not last:
        return code, text, f"refused: {errors[0]}"
    if case.names and not any(str(name) in errors[0] for name in case.names):
        return code, text, f"the line has none of {', '.join(map(str, case.names))}: {errors[0]}"
    return code, text, ""


def judge(case, folder):
    """Run a case and look at all that it left behind: what is wrong, "" if nothing."""
    before, shared, text, code = files(folder), files(odd_kinds.SHARED), "", 0
    for number, words in enumerate(case.commands, 1):
        lora = files(folder).get(f"out/{odd_kinds.LORA}")
        code, text, wrong = judge_command(case, words, folder, number == len(case.commands))
        if wrong:
            return wrong
        if code and lora and lora != files(folder).get(f"out/{odd_kinds.LORA}"):
            return "refused, but the LoRA that was there is another"
    after = files(folder)
    new = [path for path in after.keys() | before.keys() if after.get(path) != before.get(path)]
    places = tuple(case.outputs)
    outside = [path for path in new if not f"{path}/".startswith(tuple(f"{p}/" for p in places))]
    if outside or shared != files(odd_kinds.SHARED):
        return f"written or changed elsewhere: {(sorted(outside) or ['what all cases share'])[0]!r}"
    broken = [why for path in new if path in after and (why := not_whole(folder / path))]
    if broken:
        return broken[0]
    return case.check(folder, text) if case.check and code == 0 or case.interrupt else ""


def set_up():
    """Make what all cases share: the exit code."""
    quiet, shared = odd_kinds.Case("", []), odd_kinds.SHARED
    odd_kinds.write_images(shared / "images", [f"{i}.png" for i in range(6)])
    for family in "sd15", "sdxl":
        odd_kinds.make_teacher(family, shared / family)
        for words in (
            odd_kinds.train("--output_dir", shared / f"run-{family}", family=family),
            odd_kinds.infer("--output", shared / f"{family}.png", family=family),
            odd_kinds.infer(
                "--lcm_weight", 0, "--output", shared / f"{family}-0.png", family=family
            ),
        ):
            place = shared.parent / "set-up"
            place.mkdir(exist_ok=True)
            _, text, wrong = judge_command(quiet, words, place, True)
            if wrong:
                raise SystemExit(f"{' '.join(map(str, words))}: {wrong}\n{text[-3000:]}")
        assert odd_kinds.difference(shared / f"{family}.png", shared / f"{family}-0.png") > 8
    return 0


# --------------------------------------------------------------------------------------------- Main


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=__doc__, formatter_class=HelpFormatter
    )
    add, names = parser.add_argument, [kind.__name__ for kind in odd_kinds.KINDS]
    add("--cases", type=int, metavar="N", default=200, help="how many")
    add("--seed", type=int, metavar="N", default=0, help="of the choice, and of each case")
    add("--only", metavar="KIND", choices=names, help=f"one kind: {', '.join(names)}")
    add("--keep", type=Path, metavar="FOLDER", help="a new folder for all files, which are kept")
    return parser.parse_args(argv)


def deal(args):
    """[(kind, variant)]: of every kind its share, each variant once before one comes again."""
    rng, dealt = random.Random(args.seed), []
    pairs = [(kind, variant) for kind, variants in odd_kinds.KINDS.items() for variant in variants]
    pairs = [pair for pair in pairs if args.only in (None, pair[0].__name__)]
    while len(dealt) < args.cases:
        dealt += rng.sample(pairs, len(pairs))
    return dealt[: args.cases]


def load_libraries(home):
    """Import what the programs import, once; they warn of parts that nothing here needs."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    os.environ |= {"HF_HOME": str(home), "TRANSFORMERS_VERBOSITY": "error"}
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline  # noqa: F401

    import infer  # noqa: F401
    import train_lcm_lora_sd15  # noqa: F401
    import train_lcm_lora_sdxl

    train_lcm_lora_sdxl.torch.set_num_threads(1)
    train_lcm_lora_sdxl.datasets.disable_progress_bars()
    for name in "infer", "train_lcm_lora_sd15", "train_lcm_lora_sdxl":
        del sys.modules[name]  # a program reads its environment as it starts


def run_case(number, kind, variant, args, work):
    """One case in a process of its own: (number of the defect, what is wrong)."""
    folder, verdict = work / f"{number:03}", work / f"{number:03}.json"

    def whole():
        folder.mkdir()
        case = kind(random.Random(f"{args.seed} {number} {variant}"), folder, variant)
        verdict.write_text(json.dumps([case.number, judge(case, folder)]))

    os.waitpid(fork(whole), 0)
    if not verdict.exists():
        return "?", "this program failed"
    return json.loads(verdict.read_text())


def main(argv=None):
    """Run and report; the exit code."""
    args = parse_args(argv)
    work = args.keep or Path(tempfile.mkdtemp(prefix="inputs-"))
    work.mkdir(parents=True, exist_ok=True)
    odd_kinds.SHARED = work.resolve() / "shared"
    failed, tried = Counter(), Counter()
    try:
        load_libraries(work / "hf-home")
        if os.waitpid(fork(set_up), 0)[1]:
            raise SystemExit("error: the teachers and runs that all cases share cannot be made")
        for number, (kind, variant) in enumerate(deal(args)):
            defect, wrong = run_case(number, kind, variant, args, work.resolve())
            tried[kind.__name__] += 1
            failed[kind.__name__] += bool(wrong)
            line = f"{number:03} {kind.__name__}, {variant} [{defect}]: {wrong or 'holds'}"
            print(ascii(line[:400])[1:-1], flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    for kind, count in tried.items():
        print(f"{kind}: {count - failed[kind]} of {count} hold")
    print(f"{tried.total() - failed.total()} of {tried.total()} cases hold, seed {args.seed}")
    return 1 if failed.total() else 0


if __name__ == "__main__":
    sys.exit(main())
