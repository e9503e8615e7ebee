"""Objectives of reward fine-tuning, as pure functions of tensors and numbers.

Notation: sigma in [0, 1] is the flow level, x = (1 − sigma)·x0 + sigma·eps, velocity v = eps − x0,
D the estimate of x0; mean(·) runs over the elements of a sample. Functions of predictions take
`Prediction` values of any parametrisation, or tensors where only the estimate of x0 matters.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sampler_kernels import settle
from torch import Tensor

from sampler.types import Level, Prediction

Floats = NDArray[np.float64]


def _per_sample(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [B, ...] -> [B]."""
    return values.flatten(1).mean(1)


def _broadcast(value: Any, like: Tensor) -> Any:
    """A number, or one number per sample [B] shaped to multiply `like` [B, ...]."""
    if isinstance(value, Tensor) and value.ndim == 1:
        return value.view(-1, *[1] * (like.ndim - 1))
    return value


def _x0(value: Prediction | Tensor) -> Tensor:
    return settle(value.x0) if isinstance(value, Prediction) else value


# --- advantages -------------------------------------------------------------------------------


def group_advantages(
    prompts: Sequence[str],
    rewards: ArrayLike,
    std: Literal["batch", "group", "none"] = "batch",
    eps: float = 1e-4,
    unbiased: bool = False,
    floor: float | None = None,
) -> Floats:
    """Advantages relative to the images of the same prompt, float64 [N].

        A = (r − mean_group)/(s + eps),   or   (r − mean_group)/max(s, floor)

    std: the deviation s, over the whole batch, over the group, or 1 ("none": no division).
    unbiased: divide by n − 1 in s (verl-omni, DanceGRPO); the default divides by n (Flow-GRPO,
    Flow-Factory). floor: a lower bound of s in place of `eps`. A group of one image has A = 0 with
    "group".

    Raises ValueError for an unknown `std`, and for rewards that are not one per prompt.

    Source: Flow-GRPO (Liu et al., 2025), arXiv:2505.05470, and its published code.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if std not in ("batch", "group", "none"):
        raise ValueError(f"group_advantages: std = {std!r} is none of batch, group, none.")
    if values.shape != (len(prompts),):
        raise ValueError(
            f"group_advantages needs one reward per prompt: {len(prompts)} prompts, "
            f"rewards of shape {values.shape}."
        )
    _, groups = np.unique(np.asarray(prompts), return_inverse=True)

    def deviation(part: Floats) -> float:
        enough = part.size > (1 if unbiased else 0)
        return float(part.std(ddof=int(unbiased))) if enough else 0.0

    advantages = np.empty_like(values)
    for group in range(int(groups.max(initial=-1)) + 1):
        chosen = groups == group
        centred = values[chosen] - values[chosen].mean()
        if std != "none":
            scale = deviation(values if std == "batch" else values[chosen])
            centred = centred / (scale + eps if floor is None else max(scale, floor))
        advantages[chosen] = centred
    return advantages


def gdpo_advantages(
    prompts: Sequence[str],
    rewards: Sequence[ArrayLike],
    weights: Sequence[float],
    floor: float = 1e-6,
) -> Floats:
    """Advantages of several rewards, each normalised in its group before they are summed, [N].

        A_k = (r_k − mean_group)/max(std_group, floor),   A = normalise_batch(Σ_k w_k·A_k)

    normalise_batch subtracts the mean of the batch and divides by max(std, floor).
    Raises ValueError unless there is one weight per reward.

    Source: GDPO as in Flow-Factory's `compute_gdpo`.
    """
    if len(rewards) != len(weights):
        raise ValueError(f"gdpo_advantages: {len(rewards)} rewards, {len(weights)} weights.")
    parts = (group_advantages(prompts, r, std="group", floor=floor) for r in rewards)
    total = np.sum([w * part for w, part in zip(weights, parts, strict=True)], axis=0)
    return (total - total.mean()) / max(float(total.std()), floor)


def optimality(
    advantages: Tensor,
    max_advantage: float,
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all",
) -> Tensor:
    """Probability of optimality r in [0, 1] from advantages, elementwise.

        r = clip(A, −A_max, A_max)/(2·A_max) + 1/2

    mode: "positive_only" and "negative_only" set the other sign to A = 0, "one_only" sets positive
    advantages to 1 and others to 0, "binary" takes the sign.
    Raises ValueError for an unknown mode.

    Source: DiffusionNFT (Zheng et al., 2025), arXiv:2509.16117, and its published code.
    """
    a = advantages.clamp(-max_advantage, max_advantage)
    if mode == "positive_only":
        a = a.clamp(min=0)
    elif mode == "negative_only":
        a = a.clamp(max=0)
    elif mode == "one_only":
        a = (a > 0).to(a.dtype)
    elif mode == "binary":
        a = a.sign()
    elif mode != "all":
        raise ValueError(
            f"optimality: mode = {mode!r} is none of all, positive_only, negative_only, "
            "one_only, binary."
        )
    return (a / max_advantage / 2 + 0.5).clamp(0, 1)


# --- policy gradients -------------------------------------------------------------------------


def clipped_loss(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss, elementwise: max(−A·rho, −A·clip(rho, 1 − clip, 1 + clip)).

    rho = exp(log_ratio). Source: PPO (Schulman et al., 2017), arXiv:1707.06347, eq. 7.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def guarded_log_ratio(mean: Tensor, old_mean: Tensor, after: Tensor, std: Any) -> Tensor:
    """Log-ratio of GRPO-Guard in closed form, [B].

        g = mean(z·(mean − old_mean)),   z = (after − old_mean)/std

    z is the noise that was drawn, so E[g] = 0 under the old policy; the plain mean log-ratio has
    the mean −mean((mean − old_mean)²)/(2·std²) instead. mean, old_mean, after: [B, ...]; std: a
    number or [B], above 0.

    Source: GRPO-Guard (Wang et al., 2025), arXiv:2510.22319.
    """
    return _per_sample((after - old_mean) / _broadcast(std, mean) * (mean - old_mean))


def dppo_keep(
    mean: Tensor,
    old_mean: Tensor,
    std: Any,
    log_ratio: Tensor,
    advantage: Tensor,
    threshold: float,
) -> Tensor:
    """Mask of the samples whose update stays inside the trust region, bool [B].

    A sample is left out where KL >= threshold and its ratio moves further away in the direction of
    its advantage (rho > 1 with A > 0, or rho < 1 with A < 0);
    KL = mean((mean − old_mean)²)/(2·std²). mean, old_mean: [B, ...]; std: a number or [B].

    Source: verl-omni's `FlowDPPOLoss`.
    """
    gap = (mean - old_mean) / _broadcast(std, mean)
    outside = _per_sample(gap * gap) / 2 >= threshold
    away = ((log_ratio > 0) & (advantage > 0)) | ((log_ratio < 0) & (advantage < 0))
    return ~(outside & away)


# --- matching on clean latents ------------------------------------------------------------------


def nft_loss(
    pred: Prediction | Tensor,
    old: Prediction | Tensor,
    x0: Tensor,
    r: Tensor,
    beta: float,
    floor: float = 1e-5,
) -> Tensor:
    """Loss of DiffusionNFT without its factor A_max, [B].

        D± = D_old ± beta·(D − D_old)
        loss = 1/beta·[r·mean((D₊ − x0)²)/n₊ + (1 − r)·mean((D₋ − x0)²)/n₋]
        n± = max(mean|D± − x0|, floor), without gradient

    pred, old: predictions at the same x, or estimates of x0 [B, ...]; x0 [B, ...]; r [B] in
    [0, 1], see `optimality`; beta above 0.

    Source: DiffusionNFT (Zheng et al., 2025), arXiv:2509.16117, and its published code.
    """
    new_x0, old_x0 = _x0(pred), _x0(old).detach()

    def branch(sign: int) -> Tensor:
        error = old_x0 + sign * beta * (new_x0 - old_x0) - x0
        with torch.no_grad():
            scale = _per_sample(error.abs().double()).clamp(min=floor).to(error.dtype)
        return _per_sample(error * error) / scale

    return (r * branch(1) + (1 - r) * branch(-1)) / beta


def matching_log_prob(
    pred: Prediction,
    x0: Tensor,
    eps: Tensor,
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber",
    power: float = 0.25,
) -> Tensor:
    """Weighted matching error as a log-probability, [B].

        log p = −w(sigma, e),   e = mean((out − out*)²)

        uniform  e                    t  sigma·e                   t2  sigma²·e
        huber    sigma·(sqrt(e + 1e-10) − 1e-5)
        ghuber   sigma/power·((e + 1e-10)^power − 1e-10^power)

    out is the network's output in its own parametrisation and out* the exact one for x0 and eps
    [B, ...]; sigma is that of `pred.level`. Raises ValueError for an unknown weighting.

    Source: advantage-weighted matching (Xue et al., 2025), arXiv:2509.25050, and its code.
    """
    level = pred.level
    alpha, sigma = _broadcast(level.alpha, x0), _broadcast(level.sigma, x0)
    exact = {
        "eps": lambda: eps,
        "x0": lambda: x0,
        "v": lambda: alpha * eps - sigma * x0,
        "velocity": lambda: eps - x0,
    }[pred.kind]()
    e = _per_sample((settle(pred.out) - exact) ** 2)
    s = level.sigma
    if weighting == "uniform":
        return -e
    if weighting == "t":
        return -s * e
    if weighting == "t2":
        return -s * s * e
    if weighting == "huber":
        return -s * ((e + 1e-10).sqrt() - 1e-5)
    if weighting == "ghuber":
        return -s / power * ((e + 1e-10) ** power - 1e-10**power)
    raise ValueError(
        f"matching_log_prob: weighting = {weighting!r} is none of uniform, t, t2, huber, ghuber."
    )


def dpo_loss(error: Tensor, base_error: Tensor, beta: float) -> Tensor:
    """Diffusion-DPO's loss of pairs, [P].

        loss = −log sigmoid(−beta/2·[(e_w − e_w^base) − (e_l − e_l^base)])

    error, base_error [P, 2]: mean squared errors of the trained and the base model, the winner's
    first, both at the same level and noise.

    Source: Diffusion-DPO (Wallace et al., 2023), arXiv:2311.12908, eq. 14.
    """
    gain = error - base_error
    return -torch.nn.functional.logsigmoid(-beta / 2 * (gain[:, 0] - gain[:, 1]))


# --- schedules ----------------------------------------------------------------------------------


def old_decay(step: int, law: Literal["on_policy", "slow", "fast"]) -> float:
    """Decay d of the old weights after `step` optimiser steps: old ← d·old + (1 − d)·new.

        on_policy  0        slow  min(0.001·step, 0.5)
        fast       0 up to step 75, then min(0.0075·(step − 75), 0.999)

    Raises ValueError for an unknown law. Source: DiffusionNFT's `return_decay`.
    """
    if law == "on_policy":
        return 0.0
    if law == "slow":
        return min(0.001 * step, 0.5)
    if law == "fast":
        return min(0.0075 * max(0, step - 75), 0.999)
    raise ValueError(f"old_decay: {law!r} is none of on_policy, slow, fast.")


def matching_times(
    u: ArrayLike,
    law: Literal["uniform", "logit_normal"] = "uniform",
    shift: float = 1.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Floats:
    """Stratified flow levels sigma [K] from uniform numbers u [K], in Flow-Factory's form.

        p_k = (k + u_k)/K,   f = p (uniform) or sigmoid(normal quantile of p) (logit_normal)
        shifted: f ← shift·f/(1 + (shift − 1)·f),   sigma = 1 − f

    low, high: range of f, applied before the shift for "uniform" and after it for "logit_normal".
    This form shifts f, so that shift above 1 favours low noise; the samplers' and SD3's convention
    shifts sigma. Raises ValueError for an unknown law.

    Source: Flow-Factory's `TimeSampler`.
    """
    values = np.asarray(u, dtype=np.float64)
    p = (np.arange(values.size) + values) / values.size

    def shifted(f: Floats) -> Floats:
        return shift * f / (1 + (shift - 1) * f)

    if law == "uniform":
        return 1 - shifted(low + p * (high - low))
    if law == "logit_normal":
        quantile = torch.special.ndtri(torch.from_numpy(p))
        return 1 - (low + shifted(torch.sigmoid(quantile).numpy()) * (high - low))
    raise ValueError(f"matching_times: law = {law!r} is none of uniform, logit_normal.")


def sde_window(
    update: int,
    size: int,
    total: int,
    every: int,
    strategy: Literal["progressive", "decay", "exp_decay", "random"] = "progressive",
    stride: int | None = None,
    roll_back: bool = False,
    decay: float = 0.1,
) -> tuple[int, int]:
    """First step and number of steps that draw noise at an update, after MixGRPO.

    The window [first, first + size) moves by `stride` (default: size) after a number of updates
    that depends on first (f = first/total):

        progressive  every
        decay        int(every·(1 − f) + max(1, every//4)·f), at least max(1, every//4)
        exp_decay    ceil(every·exp(−decay·max(0, first − 13)))
        random       drawn anew at every update, from (update, size, total)

    At the end it stops with the remaining steps, then none; with `roll_back` it starts again.
    Raises ValueError for an unknown strategy.

    Source: MixGRPO (Li et al., 2025), arXiv:2507.21802, and its published code.
    """
    if strategy == "random":
        first = random.Random(f"sde_window {update} {size} {total}").randint(0, total - size)
        return first, size
    least = max(1, every // 4)

    def length(first: int) -> float:
        if strategy == "progressive":
            return every
        if strategy == "decay":
            f = first / total
            return max(least, int(every * (1 - f) + least * f))
        if strategy == "exp_decay":
            return math.ceil(every * math.exp(-decay * max(0, first - 13)))
        raise ValueError(
            f"sde_window: strategy = {strategy!r} is none of progressive, decay, exp_decay, random."
        )

    first, used = 0, 0
    for _ in range(update):
        used += 1
        if used >= length(first):
            first, used = first + (size if stride is None else stride), 0
        if first > total:
            first, used = (0, 0) if roll_back else (total, used)
    return first, max(0, min(size, total - first))


# --- direct alignment ---------------------------------------------------------------------------


def direct_align(velocity: Tensor, image: Tensor, noise: Tensor, start: Any, end: Any) -> Tensor:
    """Estimate of the image after one Euler step, with the known noise removed, [B, ...].

        x = (1 − start)·image + start·noise
        x̂0 = (x + (end − start)·velocity − end·noise)/(1 − end)

    It equals image + w·(D − image) with w = (start − end)/(start·(1 − end)), D the estimate of x0.
    velocity: the network's output at (x, start). start, end: numbers in (0, 1), or [B].

    Source: SRPO (Shen et al., 2025), arXiv:2509.06942, eq. 7 to 9.
    """
    a, b = _broadcast(start, image), _broadcast(end, image)
    x = (1 - a) * image + a * noise
    return (x + (b - a) * velocity - b * noise) / (1 - b)


# --- few-step students ----------------------------------------------------------------------------


def _forward(mid: Level, now: Level, like: Tensor) -> tuple[Any, Any]:
    """Scale and deviation of the forward process from level mid to the noisier level now."""
    scale = _broadcast(now.alpha / mid.alpha, like)
    variance = _broadcast(now.sigma, like) ** 2 - scale**2 * _broadcast(mid.sigma, like) ** 2
    return scale, variance**0.5


def renoised(x: Tensor, mid: Level, now: Level, noise: Tensor) -> Tensor:
    """Forward diffusion of x [B, ...] from level `mid` to the noisier level `now`.

        x_now = (alpha_now/alpha_mid)·x + sqrt(sigma_now² − (alpha_now/alpha_mid)²·sigma_mid²)·noise

    Source: TDM (Luo et al., 2025), arXiv:2503.06674.
    """
    scale, deviation = _forward(mid, now, x)
    return scale * x + deviation * noise


def mixed_noise(model_eps: Tensor, noise: Tensor, mid: Level, now: Level) -> Tensor:
    """Noise of a renoised sample relative to the student's x0, unit variance, [B, ...].

        m = ((alpha_now/alpha_mid)·sigma_mid·model_eps + sqrt(...)·noise)/sigma_now

    with the square root of `renoised`; model_eps: the eps that carried x0 to level `mid`.
    Source: TDM (Luo et al., 2025), arXiv:2503.06674.
    """
    scale, deviation = _forward(mid, now, noise)
    carried = scale * _broadcast(mid.sigma, noise) * model_eps
    return (carried + deviation * noise) / _broadcast(now.sigma, noise)


def fake_score_loss(
    fake: Tensor, model: Tensor, now: Level, mixed: Tensor, noise: Tensor
) -> Tensor:
    """Denoising loss of TDM's fake score, [B].

        min(SNR, 5)·mean((fake − model)²)·exp(mean(noise²)/2 − mean(mixed²)/2)

    SNR = alpha²/sigma² at level `now`.

    fake: its estimate of x0 at level `now`; model: the student's x0 (no gradient); mixed: see
    `mixed_noise`. Source: TDM (Luo et al., 2025), arXiv:2503.06674, and its published code.
    """
    snr = (now.alpha / now.sigma) ** 2
    snr = snr.clamp(max=5) if isinstance(snr, Tensor) else min(snr, 5.0)
    weight = torch.exp((_per_sample(noise * noise) - _per_sample(mixed * mixed)) / 2)
    return snr * _per_sample((fake - model.detach()) ** 2) * weight


def student_loss(model: Tensor, guided: Tensor, fake: Tensor, huber: float | None = None) -> Tensor:
    """Loss of TDM's student, [B].

        mean((D − sg(D + guided − fake))²)/mean|D − guided|

    huber c: sqrt(d² + c²) − c in place of d². model: the student's D with gradient; guided, fake:
    the teacher's guided and the fake score's estimates of x0 at the renoised sample.
    Source: TDM (Luo et al., 2025), arXiv:2503.06674, and its published code.
    """
    with torch.no_grad():
        scale = _per_sample((model - guided).abs())
        target = model + guided - fake
    gap = (model - target) ** 2
    if huber is not None:
        gap = (gap + huber**2).sqrt() - huber
    return _per_sample(gap) / scale


# --- evaluation -----------------------------------------------------------------------------------


def geneval_correct(
    boxes: Mapping[str, Sequence[Sequence[float]]],
    colours: Mapping[str, Sequence[str]],
    metadata: Mapping[str, Any],
) -> bool:
    """Correctness of an image by GenEval's rules.

    boxes: {class: [[x0, y0, x1, y1, score], ...]}, the surest first; colours: {class: a colour per
    box}; metadata: {"include": [{"class", "count", "color"?, "position"? [relation, index]}],
    "exclude": [{"class", "count"}]}. Of each included class the first `count` boxes are looked at:
    they have to exist, to have the colour, and to lie in the relation to the boxes of the included
    object `index`. An excluded class has fewer than `count` boxes.

    Source: GenEval (Ghosh et al., 2023), arXiv:2310.11513.
    """
    correct = True
    matched: list[Sequence[Sequence[float]] | None] = []
    for wanted in metadata.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        found = list(boxes.get(name, ()))[:count]
        right = len(found) >= count
        if right and "color" in wanted:
            right = list(colours.get(name, ()))[:count].count(wanted["color"]) >= count
        if right and wanted.get("position"):
            relation, index = wanted["position"]
            others = matched[index]
            right = others is not None and all(
                relation in _relations(a, b) for a in found for b in others
            )
        correct &= right
        matched.append(found if right else None)
    return correct and all(
        len(boxes.get(e["class"], ())) < e["count"] for e in metadata.get("exclude", ())
    )


def _relations(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> set[str]:
    """Relations of box a to box b: the part of the offset of the centres that exceeds
    threshold·(sum of the sizes), over the offset's length, has to be beyond 1/2."""
    first, second = np.asarray(a[:4]).reshape(2, 2), np.asarray(b[:4]).reshape(2, 2)
    offset = first.mean(0) - second.mean(0)
    size = np.abs(np.diff(first, axis=0))[0] + np.abs(np.diff(second, axis=0))[0]
    revised = np.maximum(np.abs(offset) - threshold * size, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):  # pixels
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    near = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in near.items() if holds}


def score_questions(
    order: Sequence[int], parents: Mapping[Any, Sequence[int]], answers: Sequence[Any]
) -> float:
    """DPG-Bench score of one image: share of questions answered yes with all ancestors yes.

    order: question ids; parents: {id: [parent ids]}, 0 for none; answers: a number per question in
    that order, or several such lists (one per crop), whose scores are averaged. The result does not
    depend on the order: an answer counts 0 where any ancestor is no, at any depth (the released
    script looks at the direct parents, in file order). Raises ValueError for a cycle.

    Source: ELLA (Hu et al., 2024), arXiv:2403.05135, section 4.
    """
    if len(answers) and isinstance(answers[0], Sequence):
        return sum(score_questions(order, parents, a) for a in answers) / len(answers)
    own = dict(zip(order, map(float, answers), strict=True))
    above = {int(k): [p for p in v if p] for k, v in parents.items()}
    known: dict[int, float] = {}

    def value(question: int, path: tuple[int, ...]) -> float:
        if question in path:
            raise ValueError(f"score_questions: question {question} depends on itself.")
        if question not in known:
            path = (*path, question)
            yes = all(value(parent, path) for parent in above.get(question, ()))
            known[question] = own[question] if yes else 0.0
        return known[question]

    return sum(value(question, ()) for question in order) / len(order)
