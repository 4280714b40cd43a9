"""The mathematics of the trainer against diffusers' schedulers and closed forms.

And against Algorithm 1 written a second time.
"""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from PIL import Image

BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
PREDICTIONS = ["epsilon", "v_prediction"]
GRID = list(range(19, 1000, 20))


def config(prediction_type="epsilon", **more):
    """The config of a teacher's scheduler."""
    return dict(DDIMScheduler(**BETAS, prediction_type=prediction_type, **more).config)


def alpha_sigma():
    """alpha and sigma of the scaled_linear schedule in float64, from its definition."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)
    return torch.from_numpy(np.sqrt(alpha_bar)), torch.from_numpy(np.sqrt(1 - alpha_bar))


def latents(count=2, seed=0, dtype=torch.float32):
    """Random latents [count,4,6,6]."""
    return torch.randn(
        count, 4, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def close(a, b, tolerance=1e-5):
    """Whether a equals b to `tolerance` of b's largest element."""
    return (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


# --------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_solver_is_ddim(sd15, prediction_type):
    """Every step of the grid, the last to t = 0 included, is DDIMScheduler's.

    Its clipping is off, as in a teacher's config.
    """
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(50)
    schedule = sd15.NoiseSchedule(scheduler.config, "cpu")
    assert (
        scheduler.timesteps.tolist() == GRID[::-1] == sd15.ddim_timesteps(50, 1000).tolist()[::-1]
    )
    for i, t in enumerate(scheduler.timesteps):
        z, output = latents(seed=i), latents(seed=100 + i)
        ours = schedule.ddim_step(output, z, t.expand(2), (t - 20).clamp(min=0).expand(2))
        assert close(ours, scheduler.step(output, t, z).prev_sample, 2e-6), f"t = {t}"


@pytest.mark.parametrize("steps", [1, 7, 40, 50, 1000])
def test_grid_is_that_of_lcm_scheduler(sd15, steps):
    scheduler = LCMScheduler(**BETAS, original_inference_steps=steps)
    scheduler.set_timesteps(num_inference_steps=steps)
    assert scheduler.timesteps.tolist() == sd15.ddim_timesteps(steps, 1000).tolist()[::-1]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_solver_step_to_the_same_time_is_nothing(sd15, prediction_type):
    schedule, t = sd15.NoiseSchedule(config(prediction_type), "cpu"), torch.tensor([0, 500])
    assert close(schedule.ddim_step(latents(seed=1), latents(), t, t), latents())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_outputs_turn_into_x0_and_noise_and_back(sd15, prediction_type):
    """From (x0, eps) made in float64, through the network's output, to (x0, eps) again."""
    alpha, sigma = alpha_sigma()
    schedule = sd15.NoiseSchedule(config(prediction_type), "cpu")
    x0, eps = latents(1, 1, torch.float64), latents(1, 2, torch.float64)
    for t in [0, *GRID]:
        z = alpha[t] * x0 + sigma[t] * eps
        output = eps if prediction_type == "epsilon" else alpha[t] * eps - sigma[t] * x0
        ours = schedule.x0_and_eps(output.float(), z.float(), torch.tensor([t]))
        assert close(ours[0], x0, 1e-5) and close(ours[1], eps, 1e-5), f"t = {t}"


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_units_of_the_output(sd15, prediction_type):
    """An error of the output, carried to x0 and scaled back, has the size that it had.

    At every timestep of the grid.
    """
    schedule = sd15.NoiseSchedule(config(prediction_type), "cpu")
    z, output, error = latents(), latents(seed=1), latents(seed=2)
    for t in GRID:
        t = torch.tensor([t, t])
        x0, wrong = (schedule.x0_and_eps(out, z, t)[0] for out in (output, output + error))
        assert close((schedule.output_per_f(t) * (wrong - x0)).abs(), error.abs(), 1e-3)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_loss_in_units_of_the_output(sd15, prediction_type):
    """Each sample's distance counts by its timestep's factor, and by nothing else."""
    run, inputs, args = problem(sd15, prediction_type, "l2")

    def loss(rows, units):
        args.loss_units = units
        part = {name: value[rows] for name, value in inputs.items() if name != "c"}
        c = {"prompt": inputs["c"]["prompt"][rows]}
        return sd15.distillation_loss(run, c=c, **part, args=args).item()

    rows = [slice(i, i + 1) for i in range(4)]
    factors = run.schedule.output_per_f(inputs["t_nk"]).flatten().tolist()
    assert factors[0] / factors[3] > 5
    apart = [factor**2 * loss(row, "x0") for factor, row in zip(factors, rows, strict=True)]
    assert [loss(row, "output") for row in rows] == pytest.approx(apart, rel=1e-4)
    assert loss(slice(0, 4), "output") == pytest.approx(sum(apart) / 4, rel=1e-4)


def test_schedule_is_float32_and_right(sd15):
    schedule = sd15.NoiseSchedule(config(), "cpu")
    alpha, sigma = alpha_sigma()
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float32
    assert close(schedule.alpha, alpha, 1e-6)
    assert ((schedule.sigma - sigma).abs() / sigma).max() < 1e-4
    assert (schedule.alpha.double() ** 2 + schedule.sigma.double() ** 2 - 1).abs().max() < 1e-6


def test_defect_10_noising_is_float32(sd15):
    """At t = 19, where bf16 makes sigma 4.8% too large."""
    alpha, sigma = alpha_sigma()
    z, noise = latents(seed=1), latents(seed=2)
    ours = sd15.NoiseSchedule(config(), "cpu").add_noise(z, noise, torch.tensor([19, 19]))
    assert close(ours, alpha[19] * z.double() + sigma[19] * noise.double(), 1e-6)


def test_epsilon_with_zero_terminal_snr_is_refused(sd15):
    with pytest.raises(SystemExit, match="rescale_betas_zero_snr"):
        sd15.NoiseSchedule(config(rescale_betas_zero_snr=True), "cpu")


def test_other_predictions_are_refused(sd15):
    with pytest.raises(SystemExit, match="prediction_type .*'sample'"):
        sd15.NoiseSchedule(config("sample"), "cpu")


def test_a_scheduler_without_betas_is_refused(sd15):
    """Such as Playground's: diffusers would make a schedule of its own defaults."""
    for scheduler in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(
            SystemExit, match=f"the teacher's scheduler is {type(scheduler).__name__}: .*betas"
        ):
            sd15.NoiseSchedule(json.loads(scheduler.to_json_string()), "cpu")


def test_v_with_zero_terminal_snr_is_finite(sd15):
    schedule, t = (
        sd15.NoiseSchedule(config("v_prediction", rescale_betas_zero_snr=True), "cpu"),
        torch.tensor([999, 999]),
    )
    assert schedule.alpha[999] == 0
    step = schedule.ddim_step(latents(seed=1), latents(), t, t - 20)
    assert torch.isfinite(step).all()
    assert close(schedule.x0_and_eps(latents(seed=1), latents(), t)[0], -latents(seed=1))


# ------------------------------------------------------------------------- the consistency function


def test_boundary_scalings_are_those_of_lcm_scheduler(sd15):
    scheduler = LCMScheduler(**BETAS)
    for t in [0, 1, *GRID]:
        c_skip, c_out = sd15.boundary_scalings(torch.tensor([t]))
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        assert c_skip.shape == c_out.shape == (1, 1, 1, 1)
        assert torch.allclose(
            torch.stack([c_skip, c_out]).flatten(), torch.stack(expected), rtol=1e-6
        )


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_consistency_function_is_the_identity_at_0(sd15, prediction_type):
    schedule = sd15.NoiseSchedule(config(prediction_type), "cpu")
    t = torch.tensor([0, 0])
    assert torch.equal(
        sd15.consistency_function(latents(seed=1), latents(), t, schedule), latents()
    )


def test_distances_in_closed_form(sd15):
    a, b = torch.tensor([0.0, 3.0, -2.0]), torch.tensor([0.0, -1.0, 1.0])
    assert sd15.distance(a, b, "l2", 3.0).item() == pytest.approx((16 + 9) / 3)
    assert sd15.distance(a, b, "huber", 3.0).item() == pytest.approx((0 + 5 - 3 + 18**0.5 - 3) / 3)


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_gradient_of_the_distance(sd15, loss_type):
    """Zero and finite where a = b.

    Elsewhere e / sqrt(e^2 + c^2) and 2 e, over the number of elements.
    """
    a = torch.tensor([1.0, 5.0], requires_grad=True)
    sd15.distance(a, torch.tensor([1.0, 1.0]), loss_type, 3.0).backward()
    assert a.grad.tolist() == pytest.approx([0, {"huber": 4 / 5 / 2, "l2": 8 / 2}[loss_type]])


# -------------------------------------------------------------------------------------- Algorithm 1


class Toy(torch.nn.Module):
    """A network with a UNet's call: an affine function of z, t and the mean of the condition."""

    def __init__(self, seed):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, generator=random, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight.float())
        self.calls = []

    def forward(self, z, t, encoder_hidden_states, added_cond_kwargs=None):
        self.calls.append((torch.is_grad_enabled(), len(z)))
        w, c = self.weight.to(z.dtype), encoder_hidden_states.mean((1, 2))[:, None, None, None]
        time = torch.sin(t.to(z.dtype) / 100)[:, None, None, None]
        return SimpleNamespace(
            sample=w[0] * z
            + w[1] * z.roll(1, -1)
            + w[2] * time * z
            + w[3] * c * z
            + w[4] * c
            + w[5]
        )


def algorithm_1(
    teacher, student, z, c, null, noise, t_nk, omega, prediction_type, loss_type, huber_c
):
    """The report's Algorithm 1 in float64, sample by sample, every pass apart.

    Psi is as the report writes it. teacher and student: network(z, t, conditions) with a float64
    `sample`; c: {name: [B,...]}; null: {name: [1,...]}, what the empty prompt replaces of it.
    """
    alpha, sigma = alpha_sigma()

    def of(i):
        return {name: value[i : i + 1].double() for name, value in c.items()}

    empty = {name: value.double() for name, value in null.items()}

    def x0_eps(output, z_t, t):
        if prediction_type == "epsilon":
            return (z_t - sigma[t] * output) / alpha[t], output
        return alpha[t] * z_t - sigma[t] * output, sigma[t] * z_t + alpha[t] * output

    def psi(z_t, t, s, condition):
        x0, eps = x0_eps(teacher(z_t, torch.tensor([t]), condition).sample, z_t, t)
        return alpha[s] * x0 + sigma[s] * eps - z_t

    def f(z_t, t, condition):
        x0, _ = x0_eps(student(z_t, torch.tensor([t]), condition).sample, z_t, t)
        return 0.25 / ((10 * t) ** 2 + 0.25) * z_t + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * x0

    total = 0.0
    for i, t in enumerate(t_nk.tolist()):
        here, s, w = slice(i, i + 1), max(t - 20, 0), float(omega[i])
        z_nk = alpha[t] * z[here].double() + sigma[t] * noise[here].double()
        with torch.no_grad():
            z_hat = z_nk + (1 + w) * psi(z_nk, t, s, of(i)) - w * psi(z_nk, t, s, of(i) | empty)
            goal = f(z_hat, s, of(i))
        e2 = (f(z_nk, t, of(i)) - goal) ** 2
        total = total + (e2 if loss_type == "l2" else torch.sqrt(e2 + huber_c**2) - huber_c).mean()
    return total / len(z)


def problem(sd15, prediction_type="epsilon", loss_type="huber", omega=(3.0, 7.5, 15.0, 4.0)):
    """One step of toy networks: (what the loss needs of a Run, its inputs, args)."""
    random, teacher, student = torch.Generator().manual_seed(5), Toy(1), Toy(2)
    c, null = torch.randn(4, 3, 8, generator=random), torch.randn(1, 3, 8, generator=random)
    schedule = sd15.NoiseSchedule(config(prediction_type), "cpu")
    nets = {"teacher": teacher, "student": student, "target": student}
    inputs = {
        "z": latents(4, 1),
        "c": {"prompt": c},
        "noise": latents(4, 2),
        "t_nk": torch.tensor([19, 259, 739, 999]),
        "omega": torch.tensor(omega)[:, None, None, None],
    }
    args = SimpleNamespace(
        num_ddim_timesteps=50,
        loss_type=loss_type,
        huber_c=0.1,
        loss_units="x0",
        phases=[1],
        target="network",
        w_min=3.0,
        w_max=15.0,
        guidance_rescale=0.0,
        max_train_steps=1,
    )
    return SimpleNamespace(**nets, schedule=schedule, c_null={"prompt": null}, step=0), inputs, args


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_distillation_loss_is_algorithm_1(sd15, prediction_type, loss_type):
    """Value and gradient; the target, though the same network, gets no gradient."""
    run, inputs, args = problem(sd15, prediction_type, loss_type)
    loss = sd15.distillation_loss(run, **inputs, args=args)
    loss.backward()
    again = Toy(2)
    nets = [lambda z, t, c, toy=toy: toy(z, t, c["prompt"]) for toy in (Toy(1), again)]
    kinds = {"prediction_type": prediction_type, "loss_type": loss_type, "huber_c": args.huber_c}
    expected = algorithm_1(*nets, **inputs, null=run.c_null, **kinds)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert close(run.student.weight.grad, again.weight.grad, 1e-4)
    assert run.teacher.weight.grad is None


def test_omega_0_is_the_conditional_teacher(sd15):
    """Then the null prompt does not matter; with omega it does."""
    for omega, matters in ((0.0, False), (7.5, True)):
        run, inputs, args = problem(sd15, omega=(omega,) * 4)
        loss = sd15.distillation_loss(run, **inputs, args=args)
        run.c_null = {"prompt": run.c_null["prompt"] + 5}
        changed = sd15.distillation_loss(run, **inputs, args=args)
        assert (abs(changed - loss) > 1e-3 * loss) == matters


def test_passes_of_a_step(sd15):
    """Teacher once for prompt and null together, target without gradient, the student last.

    Only the student's pass is recorded for a gradient.
    """
    run, inputs, args = problem(sd15)
    run.target, order = Toy(2), []
    for name in ("teacher", "target", "student"):
        vars(run)[name].register_forward_hook(
            lambda net, given, result, name=name: order.append((name, *net.calls[-1]))
        )
    sd15.distillation_loss(run, **inputs, args=args)
    assert order == [("teacher", False, 8), ("target", False, 4), ("student", True, 4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_defect_09_no_autocast(sd15, dtype):
    """The network is called as where its LoRA is used: in the base's type, under no autocast."""
    seen = []

    def unet(z, t, prompt, added_cond_kwargs):
        seen.append((torch.is_autocast_enabled("cpu"), z.dtype))
        return SimpleNamespace(sample=z)

    unet.parameters = lambda: iter([torch.zeros(1, dtype=dtype)])
    output = sd15.predict(unet, latents(), torch.tensor([1, 2]), {"prompt": latents()})
    assert seen == [(False, dtype)] and output.dtype == torch.float32


# --------------------------------------------------------------------------------------- randomness


def test_defect_11_no_two_samples_share_noise(sd15):
    """A stream is a pure function of seed, step, place and purpose, and each of them changes it."""
    base = (0, 3, 1, "noise")
    first = sd15.rng(*base).standard_normal(8).tolist()
    others = [
        (1, 3, 1, "noise"),
        (2**32, 3, 1, "noise"),
        (0, 4, 1, "noise"),
        (0, 3, 2, "noise"),
        (0, 1, 3, "noise"),
    ]
    others += [(0, 3, 1, purpose) for purpose in sd15.PURPOSES if purpose != "noise"]
    values = [sd15.rng(*other).standard_normal(8).tolist() for other in others]
    assert len({tuple(value) for value in [first, *values]}) == len(others) + 1
    assert sd15.rng(*base).standard_normal(8).tolist() == first


def test_noise_does_not_depend_on_the_batch(sd15):
    whole = sd15.normal(0, 7, [0, 1, 2, 3], "noise", [4, 2, 2])
    parts = [sd15.normal(0, 7, places, "noise", [4, 2, 2]) for places in ([2, 3], [0, 1])]
    assert whole.dtype == torch.float32
    assert torch.equal(whole, torch.cat(parts[::-1]))


def test_noise_is_standard_normal(sd15):
    """Mean, variance, skewness and kurtosis of 400,000 numbers, to five of their standard errors.

    Places are uncorrelated.
    """
    x = sd15.normal(0, 0, range(400), "noise", [1000]).double()
    assert abs(x.mean()) < 5 / 400_000**0.5
    assert abs(x.var() - 1) < 5 * (2 / 400_000) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / 400_000) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / 400_000) ** 0.5
    assert abs((x[::2] * x[1::2]).mean()) < 5 / 200_000**0.5


# ------------------------------------------------------------------------------------ order of data


def stream(sd15, count, steps, size, parts=1, world=1, rank=0, first=0):
    """[(places, captions)] of the batches that one rank's loader reads.

    The captions are the records' numbers.
    """
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    records = [
        {"image": {"bytes": file.getvalue(), "path": None}, "text": str(i)} for i in range(count)
    ]
    args = SimpleNamespace(
        seed=0, image_column="image", caption_column="text", resolution=8, center_crop=True,
        random_flip=False, proportion_empty_prompts=0.0, train_batch_size=size,
        gradient_accumulation_steps=parts, max_train_steps=steps, dataloader_num_workers=0,
        streaming=False,
    )  # fmt: skip
    loader = sd15.make_loader(records, None, args, first, rank, world)
    return [(batch["place"], batch["caption"]) for batch in loader]


def test_an_epoch_is_a_permutation_and_batches_cross_epochs(sd15):
    batches = stream(sd15, count=7, steps=14, size=2)
    seen = [caption for _, captions in batches for caption in captions]
    epochs = [seen[i : i + 7] for i in range(0, 28, 7)]
    assert all(len(captions) == 2 for _, captions in batches)
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_ranks_and_micro_steps_share_out_one_stream(sd15):
    one = stream(sd15, count=7, steps=3, size=8)
    for parts, world in ((4, 1), (1, 4), (2, 2)):
        ranks = [stream(sd15, 7, 3, 2, parts, world, rank) for rank in range(world)]
        for step, (places, captions) in enumerate(one):
            batches = [batch for rank in ranks for batch in rank[step * parts : (step + 1) * parts]]
            assert [p for batch in batches for p in batch[0]] == places == list(range(8))
            assert [c for batch in batches for c in batch[1]] == captions


def test_resuming_the_stream_is_a_number(sd15):
    assert stream(sd15, 7, 6, 3, first=4) == stream(sd15, 7, 6, 3)[4:]
