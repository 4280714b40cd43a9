"""scripts/evaluate.py, the ruler: its figures against other code, whole runs, and what is kept."""

import csv
import json
import math
import re
import shutil

import evaluate
import metrics
import numpy as np
import pytest
import studio
import torch
from conftest import CAPTIONS
from PIL import Image, ImageFilter
from test_infer import make_lora

PROMPTS = CAPTIONS[:11]


def normal(*shape, seed=0):
    """Standard normal float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """Of the two cores that all tests share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_lora(folder, teacher, seed=1, **header):
    """A LoRA of a teacher in this project's layout, its matrices scaled down by `seed`."""
    from diffusers import UNet2DConditionModel

    folder.mkdir(parents=True, exist_ok=True)
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    make_lora(unet, folder / evaluate.infer.WEIGHTS_NAME, teacher, alpha=4 / seed, **header)
    return folder


@pytest.fixture
def ruler(tmp_path, teacher, clip):
    """ruler(*flags) -> its folder, run on eleven prompts in 1 and 2 steps with few resamples."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    quick = "--steps 1 2 --reference_steps 3 --bootstrap 100 --grid_prompts 2".split()
    quick += ["--prompts_file", file, "--features", clip, "--output", tmp_path / "out"]

    def run(*flags):
        assert evaluate.main([*map(str, [*quick, *flags])]) == 0
        return tmp_path / "out"

    run.quick = [*map(str, quick)]
    return run


def figures(folder):
    """{(column, figure): (value, low, high)} of figures.csv."""
    rows = csv.DictReader(open(folder / "figures.csv", encoding="utf-8"))
    numbers = ("value", "low", "high")
    return {
        (row["column"], row["figure"]): [float(row[n]) for n in numbers if row[n]] for row in rows
    }


# ------------------------------------------------------------------------------------ The figures


@pytest.mark.parametrize("n, m, d", [(80, 90, 12), (40, 50, 64)])
def test_kid_and_frechet_distance_are_those_of_torchmetrics(n, m, d):
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = normal(n, d), normal(m, d, seed=1) * 1.3 + 0.2
    features = torch.nn.Identity()
    features.num_features = d
    frechet = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=n)
    for metric, ours in (frechet, metrics.frechet(x, y)), (kid, metrics.kid(x, y[:n])):
        metric.update(x, real=True)
        metric.update(y if metric is frechet else y[:n], real=False)
        theirs = metric.compute()
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-6), (ours, theirs)


def test_detail_is_energy_above_a_frequency():
    x = torch.randint(0, 256, (3, 3, 32, 24), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8)
    blurred = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x]
    blurred = studio.as_tensor([i.filter(ImageFilter.GaussianBlur(2)) for i in blurred])
    assert (metrics.detail(blurred) < 0.05 * metrics.detail(x)).all()
    assert metrics.detail(torch.full((1, 3, 32, 24), 200, dtype=torch.uint8)).item() < 1e-9
    # Parseval: all frequencies together are the mean square of what is transformed
    grey = x.double().numpy().transpose(0, 2, 3, 1) @ [0.299, 0.587, 0.114]
    window = np.outer(np.hanning(33)[:-1], np.hanning(25)[:-1])
    square = (((grey - grey.mean((1, 2), keepdims=True)) * window) ** 2).mean((1, 2))
    np.testing.assert_allclose(metrics.detail(x, cutoff=0).numpy(), square, rtol=1e-6)
    # a wave of 4 pixels is detail, one of 16 is not
    wave = [128 + 100 * torch.sin(2 * math.pi * torch.arange(64) / n) for n in (4, 16)]
    fine, coarse = metrics.detail(torch.stack(wave).byte()[:, None, None].expand(2, 3, 64, 64))
    assert fine > 1000 * coarse


def test_cosine_distance():
    x, y = torch.tensor([[1.0, 0], [2, 2]]), torch.tensor([[0.0, 3], [1, 1]])
    torch.testing.assert_close(metrics.cosine_distance(x, y), torch.tensor([1.0, 0]))


def test_verdict_follows_the_intervals():
    """The most that holds is said first; then what equal passes and equal steps say."""
    lora = evaluate.Lora("mine", None, 1.0, ("tcd",), 50, "")
    columns, measured = {}, {}

    def add(role, lora, steps, guidance, kid):
        columns[role] = evaluate.Column(
            f"{role[0]} {steps}",
            "mine, tcd" if lora else evaluate.SOLVER,
            lora,
            "",
            steps,
            guidance,
        )
        values = torch.linspace(-0.1, 0.1, 201) + kid
        measured[role] = {"kid": values, "features": values}

    for steps, kid in (1, 9), (2, 3), (4, 1), (8, 0.1):
        add((evaluate.SOLVER, steps), None, steps, 7.5, kid)
    for steps, kid in (1, 5), (2, 3.0), (4, 0.05), (8, 0.5):
        values = kid + (0.3 if steps == 2 else 0)
        add((lora, "tcd", steps), lora, steps, 1.0, values)
    # not the same resamples: differences have a width too
    for role in measured:
        if columns[role].lora:
            measured[role]["kid"] = measured[role]["kid"].flip(0)
    says = evaluate.verdict(columns, measured, lora, "tcd", "the teacher's images")
    assert "mine, tcd: at 4 steps (4 UNet passes) closer to the teacher's images than" in says
    assert "DPM-Solver++ at 4 steps (8 UNet passes)" in says
    assert "At equal UNet passes: closer at 2, 4, 8." in says
    assert "At equal steps: closer at 1, 4; farther at 2, 8." in says
    for role in measured:
        if columns[role].lora:
            measured[role]["kid"] = measured[role]["kid"] + 20
    says = evaluate.verdict(columns, measured, lora, "tcd", "the teacher's images")
    assert "at no number of steps closer" in says and "equal steps: farther at 1, 2, 4, 8" in says


# ----------------------------------------------------------------------------------------- A run


def test_a_run_from_folders_without_a_network(tmp_path, ruler, teacher, clip):
    """Tables, figures, plot, grid and card; a second run generates nothing anew."""
    lora = new_lora(tmp_path / "my lora", teacher, sampler="tcd", ss_output_name="mine")
    (lora / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Mine\n\nText.\n")
    flags = ("--lora", lora, "--preference", clip, "--write_card")
    out = ruler(*flags)
    report, found = (out / "README.md").read_text(), figures(out)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "figures.csv", "plot.svg", "grid.png", "columns",
    }  # fmt: skip
    names = {column for column, _ in found}
    assert {"mine, tcd 1", "mine, tcd 2", "DPM-Solver++ 1", evaluate.FLOOR} < names
    for column in names:
        assert {"clip", "preference_1", "detail"} <= {key for name, key in found if name == column}
        # the same model: a cosine, by 100 and by its own scale
        scale = found[column, "preference_1"][0] / found[column, "clip"][0] * 100
        assert abs(scale - math.exp(2.6592)) < 1e-2
    for key in "kid features latents".split():
        value, low, high = found["mine, tcd 2", key]
        assert low <= value <= high
    assert "mine, tcd: at " in report and "The reference has " in report
    assert (out / "plot.svg").read_text().count("<circle") == 4
    assert Image.open(out / "grid.png").width > 500

    card = (lora / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n---\n\n# Mine\n\nText.\n\n<!-- evaluate")
    assert "| mine, tcd 2 |" in card and card.count("DPM-Solver++ 1 |") == 1
    (lora / "README.md").write_text(card + "\nThe end.\n")
    times = {path: path.stat().st_mtime_ns for path in (out / "columns").iterdir()}
    ruler(*flags)
    assert (lora / "README.md").read_text() == card + "\nThe end.\n"
    assert figures(out) == found
    assert {path: path.stat().st_mtime_ns for path in (out / "columns").iterdir()} == times


def test_the_size_of_a_recipe(tmp_path, ruler, teacher):
    """What recipe.json says of the images, unless --size does; a missing side is the base's own."""
    base = shutil.copytree(teacher, tmp_path / "base")
    both = {"format": 1, "width": 24, "height": 40}
    for size, recipe, wanted in (
        ((), both, (40, 24)),
        (("--size", "16"), both, (16, 16)),
        ((), {"format": 1, "width": 24}, (32, 24)),
        ((), {"format": 1}, (32, 32)),
    ):
        (base / "recipe.json").write_text(json.dumps(recipe))
        flags = [*ruler.quick, "--lora", new_lora(tmp_path / "lora", teacher), "--base", base]
        args = evaluate.parse_args([*map(str, flags), *size])
        loras, base_name, _, negative = evaluate.read_loras(args)
        made = evaluate.Ruler(args, loras, base_name, negative, PROMPTS, [])
        assert made.studio.size == wanted


def test_another_lora_finds_the_teachers_columns(tmp_path, ruler, teacher):
    """Only its own are generated; a LoRA that learned no guidance samples at the teacher's."""
    first = new_lora(tmp_path / "a", teacher)
    keeps = new_lora(tmp_path / "b", teacher, seed=2, w_min="0", w_max="0")
    out = ruler("--lora", first, "--check_prompts", 0)
    before = {path.name for path in (out / "columns").glob("*.latents*")}
    assert len(before) == 6  # reference, floor, 2 of DPM-Solver++, 2 of the LoRA
    both = ruler("--lora", first, keeps, "--check_prompts", 0)
    after = {path.name for path in (both / "columns").glob("*.latents*")}
    assert before < after and len(after) == 8
    rows = [*csv.DictReader(open(both / "figures.csv"))]
    assert {row["guidance"] for row in rows if row["lora"] == "a"} == {"1.0"}
    assert {row["guidance"] for row in rows if row["lora"] == "b"} == {"5.0"}
    assert {row["unet_passes"] for row in rows if row["lora"] == "b"} == {"2", "4"}
    assert "b, lcm 2 minus a, lcm 2 | equal steps, first LoRA" in (both / "README.md").read_text()


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_columns_are_what_diffusers_generates(request, tmp_path, ruler, layout):
    """By the pipeline itself, from the same noise: teacher with negative prompt, LoRA with TCD."""
    import diffusers
    from safetensors.torch import load_file

    teacher = request.getfixturevalue("teacher" if layout == "sd15" else "xl_teacher")
    lora = new_lora(tmp_path / "lora", teacher, num_ddim_timesteps="20", family=layout)
    flags = ["--lora", lora, "--samplers", "tcd", "ddim", "--negative_prompt", "ab"]
    args = evaluate.parse_args([*map(str, [*ruler.quick, *flags])])
    loras, base, guidance, negative = evaluate.read_loras(args)
    made = evaluate.Ruler(args, loras, base, negative, PROMPTS, evaluate.load_networks(args))
    columns = evaluate.plan(args, loras, guidance)
    pipe = diffusers.DiffusionPipeline.from_pretrained(teacher, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    seeds = [np.random.SeedSequence([0, 0, i]).generate_state(1)[0] for i in range(3)]
    noise = [
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(int(s))) for s in seeds
    ]
    for role in (evaluate.SOLVER, 2), (loras[0], "tcd", 2), (loras[0], "ddim", 2):
        column = columns[role]
        with torch.no_grad():
            ours = made.latents(column, 3, evaluate.Progress(1))
        kind, _, more = evaluate.infer.SCHEDULERS[column.sampler]
        more |= {"original_inference_steps": 20} if column.sampler == "tcd" else {}
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **more)
        if column.lora and not pipe.get_active_adapters():
            pipe.load_lora_weights(lora)
        theirs = pipe(
            list(PROMPTS[:3]), negative_prompt=["ab"] * 3, num_inference_steps=2,
            guidance_scale=column.guidance, latents=torch.cat(noise), output_type="latent",
        ).images  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert load_file(made.place(column))["latents"].shape == (3, 4, 8, 8)


def test_a_stopped_column_goes_on(tmp_path, monkeypatch):
    """Where it was, and what is there is not made again; a broken file is none."""
    monkeypatch.setattr(evaluate, "SAVE_EVERY", 0)
    asked, path = [], tmp_path / "a.safetensors"

    def make(rows):
        if rows[0] == 4 and len(asked) < 3:
            raise KeyboardInterrupt
        asked.append(rows.tolist())
        return {"x": rows * 1.0, "y": rows[:, None].repeat(1, 2)}

    with pytest.raises(KeyboardInterrupt):
        evaluate.kept(path, 7, 2, make)
    assert evaluate.rows_in(path) == 4
    asked.append(None)
    found = evaluate.kept(path, 7, 2, make)
    assert asked == [[0, 1], [2, 3], None, [4, 5], [6]]
    assert found["x"].tolist() == [0, 1, 2, 3, 4, 5, 6] and found["y"].shape == (7, 2)
    assert evaluate.kept(path, 3, 2, None)["x"].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-3])
    assert evaluate.rows_in(path) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert evaluate.kept(path, 2, 2, lambda rows: {"x": rows * 1.0})["x"].tolist() == [0, 1]


# ------------------------------------------------------------------------- Data, folders, mistakes


def test_recognition_and_a_folder_as_reference(tmp_path, teacher, clip, images):
    """--data gives prompts and a gallery; KID to a folder is unpaired, the teacher has one too."""
    import datasets

    lora, paths = new_lora(tmp_path / "lora", teacher), sorted(images.glob("*.png"))
    rows = {"image": [*map(str, paths)], "text": [*CAPTIONS[:11], CAPTIONS[0]]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data = data.map(lambda row: {"image": row["image"].resize((32, 32))})
    data.to_parquet(tmp_path / "train.parquet")
    flags = "--steps 2 --reference_steps 2 --check_prompts 0 --bootstrap 100 --grid_prompts 0"
    flags = [*flags.split(), "--lora", lora, "--data", tmp_path, "--reference", images]
    flags += ["--features", clip, "--output", tmp_path / "out"]
    assert evaluate.main([*map(str, flags)]) == 0
    found = figures(tmp_path / "out")
    reference = "teacher, DPM-Solver++ 2 (reference)"
    assert (reference, "kid") in found and (reference, "features") not in found
    for key, (value, *_) in found.items():
        assert math.isfinite(value) and (key[1] != "recognised" or 0 <= value <= 1)
    assert ("lora, lcm 2", "recognised") in found
    assert not (tmp_path / "out" / "grid.png").exists()


def refused(capsys, *flags):
    """The one line on stderr with which a command is refused."""
    with pytest.raises(SystemExit) as error:
        evaluate.main([*map(str, flags)])
    capsys.readouterr()
    says = str(error.value)
    assert says.startswith("error: ") and "\n" not in says
    return says


def test_mistakes_have_one_line(tmp_path, capsys, ruler, teacher, clip, xl_teacher):
    lora = new_lora(tmp_path / "lora", teacher)
    file, quick = tmp_path / "prompts.txt", ruler.quick

    def says(*flags):
        return refused(capsys, *quick, "--lora", lora, *flags)

    assert "--prompts_file FILE, or --data" in refused(capsys, "--lora", lora, "--output", tmp_path)
    assert "--lora" in refused(capsys, *quick)
    assert "no train.parquet" in refused(
        capsys, "--lora", lora, "--output", tmp_path / "x", "--data", tmp_path
    )
    assert re.search("2 prompts; KID and its intervals need 10", says("--num_prompts", 2))
    assert "--num_prompts 50: --prompts_file" in says("--num_prompts", 50)
    file.write_text("\n".join(PROMPTS[:10]) + "\na house\n")
    assert "prompts 3 and 11 are the same, 'a house'" in says()
    file.write_bytes(b"\xff\xfe\0")
    assert "cannot be read as text" in says()
    file.write_text("\n")
    assert "contains no prompt" in says()
    file.write_text("\n".join(PROMPTS))
    assert "--features" in says("--features", tmp_path / "none")
    assert "CLIP or DINOv2" in says("--features", teacher / "text_encoder")
    assert "was trained for" in says("--base", xl_teacher)
    assert "no such folder" in says("--reference", tmp_path / "none")
    assert "0 images there, needed are 10" in says("--reference", lora)
    assert "twice" in says("--steps", 4, 4)
    assert "1/4" in says("--part", "5/4")
    assert "--size 33" in says("--size", 33)
    assert "distilled on 50" in says("--steps", 60)
    assert "--write_card: LoRA some/where" in refused(
        capsys, *quick, "--lora", "some/where", "--write_card"
    )
    (tmp_path / "file").touch()
    assert "--output" in says("--output", tmp_path / "file")
    odd = new_lora(tmp_path / "odd", teacher, sampler="best")
    assert "sampler is 'best'" in refused(capsys, *quick, "--lora", odd)
    odd = new_lora(tmp_path / "odd", teacher, w_min="nan")
    assert "w_min is 'nan'" in refused(capsys, *quick, "--lora", odd)
    huge = new_lora(tmp_path / "huge", teacher, seed=1e-37)
    assert re.search("huge, lcm 1, prompt 1 .*NaN or inf", refused(capsys, *quick, "--lora", huge))


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="error: --output: .*a.csv cannot be written .*No space"):
        evaluate.write_whole(tmp_path / "a.csv", "text")


def test_missing_features_say_what_to_install(ruler, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    args = evaluate.parse_args(["--lora", "x", *ruler.quick])
    args.features = None
    with pytest.raises(SystemExit, match="--features: .*requirements-eval.txt"):
        evaluate.load_networks(args)


def test_subcommands_are_still_there(capsys):
    for command in "teacher", "lora":
        with pytest.raises(SystemExit) as error:
            evaluate.main([command, "--help"])
        assert error.value.code == 0 and f"evaluate.py {command} " in capsys.readouterr().out


def test_parts_generate_what_one_program_does(tmp_path, ruler, teacher):
    """Each part some columns, all of them together all, and the longest are not in one part."""
    lora = new_lora(tmp_path / "lora", teacher)
    counts = []
    for part in "1/2", "2/2":
        out = ruler("--lora", lora, "--part", part)
        counts.append(len([*(out / "columns").glob("*.latents.*")]))
        assert not (out / "README.md").exists()
    assert counts == [4, 8]


def test_dinov2_features_are_its_class_token(tmp_path):
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    network = Dinov2Model(Dinov2Config(hidden_size=16, **sizes)).eval()
    network.save_pretrained(tmp_path)
    side = {"height": 28, "width": 28}
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=side).save_pretrained(tmp_path)
    images = torch.randint(0, 256, (2, 3, 28, 28)).byte()
    found = evaluate.VisionFeatures(str(tmp_path), "--features")
    mean, std = (torch.tensor(getattr(found.processor, f"image_{k}")) for k in ("mean", "std"))
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = network(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(found(images), expected.double(), rtol=1e-4, atol=1e-5)
    assert found.tokenizer is None


def test_a_checkpoint_in_one_file_gives_the_columns_of_its_folder(tmp_path, ruler, make_teacher):
    """The base is told by its weights, so nothing is generated again."""
    from single_file import as_single_file

    teacher = make_teacher()
    lora = new_lora(tmp_path / "lora", teacher)
    flags = ["--lora", lora, "--check_prompts", 0, "--steps", 1]
    before = {path.name for path in (ruler(*flags) / "columns").iterdir()}
    file = as_single_file(teacher)
    after = ruler(*flags, "--base", file, "--base_config", teacher) / "columns"
    assert {path.name for path in after.iterdir()} == before


def test_a_card_has_one_section(tmp_path):
    evaluate.write_card(tmp_path, "first | second")
    evaluate.write_card(tmp_path, "three")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"# {tmp_path.name}\n") and "three" in text and "first" not in text
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit, match="--write_card: .* cannot be read"):
        evaluate.write_card(tmp_path, "four")
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"
