"""What the evaluations measure: distances of sets of features, intervals, and their tables."""

import numpy as np
import torch


def poly_kernel(x, y):
    """KID's kernel k(a, b) = (a.b / D + 1)^3 of features x [n,D] and y [m,D] -> [n,m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def squared_distance(a, b):
    """Mean squared distance (1/D) |a_i - b_i|^2 of latents; a, b [N,4,h,w] -> float64 [N]."""
    return (a - b).double().square().flatten(1).mean(1).cpu()


def kid(x, y):
    """Unbiased squared maximum mean discrepancy of independent sets x [n,D] and y [m,D].

    KID = mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)
    a scalar, about 0 for sets that are alike
    """

    def within(f):
        """The mean kernel of distinct members of a set."""
        kernel = poly_kernel(f, f)
        return (kernel.sum() - kernel.trace()) / (len(f) * (len(f) - 1))

    return within(x) + within(y) - 2 * poly_kernel(x, y).mean()


def kid_to(x, y, weights_x, weights_y):
    """KID of images x [n,D] to y [m,D] for each row of resampling weights [R,n], [R,m]; [R].

    KID(w, v) = sum_{i!=j} w_i w_j k(x_i,x_j) / sum_{i!=j} w_i w_j, the same of y and v, and
                - 2 sum_ij w_i v_j k(x_i,y_j) / sum_ij w_i v_j
    Copies of one image in a resample are not paired with each other: they would count as perfect
    matches.
    """

    def within(f, w):
        """The weighted mean kernel of distinct members of a set."""
        kernel = poly_kernel(f, f).fill_diagonal_(0)
        return ((w @ kernel) * w).sum(1) / (w.sum(1).square() - w.square().sum(1))

    cross = ((weights_x @ poly_kernel(x, y)) * weights_y).sum(1)
    cross = cross / (weights_x.sum(1) * weights_y.sum(1))
    return within(x, weights_x) + within(y, weights_y) - 2 * cross


def paired_kid(x, y, weights):
    """KID of sets paired by prompt, x, y [n,D], for each row of resampling weights [R,n]; [R].

    KID(w) = sum_{i!=j} w_i w_j h_ij / sum_{i!=j} w_i w_j
    h_ij = k(x_i,x_j) + k(y_i,y_j) - k(x_i,y_j) - k(y_i,x_j)

    x_i and y_i share prompt and noise, so k(x_i, y_i) is no sample of independent images: kept, it
    would pull close sets below 0. Without i = j the figure is unbiased. A bootstrap resample holds
    copies of a prompt; copies paired with each other would count as perfect matches and push the
    figure up. With multinomial weights on the kernel matrices every pair of the same original
    prompt stays out.
    """
    cross = poly_kernel(x, y)
    h = (poly_kernel(x, x) + poly_kernel(y, y) - cross - cross.T).fill_diagonal_(0)
    return ((weights @ h) * weights).sum(1) / (weights.sum(1).square() - weights.square().sum(1))


def frechet(x, y):
    """Frechet distance of Gaussians fitted to x [n,D] and y [m,D]; in squared feature units, >= 0.

    |mu_x - mu_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)),  S_x = R_x^T R_x

    The eigenvalues of S_x S_y are the squared singular values of R_x R_y^T. So nothing is lost to a
    square root of rounding errors where there are fewer images than features, and it is fast.
    """

    def factor(f):
        """R [min(n,D),D], upper triangular, of centred features."""
        return torch.linalg.qr((f - f.mean(0)) / (len(f) - 1) ** 0.5, mode="r").R

    r_x, r_y = factor(x), factor(y)
    root = torch.linalg.svdvals(r_x @ r_y.T).sum()
    return (
        (x.mean(0) - y.mean(0)).square().sum() + r_x.square().sum() + r_y.square().sum() - 2 * root
    )


def cosine_distance(x, y):
    """Paired distance 1 - x_i.y_i / (|x_i| |y_i|) of features x, y [n,D] -> [n], 0 to 2."""
    return 1 - torch.nn.functional.cosine_similarity(x, y)


def detail(images, cutoff=1 / 8):
    """Energy of an image's fine structure; uint8 [n,3,H,W] -> float64 [n], in squared grey levels.

    sum over |f| >= cutoff of |F(f)|^2 / (H W)^2, F the Fourier transform of the luminance times a
    Hann window (an image is no torus: its borders would count as edges). Frequencies |f| are in
    cycles per pixel, so the default is what is finer than 8 pixels, the VAE's own grid.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    grey = torch.einsum("nchw,c->nhw", images.float(), weights).cpu().double()
    height, width = grey.shape[1:]
    window = torch.hann_window(height, dtype=grey.dtype)[:, None]
    window = window * torch.hann_window(width, dtype=grey.dtype)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window
    energy = torch.fft.fft2(grey).abs().square() / (height * width) ** 2
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width))
    return (energy * (frequency >= cutoff)).sum((1, 2))


def recognised(generated, gallery, own, k=5):
    """Whether gallery image own[i] is among the k nearest of generated[i]; float64 [n], 0 or 1.

    generated x [n,D], gallery y [m,D], own integers [n]. Cosine distance
    d_ij = 1 - x_i.y_j / (|x_i| |y_j|); found if d_i,own[i] <= the k-th smallest d_i. So ties
    (identical images with different captions) count as found; 1e-6 is room for the rounding by
    which their features differ.
    """
    normalise = torch.nn.functional.normalize
    distance = 1 - normalise(generated) @ normalise(gallery).T
    kth = distance.kthvalue(min(k, len(gallery)), dim=1).values
    return (distance[np.arange(len(generated)), own] <= kth + 1e-6).double()


def resampling(n, replicates, seed):
    """How often each of n prompts counts, float64 [1 + replicates, n]: 1, then resamples."""
    counts = np.random.default_rng([seed, 1]).multinomial(n, np.full(n, 1 / n), size=replicates)
    return torch.from_numpy(np.vstack([np.ones(n, int), counts])).double()


def estimate(values):
    """{value, low, high} of a statistic over resampling(): row 0; 2.5% and 97.5% of the others."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": values[0].item(), "low": low, "high": high}


def ratio(a, b):
    """estimate(a / b); None if b may be 0 or below, where a quotient says nothing."""
    return estimate(a / b) if estimate(b)["low"] > 0 else None


def table(head, rows):
    """A Markdown table, first column left, others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def show(e, factor=1.0, digits=2):
    """An estimate as value [low, high]."""
    if not e:
        return "not meaningful"
    return "{} [{}, {}]".format(*(f"{factor * x:.{digits}f}" for x in e.values()))
