"""The one adapter that makes a method or a segmenter a LightningModule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weakseg.data.loading import derive_seed
from weakseg.errors import UserError
from weakseg.methods.base import Phase, Trainable
from weakseg.training.config import TrainConfig
from weakseg.training.optim import learning_rate, make_optimiser

__all__ = ["TrainingModule", "only"]


class TrainingModule(L.LightningModule):
    """Runs the phases of a model in order on every batch.

    Manual optimisation, because a step may hold several phases with an optimiser each. The module
    keeps its own count of steps, since Lightning's counts every optimiser's step, and averages
    gradients over processes itself: Lightning's wrapper expects one backward pass over the same
    parameters in every step, which phases, accumulation and late terms all break.

    Args:
        model: A method or a segmenter.
        config: Schedule and optimiser.
        total_steps: Steps of the whole schedule.
        seed: Seed of what is random inside a step, such as dropout.
        section: Section of the recipe that ``config`` is, for errors.
    """

    def __init__(
        self,
        model: Trainable,
        config: TrainConfig,
        total_steps: int,
        seed: int,
        section: str = "train",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model.to(memory_format=torch.channels_last)  # faster on CPU and GPU
        self.train_config = config
        self.total_steps = total_steps
        self.seed = seed
        self.section = section
        self.steps_done = 0
        self.active_steps: dict[str, int] = {}
        self.latest: dict[str, float] = {}
        self._resumed: Mapping[str, Any] | None = None
        self._phases: dict[str, Phase] = model.phases()
        self.averaged = (
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema
            else None
        )

    @property
    def progress(self) -> float:
        """Share of the schedule that is done, in [0, 1]."""
        return self.steps_done / self.total_steps

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimiser for each phase; what none of them trains needs no gradients."""
        optimisers = [
            make_optimiser(self.model, p.parameters(), self.train_config, self.section)
            for p in self._phases.values()
        ]
        trained = {id(p) for o in optimisers for g in o.param_groups for p in g["params"]}
        for p in self.model.parameters():
            if id(p) not in trained:
                p.requires_grad_(False)
        return optimisers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """All phases on one batch."""
        if isinstance(batch, UserError):  # from a loader process
            raise batch
        torch.manual_seed(derive_seed(self.seed, "step", self.steps_done, self.global_rank))
        batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        progress = self.progress
        optimisers = self.optimizers()
        optimisers = optimisers if isinstance(optimisers, list) else [optimisers]
        for phase, optimiser in zip(self._phases.values(), optimisers, strict=True):
            self._set_learning_rate(optimiser, progress)
            with only(self.model, phase):
                self._run_phase(phase, optimiser, batch, progress)
        self.model.after_step(progress)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self.steps_done += 1

    def on_train_start(self) -> None:
        """Restores the optimisers and turns off the wrapper's own averaging of gradients."""
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            wrapper.require_backward_grad_sync = False
        if self._resumed is not None:
            for optimiser, state in zip(
                self.trainer.optimizers, self._resumed["optimizer_states"], strict=True
            ):
                optimiser.load_state_dict(state)
            scaler = self._resumed.get(type(self.trainer.precision_plugin).__qualname__)
            if scaler:
                self.trainer.precision_plugin.load_state_dict(scaler)
            self._resumed = None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clips; Lightning calls this after gradients were unscaled."""
        if self.train_config.clip is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(params, self.train_config.clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the module's own counts."""
        checkpoint["weakseg"] = {
            "steps_done": self.steps_done,
            "active_steps": dict(self.active_steps),
            "model": self.model.training_state(),
        }

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Continues from a checkpoint: weights now, optimisers when training starts."""
        self.load_state_dict(checkpoint["state_dict"])
        self.steps_done = checkpoint["weakseg"]["steps_done"]
        self.active_steps = dict(checkpoint["weakseg"]["active_steps"])
        if checkpoint["weakseg"].get("model"):  # older ones have none
            self.model.load_training_state(checkpoint["weakseg"]["model"])
        self._resumed = checkpoint

    def trained(self) -> Trainable:
        """The model to use after training: averaged weights where they were kept."""
        return self.averaged.module if self.averaged is not None else self.model  # type: ignore[return-value]

    def check_terms(self) -> None:
        """Makes sure that every declared term was active at some step.

        Raises:
            UserError: A term never was: the schedule was too short for its late start.
        """
        silent = [t for p in self._phases.values() for t in p.terms if not self.active_steps.get(t)]
        if silent:
            raise UserError(
                f"the loss terms {silent} were never active in {self.total_steps} steps",
                where=self.section,
                mend=f"train longer ({self.section}.steps or {self.section}.epochs), or switch the "
                "term off in the method",
            )

    def _run_phase(self, phase: Phase, optimiser: Any, batch: Any, progress: float) -> None:
        count = self.train_config.accumulate
        optimiser.zero_grad()
        sums: dict[str, Tensor] = {}
        for part in batch.parts(count) if count > 1 else [batch]:
            terms = phase.losses(part, progress)
            if not terms:
                continue
            self.manual_backward(torch.stack([t.float() for t in terms.values()]).sum() / count)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach().float() / count
        if not sums and not self._is_distributed():
            return
        self._check_finite(sums)
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        if self._is_distributed():
            _average_gradients(parameters)
        if any(p.grad is not None for p in parameters):  # the same in all processes by now
            optimiser.step()

    def _check_finite(self, sums: dict[str, Tensor]) -> None:
        values = (
            dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}
        )
        if self._is_distributed():
            values = _mean_over_processes(values)  # so that all of them stop at a NaN of one
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the loss became {value} at step {self.steps_done} in the term {name!r}",
                    where=self.section,
                    mend=f"the last good checkpoint stays until you change something; lower {self.section}.lr (a tenth is a "
                    f"good start), set {self.section}.clip: 1, or use {self.section}.precision: "
                    "32-true",
                )
            self.active_steps[name] = self.active_steps.get(name, 0) + 1
        self.latest |= values

    def _set_learning_rate(self, optimiser: Any, progress: float) -> None:
        lr = learning_rate(self.train_config, progress)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["factor"]

    def _is_distributed(self) -> bool:
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def only(model: Trainable, phase: Phase) -> Iterator[None]:
    """Freezes whatever the phase does not train, while it runs."""
    own = {id(p) for p in phase.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def _mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Mean of each loss term over the processes in which it was active."""
    everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, values)
    names = dict.fromkeys(name for one in everyone for name in one)
    return {n: statistics.fmean([one[n] for one in everyone if n in one]) for n in names}


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages gradients over processes; a parameter unused by all of them stays without one."""
    used = torch.tensor(
        [float(p.grad is not None) for p in parameters], device=parameters[0].device
    )
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    shared = [p for p, flag in zip(parameters, used.tolist(), strict=True) if flag]
    if not shared:
        return
    flat = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in shared]
    )
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
        p.grad = grad.view_as(p)
