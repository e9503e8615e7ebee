"""Settings of a fine-tuning run, apart from the fields of trainer and reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from annotated_types import DocInfo, Ge, Lt, MinLen

from sampler import registry
from sampler.core.errors import UsageError
from sampler.registry.constraints import Count, Fraction, Nonnegative, Positive, checked


@dataclass(frozen=True)
class Defaults:
    """Defaults of a trainer for settings that are None: the values of its authors.

    lr: of a LoRA; lr_full: of the whole network, by default that of diffusers'
    train_text_to_image.py. adapter: None for a trainer of networks of its own.
    """

    steps: int
    sampler: Any
    lr: float
    weight_decay: float
    clip: float
    rank: int
    alpha: float
    lr_end: float = 1.0
    lr_full: float = 1e-5
    adapter: Literal["lora", "full"] | None = "lora"


@checked("fit.stop")
@dataclass(frozen=True)
class Stop:
    """Stop rule: the column of a scorer, and by how much it may become worse."""

    scorer: str
    worse_by: Nonnegative


@checked("fit.drift_stop")
@dataclass(frozen=True)
class DriftStop:
    """Stop rule: the column of a scorer, and the share by which it may exceed the base model's."""

    scorer: str
    above: Nonnegative


_TEXT_CACHE_MB = 2048
_BATCH, _GROUPS = 8, 4  # images, and groups of images of a prompt, of an update by default
Decay = Annotated[float, Ge(0), Lt(1)]  # of a moving average


@checked("fit")
@dataclass(frozen=True)
class Settings:
    """Settings of `sampler.finetune`; None stands for the trainer's own default.

    updates: collected batches. batch: images per update over all processes, by default 8, and at
    least 4 groups of a trainer that compares the images of a prompt; micro: images per network
    evaluation (all of a process's by default, 8 where batch is left out). seed: of the prompts'
    order, the noise and the initial LoRA.
    steps, sampler, guidance, height, width, negative: of sampling.
    lr, betas, eps, weight_decay: of AdamW; lr_end: fraction of lr after the last update,
    reached linearly; clip: of the global gradient norm, 0 is off.
    adapter: what is trained, a "lora", or "full": all weights of the network, in float32, which
    are saved as a stock pipeline in RUN/model.
    rank, alpha, targets: of the LoRA (Gaussian A, B = 0); targets are ends of layer names, by
    default the attention's projections.
    init_lora: a LoRA to start from, PATH or PATH:weight, of at most `rank`.
    mixed_precision: "bf16" runs the network under autocast; LoRA, scores, log-probabilities and
    optimiser stay float32.
    cache_text: encode each prompt once, alone, and keep the conditions in main memory, at most
    text_cache_mb (2048) of them, and the rest in a memory-mapped file in RUN/text_cache while the
    run lasts. Conditions then do not depend on the other prompts of a batch.
    offload: parts that wait in main memory while they are not used, "text" (with cache_text) and
    "vae" (not where the reward's gradient goes through it).
    max_skips: updates in a row with a loss, gradient or score that is not finite, after which the
    run stops.
    checkpoint_every: updates; the newest `keep` are kept.
    ema: decay of a moving average of the trained weights, 0 is off; it is evaluated and saved as
    lora/ (model/), and the last weights as lora_last/ (model_last/).
    eval_every: updates, 0 is never; eval_prompts: the first 8 training prompts by
    default, with the seeds 0, 1, ...
    stop_reward, patience, max_drift: stop at this evaluation reward; after this number of
    evaluations without a better one; above this mean squared distance of the latents to the base
    model's.
    evals: scorers of `sampler.evaluate`, by name or mapping, whose means every evaluation logs.
    stop: {"scorer": ..., "worse_by": ...}, a column of evals: stop once its mean is more than
    worse_by below the first evaluation's, by paired differences whose 95 % interval leaves out 0.
    drift_stop: {"scorer": ..., "above": ...}, a column of evals, such as saturation: stop once its
    mean is more than the share `above` over that of the base model's images of the same prompts and
    seeds (f_distill: the teacher's), by paired differences as for stop.
    log_with: a tracker of accelerate's, such as "tensorboard"; log.jsonl is always written.
    """

    updates: Annotated[int, Ge(0)] = 20
    batch: Count | None = None
    micro: Count | None = None
    seed: Annotated[int, Ge(0)] = 0
    steps: Count | None = None
    sampler: Any = field(default=None, metadata={"kind": "sampler"})
    guidance: Any = field(default=None, metadata={"kind": "guidance"})
    height: Count | None = None
    width: Count | None = None
    negative: str = ""
    lr: Positive | None = None
    lr_end: Fraction | None = None
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Nonnegative | None = None
    clip: Annotated[float, Ge(0), DocInfo("0 is off")] | None = None
    adapter: Literal["lora", "full"] | None = None
    rank: Count | None = None
    alpha: Positive | None = None
    targets: Annotated[tuple[str, ...], MinLen(1)] | None = None
    init_lora: str | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    cache_text: bool = False
    text_cache_mb: Annotated[int, Ge(0)] | None = None
    offload: tuple[Literal["text", "vae"], ...] = ()
    max_skips: Count = 5
    checkpoint_every: Count = 10
    keep: Count = 2
    ema: Annotated[float, Ge(0), Lt(1), DocInfo("0 is off")] = 0.0
    eval_every: Annotated[int, Ge(0), DocInfo("0 is never")] = 0
    eval_prompts: tuple[str, ...] | None = None
    stop_reward: float | None = None
    patience: Count | None = None
    max_drift: Nonnegative | None = None
    evals: tuple[Any, ...] = ()
    stop: Any = None
    drift_stop: Any = None
    log_with: str | None = None

    def __post_init__(self) -> None:
        for name, rule in (("stop", Stop), ("drift_stop", DriftStop)):
            value, limit = getattr(self, name), [f.name for f in fields(rule)][1]
            if value is None or isinstance(value, rule):
                continue
            if not isinstance(value, Mapping) or set(value) != {"scorer", limit}:
                raise ValueError(f'fit: {name} must be {{"scorer": NAME, "{limit}": NUMBER}}.')
            object.__setattr__(self, name, rule(**value))
        of_lora = [k for k in ("rank", "alpha", "targets", "init_lora") if getattr(self, k)]
        if self.adapter == "full" and of_lora:
            raise ValueError(
                f"fit.{of_lora[0]} is of a LoRA; adapter = 'full' trains the network itself."
            )
        if not self.cache_text and (self.text_cache_mb is not None or "text" in self.offload):
            given = "offload = ['text']" if "text" in self.offload else "text_cache_mb"
            raise ValueError(
                f"fit: {given} needs cache_text = true, which keeps what the text encoders give."
            )
        watched = (self.stop_reward, self.patience, self.max_drift, self.stop, self.drift_stop)
        if any(value is not None for value in watched) or self.evals:
            if not self.eval_every:
                raise ValueError(
                    "fit: stop_reward, patience, max_drift, evals, stop and drift_stop need "
                    "evaluations: set eval_every as well."
                )

    def batch_of(self, images_per_prompt: int) -> int:
        """Return the images per update of a trainer with groups of this size."""
        return self.batch or max(_BATCH, _GROUPS * images_per_prompt)

    def resolved(
        self, own: Defaults, engine: Any, prompts: list[str], images_per_prompt: int = 1
    ) -> Settings:
        """Fill in the defaults of trainer and engine, and build the strategies."""
        from sampler.models.trainable_lora import default_targets

        usual = {
            key: getattr(own, key) for key in ("steps", "lr", "lr_end", "weight_decay", "clip")
        }
        usual["adapter"] = own.adapter
        if self.adapter == "full":
            usual["lr"] = own.lr_full
        else:
            targets = default_targets(engine.pipeline.network)
            usual |= {"rank": own.rank, "alpha": own.alpha, "targets": targets}
        given = {key: value for key, value in usual.items() if getattr(self, key) is None}
        rule = engine.guidance if self.guidance is None else self.guidance
        height, width = engine.pipeline.size(self.height, self.width)
        given_mb = self.text_cache_mb
        return replace(
            self,
            **given,
            sampler=registry.build("sampler", self.sampler or own.sampler),
            guidance=registry.build("guidance", rule),
            height=height,
            width=width,
            eval_prompts=tuple(self.eval_prompts or prompts[:8]),
            batch=self.batch_of(images_per_prompt),
            micro=self.micro or self.batch or _BATCH,
            text_cache_mb=_TEXT_CACHE_MB if self.cache_text and given_mb is None else given_mb,
        )

    def record(self) -> dict[str, Any]:
        """Return plain data, for config.json and for comparing runs."""
        plain = asdict(replace(self, sampler=None, guidance=None, evals=()))
        strategies = {k: registry.spec_of(getattr(self, k)) for k in ("sampler", "guidance")}
        return {**plain, **strategies, "evals": tuple(map(_scorer_spec, self.evals))}


def _scorer_spec(scorer: Any) -> Any:
    """Return plain data for a scorer: a function or another object of one's own by its name."""
    spec = scorer if isinstance(scorer, (str, Mapping)) else registry.spec_of(scorer)
    if isinstance(spec, (str, Mapping)):
        return spec
    return getattr(scorer, "name", "") or getattr(scorer, "__name__", type(scorer).__name__)


# Settings that may differ when a run is resumed: none of them changes an update already done.
RESUMABLE = (
    "updates",
    "checkpoint_every",
    "keep",
    "log_with",
    "text_cache_mb",
    "offload",
    "max_skips",
    "stop_reward",
    "patience",
    "max_drift",
    "stop",
    "drift_stop",
)


def changed(before: dict[str, Any], now: dict[str, Any], scheduled: bool = False) -> list[str]:
    """Return the settings in which two records of runs differ, as "section.key".

    scheduled: the trainer's updates depend on the length of the run, as the learning rate may.
    """
    found = []
    for section in sorted({*before, *now}):
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted({*old, *new})
            found += [f"{section}.{k}" for k in keys if old.get(k) != new.get(k)]
        elif old != new:
            found.append(section)
    free = {f"fit.{key}" for key in RESUMABLE}
    if scheduled or now.get("fit", {}).get("lr_end") != 1.0:
        free.discard("fit.updates")
    return [key for key in found if key not in free]


def settings_from(values: Any) -> Settings:
    """Return settings from a checked mapping, from None, or the instance itself.

    Raises SamplerError (2) for an unknown key or a wrong value.
    """
    if values is None:
        return Settings()
    if isinstance(values, Settings):
        return values
    known = {f.name for f in fields(Settings)}
    for key in values:
        if key not in known:
            raise UsageError(f"fit has no key {key!r}{registry.suggestion(str(key), known)}.")
    try:
        return Settings(**values)
    except ValueError as error:
        raise UsageError(str(error)) from None
