#!/usr/bin/env python
"""Show that the tests catch the defects of today's LCM-LoRA scripts: with each, its test must fail.

    python scripts/proofs/defects.py    # exit code 0 if each defect is caught; a quarter of an hour
    python scripts/proofs/defects.py --only 4 14

A defect is a small patch of one program in a copy of the repository; the two trainers are one text
where scripts/proofs/drift.py says so. First all these tests have to pass as the programs are. Each
test is followed by the reason it failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/
from help_formatter import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
SD15, SDXL = "train_lcm_lora_sd15.py", "train_lcm_lora_sdxl.py"

# (number, what, program, test, {text: its replacement})
# fmt: off
DEFECTS = (
    (1, "keys under unet.base_model.model", SD15,
     "tests/test_train_sd15.py::test_defect_01_keys_are_those_that_every_tool_reads",
     {"file: save(kohya, about)":
      'file: save({f"unet.{name}": w for name, w in prefixed.items()}, about)'}),
    (2, "attention as lora.down/up, the rest as lora_A/B", SD15,
     "tests/test_train_sd15.py::test_defect_02_attention_layers_are_loaded",
     {"    files = {file: save(kohya":
      '    old = {k: k.replace("lora_A", "lora.down").replace("lora_B", "lora.up") '
      'for k in prefixed if "attn" in k}\n'
      '    kohya = {old.get(k, k).replace("base_model.model", "unet"): w '
      'for k, w in prefixed.items()}\n'
      "    files = {file: save(kohya"}),
    (3, "validation generates with the base", SD15,
     "tests/test_train_sd15.py::test_defect_03_validation_uses_the_student",
     {"sampler.unet = run.target": "sampler.unet = run.teacher"}),
    (4, "alpha lost on save", SD15,
     "tests/test_train_sd15.py::test_defect_04_alpha_is_kept",
     {'kohya[f"{key}.alpha"] =': "lost ="}),
    (4, "alpha lost in the PEFT folder", SD15,
     "tests/test_train_sd15.py::test_defect_04_alpha_is_kept",
     {'"inference_mode": True}': '"inference_mode": True, "lora_alpha": args.lora_rank}'}),
    (5, "the dtype is read from the wrapper of many processes", SDXL,
     "tests/test_train_sdxl.py::test_defect_05_two_processes_are_one",
     {"dtype = next(unet.parameters()).dtype": "dtype = unet.dtype"}),
    (6, "KeyError at the end of a shard", SD15,
     "tests/test_defects.py::test_defect_06_all_shards_are_read_to_their_end",
     {'(image or {}).get("path") or': '(image or {})["path"] or'}),
    (7, "parameters are an iterator that the optimizer uses up", SD15,
     "tests/test_train_sd15.py::test_defect_07_gradients_are_clipped",
     {"run.trained = [p for p in run.target.parameters() if p.requires_grad]":
      "run.trained = filter(lambda p: p.requires_grad, run.target.parameters())"}),
    (8, "LoRA in the precision of the base", SD15,
     "tests/test_train_sd15.py::test_defect_08_lora_is_float32_under_bf16",
     {"cast_training_params(unet, dtype=torch.float32)":
      "cast_training_params(unet, dtype=unet.dtype)"}),
    (8, "LoRA in the precision of the launcher", SD15,
     "tests/test_train_sd15.py::test_defect_08_lora_is_float32_under_bf16",
     {"cast_training_params(unet, dtype=torch.float32)":
      'cast_training_params(unet, '
      'dtype=DTYPES[os.environ.get("ACCELERATE_MIXED_PRECISION", "no")])'}),
    (9, "autocast without a dtype", SD15,
     "tests/test_maths.py::test_defect_09_no_autocast",
     {"    return unet(z_t.to(dtype)":
      "    with torch.autocast(z_t.device.type):\n        return unet(z_t.to(dtype)"}),
    (10, "sigma in bf16", SD15,
     "tests/test_maths.py::test_defect_10_noising_is_float32",
     {"(1 - alpha_bar).sqrt()": "(1 - alpha_bar.bfloat16()).sqrt()"}),
    (11, "all ranks sample the same", SD15,
     "tests/test_maths.py::test_defect_11_no_two_samples_share_noise",
     {"default_rng([seed, step, place, ": "default_rng([seed, step, "}),
    (12, "FSDP and DeepSpeed, where only rank 0 would save", SD15,
     "tests/test_defects.py::test_defect_12_sharded_launches_are_refused",
     {'in ("FSDP", "DEEPSPEED", "MEGATRON_LM")': "in ()"}),
    (12, "random state that only some ranks save", SD15,
     "tests/test_defects.py::test_defect_12_no_rank_has_random_state_to_lose",
     {"torch.manual_seed(int(": "(int("}),
    (13, "--scale_lr after the optimizer was made", SD15,
     "tests/test_train_sd15.py::test_defect_13_learning_rate_is_scaled_and_decays",
     {"    args.learning_rate *= size if args.scale_lr else 1\n": "",
      "accelerator.prepare(run.target, optimizer)\n":
      "accelerator.prepare(run.target, optimizer)\n"
      "    args.learning_rate *= run.global_batch if args.scale_lr else 1\n"}),
    (13, "a schedule N times too slow with N processes", SD15,
     "tests/test_train_sd15.py::test_defect_05_two_processes_are_one",
     {"optimizer, None, warmup, steps)":
      'optimizer, None, warmup, steps * int(os.environ.get("WORLD_SIZE", 1)))'}),
    (14, "width before height", SDXL,
     "tests/test_defects.py::test_defect_14_sizes_are_those_of_the_crop",
     {"torch.tensor([height, width,": "torch.tensor([width, height,"}),
    (14, "the mirrored crop's edge from the width of the crop", SDXL,
     "tests/test_defects.py::test_defect_14_sizes_are_those_of_the_crop",
     {"if flip else part, left, top": "if flip else part, sides[1] - left if flip else left, top"}),
    (14, "the crop's edges always (0, 0)", SDXL,
     "tests/test_defects.py::test_defect_14_sizes_are_those_of_the_crop",
     {"width, top, left, h, w])": "width, 0, 0, h, w])"}),
    (15, "an endless search where no record is good", SD15,
     "tests/test_defects.py::test_defect_15_no_good_record_is_an_error",
     {"for i in range(2 * len(self.records)):": "for i in itertools.count():"}),
    (15, "an endless search in a stream where no record is good", SD15,
     "tests/test_defects.py::test_defect_15_no_good_record_is_an_error",
     {"if len(waiting) >= position - first:": "if False:"}),
    (15, "--proportion_empty_prompts is not read", SD15,
     "tests/test_defects.py::test_defect_15_flags_are_read",
     {"caption[0] < args.proportion_empty_prompts": "False"}),
    (15, "--center_crop is not read", SD15,
     "tests/test_defects.py::test_defect_15_flags_are_read",
     {"(0.5, 0.5) if args.center_crop else crop": "crop"}),
    (15, "--random_flip is not read", SD15,
     "tests/test_defects.py::test_defect_15_flags_are_read",
     {"args.random_flip and flip[0] < 0.5": "False"}),
    (15, "--cache_dir is not read", SD15,
     "tests/test_defects.py::test_defect_15_flags_are_read",
     {'options = {"cache_dir": args.cache_dir, "split"': 'options = {"split"'}),
    (16, "the first bad record is not named", SD15,
     "tests/test_defects.py::test_defect_16_the_first_bad_record_is_named",
     {", the first: {unusable[0]}": ""}),
    (17, "two UNets in memory", SD15,
     "tests/test_train_sd15.py::test_defect_17_one_copy_of_the_base",
     {"shared = [*unet.parameters(), *unet.buffers()]": "shared = []"}),
    (17, "student's activations held during the teacher's passes", SD15,
     "tests/test_maths.py::test_passes_of_a_step",
     {"    f_student = predict(run.student, z_nk, t_nk, c)\n": "",
      "z_nk = rounded(schedule.add_noise(z, noise, t_nk), run.target)\n":
      "z_nk = rounded(schedule.add_noise(z, noise, t_nk), run.target)\n"
      "            with torch.enable_grad():\n"
      "                f_student = predict(run.student, z_nk, t_nk, c)\n"}),
    (17, "teacher's passes apart", SD15,
     "tests/test_maths.py::test_passes_of_a_step",
     {"out_c, out_null = out.chunk(2)":
      "out_c, out_null = (predict(run.teacher, z_t, t, given) for given in (c, c_null))",
      "    out = predict(run.teacher, torch.cat([z_t, z_t]), torch.cat([t, t]), both)\n": ""}),
    (17, "text encoders at every step", SD15,
     "tests/test_defects.py::test_defect_17_encoders_rest_where_all_is_encoded",
     {"skip |= {*TEXT_ENCODERS}": "pass",
      '& pipe.components.keys() if "prompt" in columns else ()': "if False else ()",
      'c = {} if "prompt" in batch else encode_captions(': "c = encode_captions("}),
    (17, "the VAE in memory though latents are at hand", SD15,
     "tests/test_defects.py::test_defect_17_encoders_rest_where_all_is_encoded",
     {'skip.add("vae")': "pass"}),
    (17, ".item() at every micro-step", SD15,
     "tests/test_defects.py::test_defect_17_micro_steps_wait_for_nothing",
     {"losses.append(loss.detach())": "losses.append(torch.tensor(loss.item()))"}),
    (18, "validation builds a pipeline", SD15,
     "tests/test_defects.py::test_defect_18_every_tracker_gets_the_images",
     {"    sampler, vae, images = ":
      "    load_teacher(args, torch.float32)\n    sampler, vae, images = "}),
    (18, "only the first tracker gets images", SD15,
     "tests/test_defects.py::test_defect_18_every_tracker_gets_the_images",
     {"step=run.step, **layout)": "step=run.step, **layout)\n        break"}),
    (18, "validation prompts are hard-coded", SD15,
     "tests/test_train_sd15.py::test_defect_03_validation_uses_the_student",
     {'[args.negative_prompt, *(args.validation_prompts or [])], set()':
      '[args.negative_prompt, *["a house"] * len(args.validation_prompts or [])], set()'}),
    (19, "a resumed run starts the data again", SD15,
     "tests/test_train_sd15.py::test_defect_19_resumed_is_uninterrupted[plain]",
     {"make_loader(records, empty, args, run.step,": "make_loader(records, empty, args, 0,"}),
    (19, "the order of shards is not seeded", SD15,
     "tests/test_defects.py::test_defect_19_streamed_order_is_seeded",
     {"records.shuffle(generator=order, ": "records.shuffle("}),
    (19, "a checkpoint's path is cut to its last part", SD15,
     "tests/test_train_sd15.py::test_defect_19_resumed_is_uninterrupted[plain]",
     {"else [Path(name)] if name": "else [Path(args.output_dir, Path(name).name)] if name"}),
    (20, "the empty prompt is always zeros", SDXL,
     "tests/test_train_sdxl.py::test_defect_20_the_empty_prompt_is_the_teachers",
     {"if pipe.config.force_zeros_for_empty_prompt:": "if True:"}),
    (21, "a command of README.md with an undefined variable", "README.md",
     "tests/test_defects.py::test_defect_21_commands_have_no_undefined_variables",
     {"check_data.py --train_data_dir my_images": "check_data.py --train_data_dir $IMAGES"}),
    (22, "PEFT keys without their prefix", SD15,
     "tests/test_train_sd15.py::test_defect_22_peft_keys_have_their_prefix",
     {"save(prefixed, ":
      'save({k.removeprefix("base_model.model."): w for k, w in prefixed.items()}, '}),
    (23, "alpha tensors are the rank", SD15,
     "tests/test_train_sd15.py::test_defect_23_alpha_tensors_are_alpha",
     {"torch.tensor(float(args.lora_alpha))": "torch.tensor(float(args.lora_rank))"}),
)
# fmt: on

# What of these rows no test here can see, and what is tested in its place.
NOT_HERE = {
    5: "needs two GPUs; two processes on the CPU wrap the model in the same way",
    8: "fp16 and its gradient scaler need a GPU; bf16 is trained, by flag and by launcher",
    9: "CUDA's choice of fp16 needs a GPU; an fp16 base is run on a CPU, whose own choice is bf16",
    12: "the hang needs FSDP or DeepSpeed; tested is that they are refused and that no rank has "
    "random state to save",
    16: "whether a data set is still on the network cannot be tested; tested is that a bad record "
    "is named",
    17: "memory and waiting need a GPU; the tensors, passes and calls that cost them are counted",
}


def patched(text, changes):
    """The text of a program with each change made; each has to fit exactly one place."""
    for old, new in changes.items():
        if text.count(old) != 1:
            found = f"{old!r} occurs {text.count(old)} times, not once"
            raise SystemExit(f"scripts/proofs/defects.py: error: {found}")
        text = text.replace(old, new)
    return text


def run_tests(folder, *tests):
    """pytest on these tests in a copy: (exit code, its lines of failures, or all of its output)."""
    flags = "-q --tb=no -rfE -p no:cacheprovider".split()
    command = [sys.executable, "-m", "pytest", *flags, *tests]
    env = os.environ | {"COLUMNS": "1000", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    text = done.stdout + done.stderr
    return done.returncode, re.findall(r"^(?:FAILED|ERROR) (.*)", text, re.MULTILINE) or [text]


def main(argv=None):
    """Try each defect; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="just these defects")
    only = parser.parse_args(argv).only
    chosen, missed = [defect for defect in DEFECTS if not only or defect[0] in only], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in tracked.strip("\0").split("\0"):
            if not name.startswith("demo/"):  # large, and no test here changes it
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / "demo").symlink_to(ROOT / "demo")

        code, lines = run_tests(folder, *{test: None for *_, test, _ in chosen})
        if code:
            error = "scripts/proofs/defects.py: error: these tests fail without any defect"
            raise SystemExit("\n".join([*lines, error]))
        print("without a defect: all of these tests pass", flush=True)
        for number, what, program, test, changes in chosen:
            text = (folder / program).read_text()
            broken = patched(text, changes)
            if program.endswith(".py"):
                compile(broken, program, "exec")  # a patch with a typing error would prove nothing
            (folder / program).write_text(broken)
            code, lines = run_tests(folder, test)
            (folder / program).write_text(text)
            missed += code != 1  # 1: tests failed; others: pytest could not run them
            verdict = f"caught by {test}" if code == 1 else f"NOT CAUGHT by {test}"
            reason = lines[0].partition(" - ")[2] or lines[0]
            print(f"D{number:02} {what}: {verdict} ({reason})", flush=True)
    for number, why in NOT_HERE.items():
        if not only or number in only:
            print(f"D{number:02} only in part: {why}")
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
