"""Phases and trajectories: the step against a second implementation, samplers, runs, refusals."""

import importlib
import json
import math
import re
from types import SimpleNamespace

import datasets
import diffusers
import numpy as np
import pytest
import torch
from conftest import command_line, log, lora_file, same, series
from diffusers import LCMScheduler, TCDScheduler
from PIL import Image
from safetensors.torch import save_file

import infer

V = {"prediction_type": "v_prediction"}
ZERO = V | {"rescale_betas_zero_snr": True}
KINDS = {"epsilon": {}, "v": V, "v with zero SNR": ZERO}
FEW = {"lora_target_modules": "to_q", "max_train_steps": 2}
FAMILIES = ("sd15", "sdxl")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(params=FAMILIES)
def trainer(request):
    """Each trainer."""
    return importlib.import_module(f"train_lcm_lora_{request.param}")


class Toy(torch.nn.Module):
    """A network of one layer; counts its samples at each pass, and whether for a gradient."""

    def __init__(self, seed, dtype=torch.float32):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(4, 4, generator=random).to(dtype) / 2)
        self.calls = []

    def forward(self, z, t, c, added_cond_kwargs=None):
        self.calls.append((len(z), torch.is_grad_enabled()))
        out = torch.einsum("ij,bjhw->bihw", self.weight, z) + c.mean((1, 2))[:, None, None, None]
        return SimpleNamespace(sample=out * (1 + 0.3 * torch.cos(t / 300))[:, None, None, None])


def problem(trainer, settings, n=40, phases=(4,), **more):
    """One step of toy networks: (what the loss needs of a Run, its inputs, args)."""
    random, student = torch.Generator().manual_seed(5), Toy(2)
    schedule = trainer.NoiseSchedule(BETAS | settings, "cpu")
    t_nk = trainer.ddim_timesteps(n, 1000)[:: max(1, n // 20)]
    count = len(t_nk)
    z, noise = torch.randn(2, count, 4, 5, 3, generator=random)
    inputs = {"z": z, "noise": noise, "t_nk": t_nk}
    inputs["c"] = {"prompt": torch.randn(count, 3, 8, generator=random)}
    inputs["omega"] = 3 + 12 * torch.rand(count, 1, 1, 1, generator=random)
    args = {"loss_type": "huber", "huber_c": 0.05, "loss_units": "x0", "target": "network"}
    args |= {"w_min": 3.0, "w_max": 15.0, "guidance_rescale": 0.0, "max_train_steps": len(phases)}
    args |= {"num_ddim_timesteps": n, "phases": [*phases]} | more
    null = {"prompt": torch.randn(1, 3, 8, generator=random)}
    run = SimpleNamespace(teacher=Toy(1), student=student, target=student, c_null=null, step=0)
    run.schedule = schedule
    return run, inputs, SimpleNamespace(**args)


def angles(settings):
    """phi(t) with alpha = cos(phi), sigma = sin(phi), float64, from the betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    if settings.get("rescale_betas_zero_snr"):  # arXiv 2305.08891, algorithm 1
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return torch.acos(root)


def move(phi, z, out, t, s, is_v):
    """The probability-flow ODE's first-order solution from t to s.

    v (arXiv 2202.00512, appendix D): cos(d) z - sin(d) v, d the angle; eps (PCM, equation 6).
    """
    if is_v:
        return torch.cos(phi[t] - phi[s]) * z - torch.sin(phi[t] - phi[s]) * out
    scale = torch.cos(phi[s]) / torch.cos(phi[t])
    return scale * z - torch.cos(phi[s]) * (torch.tan(phi[t]) - torch.tan(phi[s])) * out


def second_loss(settings, phases, inputs, null, args):
    """The loss and the gradient of the student's weights, sample by sample."""
    phi, is_v, n = angles(settings), settings != {}, args.num_ddim_timesteps
    teacher, student = Toy(1, torch.float64).double(), Toy(2)
    student = student.double()
    grid, losses = [0, *(i * (1000 // n) - 1 for i in range(1, n + 1))], []
    for i, t in enumerate(inputs["t_nk"].tolist()):
        z, noise, c = (
            x[i : i + 1].double() for x in (inputs["z"], inputs["noise"], inputs["c"]["prompt"])
        )
        place, w = grid.index(t), float(inputs["omega"][i])
        below = grid[place - 1]
        edge = next(grid[k] for k in range(n, -1, -n // phases) if k < place)

        def out(net, z, t, c):
            return net(z, torch.tensor([t]), c).sample

        def f(z, t, c, edge=edge):
            result = out(student, z, t, c)
            if phases > 1:
                return z if t == edge else move(phi, z, result, t, edge, is_v)
            x0 = move(torch.cat([phi, phi.new_zeros(1)]), z, result, t, -1, is_v)
            x = 10.0 * t
            return 0.25 / (x**2 + 0.25) * z + x / (x**2 + 0.25) ** 0.5 * x0

        z_nk = torch.cos(phi[t]) * z + torch.sin(phi[t]) * noise
        steps = [
            move(phi, z_nk, out(teacher, z_nk, t, one), t, below, is_v) - z_nk
            for one in (c, null.double())
        ]
        with torch.no_grad():
            goal = f(z_nk + (1 + w) * steps[0] - w * steps[1], below, c)
        gain = 1.0
        if args.loss_units == "output":  # by automatic differentiation of the move itself
            arrive = edge if phases > 1 else -1
            probe = torch.zeros((), dtype=torch.float64, requires_grad=True)
            moved = move(
                torch.cat([phi, phi.new_zeros(1)]),
                z_nk.detach()[0, 0, 0, 0],
                probe,
                t,
                arrive,
                is_v,
            )
            gain = 1 / torch.autograd.grad(moved, probe)[0].abs()
        e = gain * (f(z_nk, t, c) - goal)
        c_huber = args.huber_c
        d = e**2 if args.loss_type == "l2" else (e**2 + c_huber**2).sqrt() - c_huber
        losses.append(d.mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), student.weight.grad


# ---------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(
    ("n", "phases"), [(40, 1), (40, 2), (40, 4), (20, 4), (8, 4), (8, 8), (48, 3)]
)
@pytest.mark.parametrize("units", ["x0", "output"])
@pytest.mark.parametrize("kind", KINDS)
def test_second_implementation(trainer, kind, units, n, phases):
    """Loss and gradient, at timesteps of each phase, its edges and the lowest step among them."""
    for loss_type in "huber", "l2":
        how = {"loss_units": units, "loss_type": loss_type}
        run, inputs, args = problem(trainer, KINDS[kind], n, [phases], **how)
        loss = trainer.distillation_loss(run, **inputs, args=args)
        loss.backward()
        expected, gradient = second_loss(KINDS[kind], phases, inputs, run.c_null["prompt"], args)
        assert loss.item() == pytest.approx(expected, rel=2e-4)
        assert torch.allclose(
            run.student.weight.grad.double(), gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max()
        )
        assert run.teacher.weight.grad is None


def test_a_plan_has_equal_parts(trainer):
    """4, 2, 1 in nine steps, and in a run shorter than its plan; the loss is that of each part."""
    args = SimpleNamespace(phases=[4, 2, 1], max_train_steps=9)
    assert [trainer.phases_at(i, args) for i in range(9)] == [4] * 3 + [2] * 3 + [1] * 3
    args.max_train_steps = 2
    assert [trainer.phases_at(i, args) for i in range(2)] == [4, 2]
    args.max_train_steps = 10
    assert [trainer.phases_at(i, args) for i in range(10)] == [4] * 4 + [2] * 3 + [1] * 3
    assert [trainer.phases_at(i, args) for i in (10, 99)] == [1, 1]
    for kind, settings in KINDS.items():
        run, inputs, args = problem(trainer, settings, 40, (4, 2, 1), max_train_steps=6)
        found = []
        for run.step in range(6):
            found.append(trainer.distillation_loss(run, **inputs, args=args).item())
        null = run.c_null["prompt"]
        expected = [second_loss(settings, m, inputs, null, args)[0] for m in (4, 2, 1)]
        assert found == pytest.approx([e for e in expected for _ in range(2)], rel=2e-4), kind


@pytest.mark.parametrize("n", [40, 20, 8])
@pytest.mark.parametrize("phases", [2, 4])
def test_edges_are_where_samplers_stop(trainer, monkeypatch, n, phases):
    """What the step takes for edges are the timesteps of LCM's and TCD's schedulers, and 0."""
    run, inputs, args = problem(trainer, {}, n, [phases])
    seen, function = [], trainer.consistency_function

    def record(output, z, t, schedule, s):
        seen.append((t, s))
        return function(output, z, t, schedule, s)

    monkeypatch.setattr(trainer, "consistency_function", record)
    t_nk = inputs["t_nk"] = trainer.ddim_timesteps(n, 1000)
    for name in "z", "noise", "omega":
        inputs[name] = inputs[name][:1].expand(n, -1, -1, -1)
    inputs["c"] = {"prompt": inputs["c"]["prompt"][:1].expand(n, -1, -1)}
    trainer.distillation_loss(run, **inputs, args=args)
    (t_n, s), (again, s_too) = seen
    assert torch.equal(s, s_too) and torch.equal(again, t_nk)
    assert t_n.tolist() == [0, *t_nk[:-1].tolist()]
    for kind in LCMScheduler, TCDScheduler:
        scheduler = kind.from_config(BETAS, original_inference_steps=n, clip_sample=False)
        scheduler.set_timesteps(phases)
        stops = scheduler.timesteps.tolist()
        assert sorted({*s.tolist()}) == [0, *sorted(stops)[:-1]] and max(stops) == 999 // 1
        # each timestep's edge is the next stop below it
        assert s.tolist() == [max([p for p in (0, *stops) if p < t]) for t in t_nk.tolist()]


def test_a_network_that_is_a_path_is_sampled_along_it(trainer):
    """TCD with eta 0 steps from edge to edge as f does: to the numbers' precision."""
    run, inputs, args = problem(trainer, ZERO, 40, [4])
    scheduler = TCDScheduler.from_config(BETAS | ZERO, original_inference_steps=40)
    scheduler.set_timesteps(4)
    z, c = inputs["noise"][:1], inputs["c"]["prompt"][:1]
    ours = z
    edges = [*scheduler.timesteps.tolist(), 0]
    for t, s in zip(edges, edges[1:], strict=False):
        t, s = torch.tensor([t]), torch.tensor([s])
        with torch.no_grad():
            z = scheduler.step(run.student(z, t, c).sample, t[0], z, eta=0.0).prev_sample
            out = run.student(ours, t, c).sample
            ours = trainer.consistency_function(out, ours, t, run.schedule, s)
        assert torch.allclose(z, ours, atol=1e-5)


# --------------------------------------------------------------------------------------- the flags


def parsed(trainer, *words, **flags):
    """The arguments of a training."""
    given = {"pretrained_teacher_model": "x", "train_data_dir": "x"} | flags
    return trainer.parse_args([*command_line(given), *words])


@pytest.mark.parametrize(
    ("phases", "n"),
    [
        ("1", 50),
        ("2", 50),
        ("4", 40),
        ("8", 40),
        ("5", 50),
        ("8,4,2,1", 40),
        ("4,2,1", 40),
        ("10,4", 40),
        ("25", 50),
        ("50", 50),
        ("1,1", 50),
        (" 4 , 2 ", 40),
        ("1,5,50", 50),
    ],
)
def test_n_where_it_is_not_given(trainer, phases, n):
    """The largest up to 50 into which all phases go."""
    args = parsed(trainer, f"--phases={phases}")
    assert args.num_ddim_timesteps == n and all(n % m == 0 for m in args.phases)


@pytest.mark.parametrize(
    ("phases", "n", "line"),
    [
        ("4", 50, "give one of 40, 20, 8, 4"),
        ("8,4,2,1", 20, "give one of 40, 8"),
        ("3", None, "give 1, 2, 4, 5 or 8 phases"),
        ("7,3", 40, "phases"),
        ("8", 4, "40, 8"),
        ("4", 2, "40, 20, 8, 4"),
        ("99999999999999999999", None, "phases"),
        ("25,8", None, "phases"),
    ],
)
def test_n_that_does_not_fit(trainer, phases, n, line):
    """What would fit is named."""
    with pytest.raises(SystemExit, match=line) as end:
        parsed(trainer, phases=phases, num_ddim_timesteps=n)
    assert "\n" not in str(end.value) and "--phases" in str(end.value)


@pytest.mark.parametrize("n", [None, 8, 10, 20, 25, 40, 50, 80])
def test_phases_where_they_are_not_given(trainer, n):
    """8, 4, 2 and 1 in turn, less those that do not divide N; N is then 40."""
    args = parsed(trainer, **{"num_ddim_timesteps": n} if n else {})
    assert args.num_ddim_timesteps == (n or 40)
    fit = [m for m in (8, 4, 2, 1) if (n or 40) / m == (n or 40) // m]
    assert args.phases == fit and args.phases[-1] == 1
    args.max_train_steps = 1000
    plan = [trainer.phases_at(step, args) for step in range(1000)]
    assert sorted({*plan}, reverse=True) == fit and plan == sorted(plan, reverse=True)


def test_n_beyond_the_list(trainer):
    """Any N that the phases divide is taken where it is given."""
    for phases, n in (("3", 48), ("16", 64), ("1", 33), ("7", 28), ("3,6", 30)):
        assert parsed(trainer, phases=phases, num_ddim_timesteps=n).num_ddim_timesteps == n


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "4,",
        ",4",
        "0",
        "-4",
        "4,0",
        "4.0",
        "four",
        "4;2",
        "[4]",
        "nan",
        "inf",
        "4 2",
        "1e1",
        "4,,2",
    ],
)
def test_odd_phases(trainer, text):
    """One line that names the flag."""
    with pytest.raises(SystemExit, match="--phases") as end:
        parsed(trainer, f"--phases={text}")
    assert "\n" not in str(end.value)


# ---------------------------------------------------------------------------------------- the runs


def test_one_phase_is_as_without(train):
    """Given or not; a plan of ones too. Header and card name LCM's sampler."""
    out = train(**FEW)
    assert series(out) == series(train(phases="1", **FEW)) == series(train(phases="1,1", **FEW))
    about, card = lora_file(out)[1], (out / "README.md").read_text()
    assert (about["phases"], about["sampler"]) == ("1", "lcm") and "LCMScheduler" in card
    assert "sampler lcm" in about["modelspec.usage_hint"] and "TCD" not in card


def test_resume_inside_a_plan(train):
    """To the bit, over the change of phases; the checkpoint is of those it was trained with."""
    flags = FEW | {"max_train_steps": 6, "checkpointing_steps": 3, "phases": "4,2,1"}
    one = train(**flags)
    two = train(**flags, resume_from_checkpoint=one / "checkpoint-3")
    assert same(one, two) and series(two) == series(one)[3:]
    abouts = [lora_file(folder)[1] for folder in (one / "checkpoint-3", one)]
    assert [about["phases"] for about in abouts] == ["2", "1"]
    assert [about["sampler"] for about in abouts] == ["tcd", "lcm"]
    assert abouts[0]["num_ddim_timesteps"] == "40"
    # another length would put the steps that are done into other phases
    longer = flags | {"max_train_steps": 9}
    with pytest.raises(SystemExit, match="--max_train_steps 9 .it was 6"):
        train(**longer, resume_from_checkpoint="latest", output_dir=one)
    with pytest.raises(SystemExit, match="--phases"):
        train(**flags | {"phases": "4,2"}, resume_from_checkpoint="latest", output_dir=one)
    four = FEW | {"phases": "4"}  # without a plan a run may go on
    out = train(**four)
    train(**four | {"max_train_steps": 3}, output_dir=out, resume_from_checkpoint="latest")
    assert series(out) == series(train(**four | {"max_train_steps": 3}))
    (out / "pytorch_lora_weights.safetensors").unlink()  # shorter than it is already
    train(**four | {"max_train_steps": 2}, output_dir=out, resume_from_checkpoint="latest")
    assert lora_file(out)[1]["phases"] == "4"


def snippet(out, folder, **more):
    """The image of the card's code, with a seed and a size."""
    card = (out / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert code.count("**settings)") == 1
    given = "**settings, generator=torch.manual_seed(7), height=32, width=32)"
    names = {"torch": torch}
    exec(code.replace("**settings)", given).replace("lcm.png", f"{folder}/lcm.png"), names)
    return np.asarray(Image.open(folder / "lcm.png"), np.int16), names["pipe"]


@pytest.mark.parametrize("phases", ["1", "4", "2,4"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_the_cards_code(train_by, make_teacher, tmp_path, layout, phases):
    """It makes the last validation's image, and infer.py's: the same scheduler, steps, guidance."""
    trainer = importlib.import_module(f"train_lcm_lora_{layout}")
    flags = FEW | {"phases": phases, "validation_prompts": ["two cats"], "seed": 7}
    out = train_by(trainer, make_teacher(layout, **ZERO))(**flags)
    sampler = "LCM" if phases == "1" else "TCD"
    about = lora_file(out)[1]
    assert about["sampler"] == sampler.lower() and about["phases"] == phases[-1]
    assert json.loads(about["training_args"])["phases"] == [int(m) for m in phases.split(",")]
    image, pipe = snippet(out, tmp_path)
    assert type(pipe.scheduler).__name__ == f"{sampler}Scheduler"
    with Image.open(out / "validation" / "step-000002.png") as shown:
        assert f"Sampler: {sampler}," in shown.info["parameters"]
        assert np.abs(np.asarray(shown.convert("RGB"), np.int16) - image).max() <= 1
    words = ["--prompt", "two cats", "--seed", 7, "--height", 32, "--width", 32, "--device", "cpu"]
    infer.main([*map(str, ["--lora", out, *words, "--output", tmp_path / "infer.png"])])
    made = np.asarray(Image.open(tmp_path / "infer.png"), np.int16)
    assert made.std() > 1 and np.abs(made - image).max() <= 1
    assert (
        f"KSampler: 4 steps, {'lcm' if phases == '1' else 'euler'}"
        in (out / "README.md").read_text()
    )


def test_the_cards_code_keeps_guidance(train, tmp_path):
    """With w_min and w_max of 0 it is guided, and so is the validation."""
    flags = FEW | {"w_min": 0, "w_max": 0, "phases": "4", "validation_prompts": ["two cats"]}
    out = train(**flags, seed=7)
    image, _ = snippet(out, tmp_path)
    with Image.open(out / "validation" / "step-000002.png") as shown:
        assert "CFG scale: 7.5" in shown.info["parameters"]
        assert np.abs(np.asarray(shown, np.int16) - image).max() <= 1


# ------------------------------------------------------------------------------------ trajectories


def path_problem(trainer, settings=None, **more):
    """`problem`, and the teacher's own path through its z_nk: (run, inputs, args, path)."""
    run, inputs, args = problem(trainer, settings or {}, 8, **more)
    run.timesteps = grid = trainer.ddim_timesteps(8, 1000)
    count = len(inputs["t_nk"])
    path, t_to = [inputs["noise"]], torch.zeros(count, dtype=torch.int64)
    for i in range(7, -1, -1):
        t, t_to = grid[i].repeat(count), (grid[i - 1] if i else grid[0] * 0).repeat(count)
        with torch.no_grad():
            given = path[0], t, inputs["c"], inputs["omega"], args
            out = trainer.guided_output(run, *given)
            path.insert(0, run.schedule.ddim_step(out, path[0], t, t_to))
    run.teacher.calls.clear()
    return run, inputs, args, torch.stack(path, 1)


@pytest.mark.parametrize("units", ["x0", "output"])
@pytest.mark.parametrize("phases", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, V], ids=["epsilon", "v"])
def test_a_path_of_the_solver_is_algorithm_1(trainer, settings, phases, units):
    """At its z_nk, the teacher's pass left out: two passes; with the path's target one."""
    more = {"phases": [phases], "loss_units": units}
    run, inputs, args, path = path_problem(trainer, settings, **more)
    place = (inputs["t_nk"] + 1) // 125
    z_nk = path[range(len(path)), place]
    alpha, _ = run.schedule.at(inputs["t_nk"])
    as_images = inputs | {"z": z_nk / alpha, "noise": 0 * z_nk}
    expected = trainer.distillation_loss(run, **as_images, args=args).item()
    assert run.teacher.calls == [(16, False)]
    run.teacher.calls.clear(), run.student.calls.clear()
    as_path = inputs | {"z": path, "noise": None}
    loss = trainer.distillation_loss(run, **as_path, args=args)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert not run.teacher.calls and run.student.calls == [(8, False), (8, True)]
    # the path's own point at the phase's edge
    run.student.calls.clear()
    args.target, losses, phi = "trajectory", [], angles(settings)
    loss = trainer.distillation_loss(run, **as_path, args=args).item()
    assert not run.teacher.calls and run.student.calls == [(8, True)]
    for i in range(8):
        t, k = int(inputs["t_nk"][i]), int(place[i])
        z, edge = z_nk[i : i + 1].double(), next(e for e in range(8, -1, -8 // phases) if e < k)
        goal = path[i : i + 1, edge].double()
        with torch.no_grad():
            prompt = inputs["c"]["prompt"][i : i + 1]
            out = run.student(z.float(), torch.tensor([t]), prompt).sample.double()
        s, gain = 125 * edge - 1 if edge else 0, 1.0
        if phases > 1:
            found = move(phi, z, out, t, s, settings != {})
            if units == "output":
                turn = torch.sin(phi[t] - phi[s])
                gain = 1 / turn if settings else torch.cos(phi[t]) / turn
        else:
            both = torch.cat([phi, phi.new_zeros(1)])
            x0, x = move(both, z, out, t, -1, settings != {}), 10.0 * t
            found = 0.25 / (x**2 + 0.25) * z + x / (x**2 + 0.25) ** 0.5 * x0
            if units == "output":
                turn = torch.sin(phi[t])
                gain = 1 / turn if settings else torch.cos(phi[t]) / turn
        e = gain * (found - goal)
        losses.append(float(((e**2 + args.huber_c**2).sqrt() - args.huber_c).mean()))
    assert loss == pytest.approx(np.mean(losses), rel=3e-4)


TRAJECTORIES = {"w_min": 6.0, "w_max": 6.0, "num_ddim_timesteps": 8, "negative_prompt": "ugly"}


@pytest.fixture(scope="module")
def write_paths(request, teacher, xl_teacher, tmp_path_factory):
    """write_paths(trainer) -> a folder of six random trajectories, as generate_data.py has them."""

    def write(trainer, broken=()):
        folder = tmp_path_factory.mktemp("paths") / "data"
        base = xl_teacher if trainer.FAMILY == "sdxl" else teacher
        flags = {"pretrained_teacher_model": base, "train_data_dir": "x", "resolution": 32}
        args = trainer.parse_args(command_line(flags | TRAJECTORIES))
        args.mixed_precision, args.prediction_type = "no", "epsilon"
        args.rescale_betas_zero_snr = False
        pipe = trainer.load_teacher(args, torch.float32)
        texts, random = (
            ["red apple", "a house", "fish", "rain", "ab", "cd"],
            np.random.default_rng(0),
        )
        known = trainer.encode_captions(pipe, ["", "ugly", *texts])
        rows = []
        for i, text in enumerate(texts):
            path = random.standard_normal((4 * 9, 8, 8)).astype(np.float16)
            row = {"path": path, "captions": [text], "name": text}
            row |= {k: v[i + 2 : i + 3].numpy() for k, v in known.items()}
            row |= {"time_ids": [32, 32, 0, 0, 32, 32]} if trainer.FAMILY == "sdxl" else {}
            rows.append(row | {"unusable": "it is not whole" if i in broken else None})
        features = {"path": datasets.Array3D((36, 8, 8), "float16")}
        for name in known:
            shape = (None, *known[name].shape[1:])
            features[name] = getattr(datasets, f"Array{len(shape)}D")(shape, "float32")
        if trainer.FAMILY == "sdxl":
            features["time_ids"] = datasets.List(datasets.Value("int64"), 6)
        text = datasets.Value("string")
        features |= {"captions": datasets.List(text), "name": text, "unusable": text}
        data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        data.save_to_disk(str(folder))
        what = ["captions", "trajectories"]
        stamp = trainer.make_stamp(args, what) | {"what": what}
        (folder / "encoded.json").write_text(json.dumps(stamp))
        about = {"prompts": json.dumps(["", "ugly", *texts])}
        save_file(known, folder / "prompts.safetensors", about)
        return folder

    return write


@pytest.fixture(scope="module")
def paths(write_paths):
    """Such a folder for the SD 1.5 trainer."""
    return write_paths(importlib.import_module("train_lcm_lora_sd15"))


def test_paths_of_several_sizes(trainer):
    """As columns have them, [h w, channels of all points]: they become [B,N+1,4,h,w] again."""
    args = SimpleNamespace(
        seed=0,
        center_crop=True,
        random_flip=False,
        proportion_empty_prompts=0.0,
        num_ddim_timesteps=8,
        max_prompt_chunks=1,
        w_min=6.0,
        w_max=6.0,
    )
    path, prompt = torch.randn(9, 4, 3, 5).half(), torch.zeros(1, 16, 32)
    record = {"path": path.flatten(0, 1).flatten(1).T, "size": torch.tensor([3, 5]), "name": "x"}
    record |= {"captions": ["x"], "prompt": prompt}
    batch = [trainer.make_sample(record, 0, i, {}, args) | {"unusable": []} for i in range(2)]
    pipe = SimpleNamespace(vae=None, unet=SimpleNamespace(dtype=torch.float32))
    run = SimpleNamespace(pipe=pipe, timesteps=trainer.ddim_timesteps(8, 1000))
    z, c, noise, t_nk, _ = trainer.sample_batch(run, trainer.collate(batch), args)
    assert torch.equal(z, path.float().expand(2, -1, -1, -1, -1)) and noise is None
    assert {*t_nk.tolist()} <= {*run.timesteps.tolist()} and c["prompt"].shape == (2, 16, 32)


def recorded(trainer, monkeypatch):
    """What the loss gets and gives, step by step."""
    seen, loss_of = [], trainer.distillation_loss

    def record(run, *inputs):
        passes = []
        hooks = [
            net.register_forward_hook(lambda *_, name=name: passes.append(name))
            for name, net in (("teacher", run.teacher), ("student", run.target))
        ]
        loss = loss_of(run, *inputs)
        for hook in hooks:
            hook.remove()
        seen.append((inputs, loss.item(), passes))
        return loss

    monkeypatch.setattr(trainer, "distillation_loss", record)
    return seen


@pytest.mark.parametrize("target", ["network", "trajectory"])
def test_training_on_trajectories(request, trainer, train_by, write_paths, monkeypatch, target):
    """The latents are the record's, at the points of the path; 2 passes, or one, none guided."""
    folder, xl = write_paths(trainer, broken=[1]), trainer.FAMILY == "sdxl"
    base = request.getfixturevalue("xl_teacher" if xl else "teacher")
    train, seen = train_by(trainer, base), recorded(trainer, monkeypatch)
    out = train(dataset_name=folder, phases="4", target=target, **FEW, **TRAJECTORIES)
    monkeypatch.undo()
    names = {"trajectory": ["student"], "network": ["student", "student"]}
    stored = {row["name"]: torch.tensor(row["path"]) for row in datasets.load_from_disk(folder)}
    phi = angles({})
    assert len(seen) == 2
    for (path, c, noise, t_nk, _, _), loss, passes in seen:
        assert passes == names[target] and noise is None and path.shape == (2, 9, 4, 8, 8)
        found = [
            [n for n, p in stored.items() if torch.equal(p.float(), one.flatten(0, 1))]
            for one in path
        ]
        assert all(len(some) == 1 and some != ["a house"] for some in found)
        if target == "trajectory" and loss == seen[0][1]:  # the LoRA is still 0: the teacher's UNet
            kind = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
            unet = kind.from_pretrained(base).unet
            losses = []
            for i, t in enumerate(t_nk.tolist()):
                k = (t + 1) // 125
                edge = (k - 1) // 2 * 2
                z, s = path[i : i + 1, k], 125 * edge - 1 if edge else 0
                added = {n: v[i : i + 1] for n, v in c.items() if n != "prompt"}
                with torch.no_grad():
                    out_ = unet(z, t, c["prompt"][i : i + 1], added_cond_kwargs=added).sample
                e = move(phi, z.double(), out_.double(), t, s, False) - path[i : i + 1, edge]
                losses.append(float(((e**2 + 1e-6).sqrt() - 1e-3).mean()))
            assert loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert [row["loss"] for row in log(out)] == [loss for _, loss, _ in seen]


REFUSED = {
    "flip": ({"random_flip": True}, "--random_flip: .* has no mirrored"),
    "empty": ({"proportion_empty_prompts": 0.1}, "--proportion_empty_prompts: the paths"),
    "guidance": ({"w_max": 7.0}, "w_max 6.0, this run has 7.0"),
    "N": ({"num_ddim_timesteps": 4}, "num_ddim_timesteps 8, this run has 4"),
    "null": ({"negative_prompt": "bad"}, "negative_prompt ugly, this run has bad"),
    "rescale": ({"guidance_rescale": 0.7}, "guidance_rescale 0.0, this run has 0.7"),
    "v": ({"prediction_type": "v_prediction"}, "prediction_type epsilon, this run has v"),
    "resolution": ({"resolution": 64}, "resolution 32, this run has 64"),
    "chunks": ({"max_prompt_chunks": 2}, "max_prompt_chunks 1, this run has 2"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_trajectories_of_another_run(train, paths, kind):
    """One line each, before anything is written."""
    flags, message = REFUSED[kind]
    with pytest.raises(SystemExit, match=message) as end:
        train(dataset_name=paths, **FEW | TRAJECTORIES | {"phases": "4"} | flags)
    assert "\n" not in str(end.value)


def test_trajectories_of_another_teacher(train_by, sd15, make_teacher, paths):
    """Its UNet is told by its weights, not by its name."""
    train = train_by(sd15, make_teacher(seed=1))
    with pytest.raises(SystemExit, match="was encoded with (UNet|VAE|text)"):
        train(dataset_name=paths, phases="4", **FEW, **TRAJECTORIES)


def test_target_without_paths(train, tmp_path):
    """Of images there are none."""
    with pytest.raises(SystemExit, match="--target trajectory: make data by .*--trajectories"):
        train(target="trajectory", output_dir=tmp_path / "out", **FEW)
    assert not (tmp_path / "out").exists()


def test_trajectories_resume_and_do_not_depend_on_readers(train, paths):
    """As any data."""
    flags = FEW | TRAJECTORIES | {"dataset_name": paths, "phases": "4", "max_train_steps": 4}
    one = train(**flags, checkpointing_steps=2)
    two = train(**flags, checkpointing_steps=2, resume_from_checkpoint=one / "checkpoint-2")
    assert same(one, two) and series(two) == series(one)[2:]
    assert math.isfinite(series(one)[-1][0])
    assert series(train(**flags, dataloader_num_workers=2)) == series(one)
    assert len(series(train(**flags, streaming=True))) == 4
