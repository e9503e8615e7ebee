"""Engine: prompts to images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from sampler import registry
from sampler.core.batch import DEFAULT_BATCH, Output, Result, Sample, expand
from sampler.core.binding import SamplerContext, bind_sampler
from sampler.core.generation import GenerateRequest, generate_batches
from sampler.core.images import strength_of
from sampler.core.loop import Loop
from sampler.core.spacings import count_of
from sampler.engine.inspection.attention import Attention, attention
from sampler.engine.inspection.features import features
from sampler.engine.restoration import Restored, restore
from sampler.registry.constraints import as_int
from sampler.samplers.aliases import named
from sampler.workers.best_of import check_best_of, generate_best
from sampler.workers.from_python import generate_into


class Engine(Loop):
    """Denoiser, sampler and guidance rule: `run` on tensors, `generate` on prompts.

    `Engine(denoiser, pipeline=None, sampler="ddim", guidance="none")`; `sampler.load` builds one
    from a diffusers pipeline. `generate` needs the pipeline adapter, `run` does not.
    """

    def generate(
        self,
        prompts: str | int | Sequence[str | int],
        *,
        negative: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] | None = None,
        n: int = 1,
        steps: int = 20,
        height: int | None = None,
        width: int | None = None,
        sampler: Any = None,
        guidance: Any = None,
        batch_size: int | None = None,
        output: Output = "pil",
        progress: Callable[[int, int], None] | None = None,
        image: Any = None,
        strength: float | None = None,
        out: Any = None,
        graph: bool | Literal["auto"] = False,
        inputs: Mapping[str, Any] | None = None,
        grid: Any = None,
        best_of: int | None = None,
        reward: Any = None,
        drafts: Mapping[str, Any] | None = None,
    ) -> Result:
        """Generate n images per prompt, in the order of the prompts.

        prompts: one text or several, or class numbers for a class-conditional model; negative: one
        for all, or one per prompt. seeds: one int (image i has seed + i), or one per image; by
        default derived from the prompt and the number of the image, and recorded. steps: network
        evaluations, 1 to 1000. height, width: pixels, by default the model's own. sampler,
        guidance: a name, a mapping or an instance; by default the engine's. batch_size: samples per
        evaluation (8); bit-equal images need an equal batch size, since networks round differently
        in batches of another size. output: "pil", "tensor" ([B, 3, H, W] in [0, 1]) or "latent"
        (images is None). progress(images done, total) is called after every batch. image: a file, a
        PIL image or a tensor [B or 1, 3, H, W] in [0, 1] to start from, noised to the last
        floor(strength·steps) of the steps (image to image; 0.6); strength 0 returns it. out: a run
        folder to write, or to resume where it exists; images are read from it lazily, and latents
        is None. graph: replay a CUDA graph of the first batch for those that follow; "auto": where
        that is possible and pays. The images are the same. inputs: further arguments of the stock
        pipeline's call by name (IP-Adapter images, ...); with them that call makes the images, as
        for classes without an adapter (`HostedEngine.generate`). grid: the levels instead of the
        model's own: a name ("karras", "beta", ...), {"name": ..., setting: ...}, or a list, whose
        length is then the number of steps; see `Schedule.grid`. best_of: generate that many cheap
        drafts per prompt and run the n that the reward scores best in full, from the same seeds,
        best first; `Result.best_of` records all candidates. reward: a name, a mapping, an instance
        or a function (images, prompts) -> scores. drafts: steps (a third, at least 4), size,
        sampler and guidance of the drafts; with out they are the run folder out/drafts.

        Raises, before any network call, ValueError for an empty prompt list, counts that do not
        match, a strength without image, and what the strategies and the schedule reject; UsageError
        without a pipeline, and for graph = True without a CUDA device. With out also
        IncompleteError (failed images), RunFolderError (a folder of another plan, or in use),
        StorageError and MemoryLimitError.
        """
        settings: dict[str, Any] = {
            "steps": steps, "height": height, "width": width, "sampler": sampler,
            "guidance": guidance, "batch_size": batch_size, "output": output, "image": image,
            "progress": progress, "strength": strength, "out": out, "graph": graph,
            "inputs": inputs, "grid": grid,
        }  # fmt: skip
        if best_of is not None:
            return generate_best(
                self.generate, prompts, negative, seeds, n, best_of, reward, drafts,
                self.pipeline.takes_classes, settings,
            )  # fmt: skip
        check_best_of(reward, drafts)
        sampler, said = named(sampler)
        grid = said if grid is None else grid
        steps = count_of(grid) or steps
        if inputs is None and out is not None and (frames := getattr(self.pipeline, "frames", 0)):
            inputs = {"num_frames": frames}
        settings |= {"negative": negative, "seeds": seeds, "n": n, "steps": steps,
                     "sampler": sampler, "inputs": inputs, "grid": grid}  # fmt: skip
        if inputs is not None:
            hosted: Any = self.as_hosted()
            return hosted.generate(prompts, **settings)
        if grid is not None:
            method, rule = self.build_sampler(sampler), self.build_guidance(guidance)
            engine = self.with_grid_for(grid, method, rule, steps)
            settings["grid"] = None
            return engine.generate(prompts, **settings)
        strength = strength_of(image, strength)
        samples = expand(prompts, negative, seeds, n, self.pipeline.takes_classes)
        if output not in ("pil", "tensor", "latent"):
            raise ValueError(f"output = {output!r} must be 'pil', 'tensor' or 'latent'.")
        request = self._request(samples, steps, height, width, sampler, guidance, batch_size)
        if out is None:
            return generate_batches(self, request, output, progress, image, strength, graph)
        if image is not None or output != "pil" or graph is True:
            raise ValueError("out= stores images of prompts; leave out image=, output= and graph=.")
        return generate_into(self, str(out), request, progress)

    def _request(
        self,
        samples: Sequence[Sample],
        steps: int,
        height: int | None,
        width: int | None,
        sampler: Any,
        guidance: Any,
        batch_size: int | None,
    ) -> GenerateRequest:
        """Check the settings of `generate`, and build and bind its strategies."""
        adapter = self.pipeline
        method, rule = self.build_sampler(sampler), self.build_guidance(guidance)
        steps = as_int(steps, "steps")
        height = None if height is None else as_int(height, "height")
        width = None if width is None else as_int(width, "width")
        cut = DEFAULT_BATCH if batch_size is None else as_int(batch_size, "batch_size")
        if cut < 1:
            raise ValueError(f"batch_size = {batch_size} must be at least 1.")
        if "uncond" not in rule.needs and any(sample.negative for sample in samples):
            warnings.warn(
                f"Guidance {rule.name!r} with these settings evaluates no unconditional branch: "
                "the negative prompt has no effect.",
                stacklevel=3,
            )
        size = adapter.size(height, width)
        levels = adapter.grid(steps, size)
        method = bind_sampler(method, SamplerContext(adapter, levels, registry.spec_of(rule), size))
        return GenerateRequest(samples, size, steps, method, rule, cut, grid=adapter.spacing)

    def restore(
        self,
        y: Any,
        *,
        operator: Any,
        method: str | None = None,
        noise: float | None = None,
        n: int = 8,
        prompt: str | int = "",
        steps: int | None = None,
        restorer: Any = None,
        strength: float | None = None,
        seeds: int | Sequence[int] | None = None,
        guidance: Any = None,
        batch_size: int | None = None,
        output: Literal["pil", "tensor"] = "pil",
        allow_python: bool = False,
    ) -> Restored:
        """Restore an image from a measurement y = A(x) + noise: n images, their mean and spread.

        y: an image file, a PIL image, or a tensor [1, ...] in the operator's range. operator: a
        name, {"name": ...}, a list of them, or an object with A (and A_dagger), as for `reddiff`;
        without A_dagger the image has the model's own size. method: "daps", samples of the
        posterior; "data", images that fit y; "admm", plug-and-play; "reddiff", one mode; "difface",
        from the output of another restorer; "vble", the autoencoder alone; by default "daps" where
        the noise is known, else "reddiff". noise: > 0, standard deviation of the measurement's
        noise in units of [-1, 1]; daps, data, admm and vble need it. steps: of sampling, 50;
        iterations of vble, 300, which takes one seed and no prompt and understates deviations.
        restorer, strength: of `difface`: a name ("pseudo_inverse", "bicubic", "reddiff"), an image
        file, a function from images in [0, 1] to images, or "module:function", which needs
        allow_python; share of the steps that is walked. guidance: the rule for the prompt; by
        default the engine's, and "none" for the prompt "". The rest as for `generate`.

        Returns `Restored`: images, mean and std [3, H, W] over the n images, seeds, nfe, config,
        contraction. Raises, before any network call, ValueError for an unknown operator or method,
        sizes that do not fit, noise <= 0, n < 1, and a method that the operator cannot serve;
        UsageError for Python code that is not allowed.
        """
        return restore(
            self, y, operator, method, noise, n, prompt, steps, restorer, strength, seeds,
            guidance, batch_size, output, allow_python,
        )  # fmt: skip

    def features(
        self,
        images: Any,
        t: float = 0.15,
        blocks: Sequence[str] | None = None,
        pool: int = 2,
        *,
        prompt: str = "",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Features {block: [B, C·pool²]} of images, float32 on the CPU.

            φ = pool(h_block(alpha·z + sigma·n, t, prompt)),   z the encoded image

        images: a file, a PIL image or a tensor [B, 3, H, W] in [0, 1] of a size that the model
        takes. t: share 0..1 of the training times; 0 adds no noise. blocks: "input" (x itself),
        "down.i", "mid" and "up.i" of UNets, "blocks.i" of transformers; by default "up.0", or the
        middle block. pool: cells along each side, over which the block's output is averaged. seed:
        of the noise n, the same for every image, so that a feature depends on its image alone.
        batch_size: images per evaluation (8).

        Raises ValueError for an unknown block, a size that the model does not take, and t outside
        0..1; UsageError for hosted and video pipelines.

        Reference: Diffusion Models Beat GANs on Image Classification (Mukhopadhyay et al., 2023),
        arXiv:2307.08702.
        """
        return features(self, images, t, blocks, pool, prompt, seed, batch_size)

    def attention(
        self, prompts: str | Sequence[str], words: Any = None, **options: Any
    ) -> Attention:
        """Generate images, and for each of them maps {word: [h, w]} of attention to its words.

            H_w = Σ over steps of the mean over layers of  A[:, columns of w] / its mean

        A: attention of the image's tokens to the prompt's, mean over the heads. words: texts for
        all prompts, or one list of texts per prompt; None is every word of the prompt. options:
        score, and those of `generate`: negative, seeds, n, steps, height, width, sampler, guidance,
        batch_size. score: None, the attention itself; "guidance" weighs it with relu(∂s/∂A) of
        s = ½‖c − u‖² (Grad-SAM, arXiv:2204.11073, one backward pass per step); or a differentiable
        reward, of the decoded x0. The images are those of `generate`; with a score they differ by
        rounding.

        Raises ValueError for a word that is not in its prompt, a network whose attention is not
        known, and a rule without the branches that the score needs; UsageError as `features`.
        """
        return attention(self, prompts, words, **options)
