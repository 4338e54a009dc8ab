"""What a person looks at while a run trains and when it ends: held-out loss, sample grids, the yardstick."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from data.batch import Batch
from data.demo import CAPTIONS
from models.backbone import Conditioning
from trainer.generate.evaluate import DigitsYardstick, balanced_labels, flatten_digits
from trainer.generate.sample import gather, sample, share, write_grid
from trainer.generate.sampler import preset
from trainer.objectives.random_streams import normals, purpose_id
from trainer.objectives.transport import clean_estimate
from trainer.observe.metrics import Tally
from trainer.observe.sentinel import CollapseAlarm, collapse_score, spread
from trainer.run import Run, make_targets

log = logging.getLogger(__name__)

COLLAPSE_BEST, COLLAPSE_CHECKS = "collapse_best", "collapse_checks"
CONDITIONS, NOISES = 4, 8
"""Captions per rank, and one-step samples of each, that the collapse alarm looks at."""
EDITS = 4
"""Held-out edits on a sheet."""


@dataclass
class Showcase:
    """latent_shape: [C, H, W] of what is generated; held_out_batch: this rank's fixed rows of held-out data."""

    latent_shape: tuple[int, int, int]
    held_out_batch: Batch | None
    pictures: list[str] = field(default_factory=list)
    alarm: CollapseAlarm = field(default_factory=CollapseAlarm)

    def counters(self) -> dict[str, float]:
        """What a checkpoint keeps: the collapse alarm's memory."""
        return {COLLAPSE_BEST: self.alarm.best, COLLAPSE_CHECKS: float(self.alarm.checks)}

    @torch.no_grad()
    def held_out(self, run: Run) -> dict[str, float]:
        """Loss of held-out samples by role and time, always with the draws of step 0, so that only the model moves it."""
        if self.held_out_batch is None:
            return {}
        tally, size = Tally(run.engine.device), run.config.train.micro_batch_size
        x, cond, null = run.encoding.encode(self.held_out_batch)
        with run.nets.aside():
            targets = make_targets(run, self.held_out_batch, x, cond, null, draw_step=0)
            for begin in range(0, len(targets), size):
                loss = run.objective.loss(run.nets, targets[begin : begin + size])
                tally.add(loss.tally)
                tally.add_terms({"loss": loss.total})
            if self.held_out_batch.has_targets:  # the score is relative to the variety of data
                tally.add_value("collapse_score", one_step_variety(run, x, cond))
        tally.end_step()
        metrics = {f"held_out/{name}": value for name, value in tally.reduce().items()}
        run.tracker.metrics(run.step, metrics)
        score = metrics.get("held_out/collapse_score")
        warning = None if score is None else self.alarm.check(score)
        if warning and run.world.rank == 0:
            run.tracker.event("collapse", message=warning)
            log.warning("step %d: %s", run.step, warning)
        return metrics

    def grids(self, run: Run) -> None:
        """One contact sheet per preset: a row of samples for every prompt, or held-out edits, the same noise at every step."""
        options = run.config.sample
        if self.held_out_batch is not None and self.held_out_batch.has_sources:
            self._edits(run, self.held_out_batch)
        if not options.prompts:
            return
        captions = [prompt for prompt in options.prompts for _ in range(options.columns)]
        for name in options.presets:
            images = self._images(run, captions, name)
            if images is None:
                continue
            self._write(run, name, images, options.prompts)

    def _edits(self, run: Run, batch: Batch) -> None:
        """One sheet per preset of the first held-out edits of rank 0: source, target, and what the model makes of it.

        All ranks make the same passes, each for its own rows.
        """
        x, cond, _ = run.encoding.encode(batch)
        count = min(EDITS, len(batch))
        x, cond = x[:count], cond[:count]
        ids = torch.arange(count) + run.world.rank * count
        decode = run.encoding.latents.decode
        with run.stages("sample"), run.nets.aside(), run.engine.weights(run.config.sample.weights):
            target, source = decode(x), decode(cond.references[0])
            source = torch.nn.functional.interpolate(source, target.shape[-2:], mode="area")
            for name in run.config.sample.presets:
                edited = decode(
                    sample(
                        run.nets, cond, tuple(x.shape[1:]), preset(name), run.config.run.seed, ids, run.engine.device
                    )
                )
                images = torch.stack([source, target, edited], dim=1).flatten(0, 1)
                if run.world.rank == 0:
                    self._write(run, f"edits_{name}", images, batch.captions[:count])

    def _write(self, run: Run, name: str, images: Tensor, captions: Sequence[str]) -> None:
        path = run.folder.pictures / f"{name}_step{run.step:08d}.png"
        title = f"{run.config.run.name}, step {run.step}, {name}, {run.config.sample.weights} weights"
        write_grid(path, images, captions, title)
        self.pictures.append(str(path))
        run.tracker.artifact(path, "pictures")

    def evaluate(self, run: Run) -> dict[str, dict[str, float]]:
        """Scores of the configured yardstick by number of network evaluations, on rank 0; empty elsewhere."""
        options = run.config.evaluate
        if options.name is None:
            return {}
        labels = balanced_labels(options.images)
        captions = [CAPTIONS[label] for label in labels.tolist()]
        yardstick = DigitsYardstick.bundled() if run.world.rank == 0 else None
        scores: dict[str, dict[str, float]] = {}
        for name in tqdm(options.presets, desc="evaluate", disable=run.world.rank != 0):
            images = self._images(run, captions, name)
            if images is not None and yardstick is not None:
                nfe = f"nfe{preset(name).nfe}"
                scores[nfe] = yardstick.score(flatten_digits(images), labels.numpy())
                run.tracker.metrics(run.step, {f"{nfe}/{key}": value for key, value in scores[nfe].items()})
        return scores

    def _images(self, run: Run, captions: Sequence[str], name: str) -> Tensor | None:
        """Pixels [N, C, H, W] of one sample per caption on rank 0, None elsewhere; all ranks take part."""
        ids = share(len(captions), run.world.rank, run.world.world_size)
        with run.stages("sample"), run.nets.aside(), run.engine.weights(run.config.sample.weights):
            latents = sample(
                run.nets,
                run.encoding.prompts([captions[i] for i in ids.tolist()]),
                self.latent_shape,
                preset(name),
                run.config.run.seed,
                ids,
                run.engine.device,
                chunk=run.config.sample.chunk_rows,
            )
            pixels = run.encoding.latents.decode(latents)
        return gather(pixels, len(captions))


def one_step_variety(run: Run, x: Tensor, cond: Conditioning) -> float:
    """Variance of one-step samples over the noise, a few captions of this rank's held-out rows, relative to the
    variance of those latents: 1 as varied as data, 0 collapsed. Data of one caption alone varies less than all data, so
    a healthy model may score below 1."""
    groups = min(CONDITIONS, len(cond))
    rows = torch.arange(groups).repeat_interleave(NOISES)
    ids = torch.arange(len(rows)) + run.world.rank * len(rows)
    z = normals(run.config.run.seed, 0, purpose_id("collapse"), ids, tuple(x.shape[1:]), x.device, x.dtype)
    ones = torch.ones(len(rows), device=x.device, dtype=x.dtype)
    velocity = run.nets.velocity(z, ones, torch.zeros_like(ones), cond[rows.to(x.device)])
    samples = clean_estimate(z, velocity, ones).unflatten(0, (groups, NOISES))
    return collapse_score(samples, spread(x[None]))
