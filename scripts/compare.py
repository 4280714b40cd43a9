"""A grid of a teacher and its LCM-LoRA: a row per prompt, a column per scheduler and step count.

    python scripts/compare.py --lora runs/my-lora --prompt "a red apple" "a house" --output grid.png
    python scripts/compare.py --lora runs/my-lora --prompt "a cat" --scheduler dpm++ lcm --steps 2 4

This is `python infer.py --compare`, with the flags of infer.py. By default the teacher is shown in
50 steps of DDIM and in 1, 2 and 4 of DPM-Solver++, the LoRA in 1, 2, 4 and 8. lcm and tcd are
columns of the LoRA, every other scheduler is one of the teacher, with guidance.
"""

import contextlib
import itertools
import runpy
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    # infer.py reads the flags and hands them back to compare().
    sys.argv.insert(1, "--compare")
    runpy.run_path(str(ROOT / "infer.py"), run_name="__main__")
    raise SystemExit

sys.path.insert(0, str(ROOT))
import infer

# {scheduler: (group of columns, its colour)}
GROUPS = {
    "lcm": ("LCM-LoRA", "#0969da"),
    "tcd": ("LCM-LoRA, TCD", "#8250df"),
    "ddim": ("Teacher, DDIM", "#57606a"),
    "dpm++": ("Teacher, DPM-Solver++", "#bc4c00"),
    "euler": ("Teacher, Euler", "#9a6700"),
}
ROWS, CELL = 100, 512  # of a grid at most; pixels
# Pillow's own font has ASCII; others, where they are found, have more.
FONTS = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "msgothic.ttc",
)


def compare(args):
    """Read, load, generate every column and save the grid; `args` are those of infer.py."""
    plan = make_plan(args)
    jobs, images, loras, settings = infer.read_inputs(args)
    if args.output.suffix.lower() == ".webp":
        infer.fail(f"--output {args.output}: a grid may be too high for WebP; name a .png or .jpg")
    if len(jobs) > ROWS:
        infer.fail(f"--compare: {len(jobs)} prompts, a grid has at most {ROWS} rows")
    path, _, metadata = loras[infer.ADAPTER]
    if not args.scheduler:  # the LoRA's columns are of its own sampler
        own = {"lcm": settings["sampler"]}
        plan = [(own.get(name, name), steps) for name, steps in plan]
    original_steps = settings["original_inference_steps"]
    # Columns that nobody asked for are left out where the LoRA has too few steps, not refused.
    if not (args.scheduler or args.steps):
        fits = [name not in infer.DISTILLED or steps <= original_steps for name, steps in plan]
        plan = list(itertools.compress(plan, fits))
    infer.check_plan(args, plan, jobs, original_steps, settings["keeps_guidance"])
    if args.compare_guidance is None:
        usual = settings["recipe_guidance"] - 1
        omegas = [infer.header(path, metadata, key, usual) for key in ("w_min", "w_max")]
        kept = settings["keeps_guidance"]
        args.compare_guidance = args.guidance_scale if kept else 1 + sum(omegas) / 2
    mark = infer.fingerprint(settings, jobs, plan, args.compare_guidance)
    if infer.is_there(args.output, mark, args) and not args.fused_output:
        print(f"{args.output} is there already (--overwrite generates it again)")
        return
    infer.try_output(args.output)
    base = settings["base_model"]
    # The teacher's columns come first, without the LCM-LoRA; whether it fits is seen before them.
    pipe, task, jobs, schedulers = infer.load(args, jobs, images, loras, settings)
    infer.match_base(pipe, *loras[infer.ADAPTER], base)
    teacher = [column for column in plan if column[0] not in infer.DISTILLED]
    distilled = [column for column in plan if column[0] in infer.DISTILLED]
    columns = make_columns(task, args, images, jobs, teacher, schedulers)
    infer.fuse(pipe, args, loras, base)  # as who generates with it has it: its time is that
    columns |= make_columns(task, args, images, jobs, distilled, schedulers)
    columns = [columns[column] for column in plan]
    given = {"image": args.image, "mask": args.mask, "control": args.control_image}
    sources = [
        {"group": "Source", "label": label, "images": [image] * len(jobs)}
        for label, image in zip(filter(given.get, given), images.values())
    ]
    names = [f"{name} {weight:g}" for name, weight in settings["loras"]]
    facts = [f"{' + '.join(names)} on {Path(base).name}", f"{jobs[0].width} x {jobs[0].height} px"]
    facts += [f"seed {args.seed}"] + ([f"strength {args.strength:g}"] if args.image else [])
    title = ", ".join(facts)
    differ = len({job.negative_prompt for job in jobs}) > 1  # else the settings tell it
    texts = [
        f"{job.prompt} (not: {job.negative_prompt})"
        if differ and job.negative_prompt
        else job.prompt
        for job in jobs
    ]
    sheet = grid(sources + columns, texts, title)
    facts = [{key: column[key] for key in column if key != "images"} for column in columns]
    settings |= {"jobs": [job._asdict() for job in jobs], "columns": facts}
    settings |= {"compare_guidance": args.compare_guidance, "fingerprint": mark}
    infer.save(sheet, args.output, settings)
    print(f"{args.output} ({sum(column['seconds'] for column in columns):.3g} s a row)")
    if args.fused_output:
        pipe.scheduler = schedulers[settings["sampler"]]
        runpy.run_path(str(infer.FUSE))["save"](pipe, args.fused_output)


def make_plan(args):
    """[(scheduler, steps)]: the columns of the grid."""
    plan = {"ddim": [50], "dpm++": [1, 2, 4], "lcm": [1, 2, 4, 8]}
    if args.scheduler or args.steps:
        # each of them once
        steps = dict.fromkeys(args.steps or [1, 2, 4, 8])
        plan = dict.fromkeys(args.scheduler or ["dpm++", "lcm"], steps)
    teacher = [name not in infer.DISTILLED for name in plan]
    if args.compare_guidance is not None and not any(teacher):
        infer.fail("--compare_guidance has no effect without a column of the teacher")
    if args.guidance_scale != 1 and all(teacher):
        says = "has no effect without a column of the LCM-LoRA; the teacher's is --compare_guidance"
        infer.fail(f"--guidance_scale {says}")
    return [(name, steps) for name, counts in plan.items() for steps in counts]


def make_columns(pipe, args, images, jobs, plan, schedulers):
    """{(scheduler, steps): column}, each a dict with its images (a row per prompt) and s/image."""
    columns, seen = {}, set()
    for name, steps in plan:
        group, teacher = GROUPS[name][0], name not in infer.DISTILLED
        guidance = args.compare_guidance if teacher else args.guidance_scale
        pipe.scheduler = schedulers[name]
        if args.compile:
            seen.clear()  # what is new is compiled anew
        if not seen:  # not timed: the first call is slow
            infer.generate(pipe, args, images, jobs[: args.batch_size], 1, guidance, seen)
        made, seconds, _ = infer.generate(pipe, args, images, jobs, steps, guidance, seen, shrink)
        passes = int(steps * infer.enough(args.strength, steps)) if args.image else steps
        column = {"group": group, "scheduler": name, "steps": steps, "guidance": guidance}
        column |= {"passes": passes * (2 if guidance > 1 else 1), "seconds": seconds}
        columns[name, steps] = column | {"images": made}
        steps, passes = plural(steps, "step"), plural(column["passes"], "UNet pass")
        print(f"{group}, {steps}: {passes}, {seconds:.3g} s/image")
    return columns


def shrink(_, image):
    """An image as a cell has it, at most CELL wide and high: all that is kept of it."""
    return ImageOps.contain(image, (CELL, CELL)) if max(image.size) > CELL else image


def plural(count, noun):
    """1 step, 2 steps, 2 passes."""
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


def shows(font, text):
    """Whether a font has all letters of a text: what it has not comes out as the same box."""
    box = bytes(font.getmask("\U0010fffe"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != box for letter in set(text))


def font_for(text, font):
    """This font, else one of the system's of its size, that has all letters of a text."""
    fonts = [font]
    for name in FONTS:
        with contextlib.suppress(OSError):  # it is not installed
            fonts.append(ImageFont.truetype(name, font.size))
    return next((font for font in fonts if shows(font, text)), None)


def wrap(text, font, width, limit):
    """At most `limit` lines of about `width` pixels; what is left out shows as three dots."""
    letters = int(26 * width / font.getlength("abcdefghijklmnopqrstuvwxyz"))
    return textwrap.wrap(text, max(letters, 4), max_lines=limit, placeholder="...") or [""]


def grid(columns, prompts, title):
    """One image of all columns: title, band per group, header per column, prompts at the left."""
    # Small images grow by a whole factor to 128 px or more; large ones shrink to 512 so that the
    # grid fits a screen.
    width, height = columns[-1]["images"][0].size
    factor = min(1, CELL / max(width, height))
    if min(width, height) < 128:
        factor = -(-128 // min(width, height))
    width, height = round(width * factor), round(height * factor)
    font, large = (
        ImageFont.load_default(size=max(13, round(width / divisor))) for divisor in (11, 9)
    )
    line, gap, label = round(font.size * 1.4), max(6, width // 20), round(width * 1.35)
    ink, faint = "#1f2328", "#656d76"
    colours = dict(GROUPS.values())

    # Columns of one group stand close, groups apart.
    lefts, left = [], label + 2 * gap
    for before, column in zip([None, *columns], columns):
        left += 2 * gap if before and before["group"] != column["group"] else 0
        lefts.append(left)
        left += width + gap
    title = "".join(letter if shows(large, letter) else "?" for letter in title)
    titles = wrap(title, large, left - 3 * gap, 4)
    band = 2 * gap + (len(titles) + 1) * line
    top = band + 6 * line  # the header of a column
    sheet = Image.new("RGB", (left + gap, top + len(prompts) * (height + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for row, text in enumerate(titles):
        pen.text((2 * gap, 2 * gap + row * line), text, ink, large)

    for group, members in itertools.groupby(zip(lefts, columns), lambda member: member[1]["group"]):
        (first, column), *_, (last, _) = [*members] * 2
        colour, right = colours.get(group, faint), last + width - 1
        pen.text((first, band), group, colour, font)
        if "guidance" in column:
            pen.text((first, band + line), f"guidance {column['guidance']:g}", faint, font)
        top_of_bar = band + 2.2 * line
        pen.rectangle((first, top_of_bar, right, top_of_bar + max(2, gap // 3)), colour)
    for x, column in zip(lefts, columns):
        counts = [("steps", "step"), ("passes", "UNet pass")]
        texts = [plural(column[key], word) for key, word in counts if key in column]
        texts += [column["label"]] if "label" in column else [f"{column['seconds']:.3g} s/image"]
        for row, text in enumerate(texts):
            place = (x + width / 2, band + round((2.6 + row) * line))
            pen.text(place, text, ink if row == 0 else faint, font, anchor="ma")
        for row, image in enumerate(column["images"]):
            image, y = image.convert("RGB"), top + row * (height + gap)
            cell = ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, "white")
            sheet.paste(cell, (x, y))
            if "label" in column:  # a mask is white on the white sheet
                pen.rectangle((x, y, x + width - 1, y + height - 1), outline=faint)
    for row, prompt in enumerate(prompts):
        if not (letters := font_for(prompt, font)):
            letters, name = font, f"Row {row + 1}"
            print(f"{name}: {prompt}")  # boxes would tell nothing
            prompt = name
        lines = wrap(prompt, letters, label - gap, max(1, height // line))
        y = top + row * (height + gap) + (height - len(lines) * line) // 2
        for index, text in enumerate(lines):
            pen.text((2 * gap, y + index * line), text, ink, letters)
    return sheet
