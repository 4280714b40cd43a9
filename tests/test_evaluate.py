"""scripts/evaluate.py: its mathematics on constructed numbers, and its check of the LoRA."""

import evaluate_demo
import metrics
import pytest
import torch
from conftest import LORA
from diffusers import LCMScheduler
from test_lora_files import open_pipe, train
from torchmetrics.image.kid import poly_mmd


def normal(*shape, seed=0):
    """Standard normal float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kid_is_torchmetrics_mmd():
    x, y = normal(60, 12), normal(60, 12, seed=1) * 1.5 + 0.3
    torch.testing.assert_close(metrics.kid(x, y), poly_mmd(x, y))


def test_kid_of_unequal_sizes_is_unbiased():
    values = [
        metrics.kid(normal(10, 4, seed=i), normal(40, 4, seed=10_000 + i)) for i in range(800)
    ]
    values = torch.stack(values)
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5


def test_paired_kid_is_the_sum_over_distinct_prompts():
    x, y = normal(7, 3), normal(7, 3, seed=1)
    w = torch.tensor([[1.0] * 7, [2, 0, 1, 0, 3, 1, 0]], dtype=torch.float64)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    for row, got in zip(w, metrics.paired_kid(x, y, w)):
        total = weight = 0
        for i in range(7):
            for j in range(7):
                if i != j:
                    h = k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(y[i], x[j])
                    total, weight = total + row[i] * row[j] * h, weight + row[i] * row[j]
        torch.testing.assert_close(got, total / weight)


def test_paired_kid_has_no_bias_where_pairs_are_alike():
    """Same distribution, correlated pairs: KID over all pairs falls below 0, the paired one not."""
    one, paired, classic = torch.ones(1, 20, dtype=torch.float64), [], []
    for i in range(600):
        shared = normal(20, 4, seed=i)
        x, y = (shared + 0.5 * normal(20, 4, seed=10_000 * k + i) for k in (1, 2))
        paired.append(metrics.paired_kid(x, y, one)[0])
        classic.append(metrics.kid(x, y))
    paired, classic = torch.stack(paired), torch.stack(classic)
    assert abs(paired.mean()) < 4 * paired.std() / len(paired) ** 0.5
    assert classic.mean() < -4 * classic.std() / len(classic) ** 0.5


def test_resampling():
    w = metrics.resampling(50, 400, seed=3)
    assert w.shape == (401, 50) and (w[0] == 1).all() and (w.sum(1) == 50).all()
    assert torch.equal(w, metrics.resampling(50, 400, seed=3))
    assert not torch.equal(w, metrics.resampling(50, 400, seed=4))


def test_interval_of_kid_covers_the_truth():
    """Means 0 and 1 in one dimension: E k(x, y) = E (xy + 1)^3, inside in most of 40."""
    # E(xy+1)^3 = E x^3 E y^3 + 3 E x^2 E y^2 + 3 E x E y + 1
    # moments of N(0,1): 0, 1, 0; of N(1,1): 1, 2, 4
    truth = (0 + 3 + 0 + 1) + (16 + 12 + 3 + 1) - 2 * (0 + 6 + 0 + 1)
    inside = 0
    for i in range(40):
        x, y = normal(200, 1, seed=i), normal(200, 1, seed=1000 + i) + 1
        e = metrics.estimate(metrics.paired_kid(x, y, metrics.resampling(200, 200, seed=i)))
        assert e["low"] < e["value"] < e["high"]
        inside += e["low"] <= truth <= e["high"]
    assert inside >= 33


def test_ratio_says_nothing_about_a_denominator_near_zero():
    w = metrics.resampling(100, 200, seed=0)
    a, b = w @ normal(100, seed=1).abs() / 100, w @ normal(100, seed=2) / 100
    assert metrics.ratio(a, b) is None
    assert metrics.ratio(a, a) == {"value": 1, "low": 1, "high": 1}
    assert (
        metrics.show(None) == "not meaningful"
        and metrics.show(metrics.ratio(a, a)) == "1.00 [1.00, 1.00]"
    )


def test_frechet_distance_of_gaussians_that_are_known():
    """Commuting covariances: |mu_x - mu_y|^2 + sum_i (s_i - t_i)^2, with those moments."""
    d, n = 5, 200
    z = normal(n, d)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (n - 1))).T  # mean 0, covariance I
    s, t = torch.tensor([1.0, 2, 3, 0.5, 1]).double(), torch.tensor([2.0, 1, 3, 0.1, 4]).double()
    rotation = torch.linalg.qr(normal(d, d, seed=4)).Q
    mean = torch.arange(5).double()
    truth = mean.square().sum() + (s - t).square().sum()
    torch.testing.assert_close(metrics.frechet(z * s @ rotation, z * t @ rotation + mean), truth)


def test_f_theta_is_the_identity_at_zero_and_x0_far_from_it():
    z, x0 = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    torch.testing.assert_close(evaluate_demo.f_theta(z, x0, 0), z)
    torch.testing.assert_close(evaluate_demo.f_theta(z, x0, 999), x0, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_f_theta_is_what_lcm_scheduler_denoises_to(prediction_type):
    scheduler = LCMScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    z, output = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    t = scheduler.timesteps[1]
    alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
    x0 = (
        (z - sigma * output) / alpha if prediction_type == "epsilon" else alpha * z - sigma * output
    )
    torch.testing.assert_close(
        evaluate_demo.f_theta(z, x0, t), scheduler.step(output, t, z).denoised
    )


def test_squared_distance_is_a_mean_over_the_latent():
    a, b = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    b[1] = 3
    assert metrics.squared_distance(a, b).tolist() == [0, 9]


def test_recognition():
    angle = torch.tensor([0, 10, 20, 30, 40, 50, 60, 70]).double().deg2rad()
    gallery = torch.stack([angle.cos(), angle.sin()], 1)
    generated = gallery[[0, 0, 0]] * 5  # cosine: the length must not matter
    assert metrics.recognised(generated, gallery, [0, 4, 5]).tolist() == [1, 1, 0]
    assert metrics.recognised(generated, gallery, [0, 1, 2], k=1).tolist() == [1, 0, 0]


def test_identical_images_of_other_captions_do_not_hide_the_own_one():
    angle = torch.tensor([10.0] * 8 + [40]).double().deg2rad()
    gallery = torch.stack([angle.cos(), angle.sin()], 1)
    gallery[:8] *= 1 + 1e-9 * normal(8, 1)
    generated = torch.tensor([[1.0, 0]]).double()
    assert all(metrics.recognised(generated, gallery, [own]).item() == 1 for own in range(8))
    assert metrics.recognised(generated, gallery, [8]).item() == 0


def test_arguments(tmp_path, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as error:
            evaluate_demo.parse_args([*argv])
        assert error.value.code == 2
        return capsys.readouterr().err

    assert "no such .safetensors" in refused("lora", "--lora", str(tmp_path))
    (tmp_path / "x.bin").touch()
    assert "no such .safetensors" in refused("lora", "--lora", str(tmp_path / "x.bin"))
    assert "no train.parquet" in refused("teacher", "--output_dir", "x", "--data", str(tmp_path))
    assert "2 or more" in refused("teacher", "--output_dir", "x", "--num_prompts", "1")
    assert "begin with train" in refused("teacher", "--output_dir", "x", "--gallery", "twemoji")
    (tmp_path / evaluate_demo.LORA_FILE).touch()
    assert (
        evaluate_demo.parse_args(["lora", "--lora", str(tmp_path)]).lora
        == tmp_path / evaluate_demo.LORA_FILE
    )


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_every_layer_of_the_lora_is_checked(request, tmp_path, layout):
    """In the names of each family; what the pipeline did not take is noticed."""
    trainer = request.getfixturevalue(layout)
    teacher = request.getfixturevalue("teacher" if layout == "sd15" else "xl_teacher")
    train(trainer, teacher, tmp_path)
    evaluate_demo.load_lora(open_pipe(teacher), tmp_path / LORA)
    pipe = open_pipe(teacher)
    pipe.load_lora_weights = lambda *given, **more: None
    with pytest.raises(SystemExit, match="--lora .*: 0 of .* layers loaded, 0 in the UNet"):
        evaluate_demo.load_lora(pipe, tmp_path / LORA)
