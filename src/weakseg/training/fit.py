"""Runs a training to its end, from wherever it stopped."""

from __future__ import annotations

import contextlib
import copy
import csv
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from weakseg.console import Bar, console
from weakseg.data.loading import (
    StepBatches,
    TrainingFeatures,
    TrainingImages,
    loader_processes,
    training_loader,
)
from weakseg.errors import UserError
from weakseg.files import atomic_path
from weakseg.memory import keep_freed_memory
from weakseg.methods.base import Trainable
from weakseg.training.config import Precision, TrainConfig
from weakseg.training.footprint import NARROWER, WEIGHTS_IN_TRAINING, within_memory
from weakseg.training.module import TrainingModule, only
from weakseg.training.precision import chosen_precision

__all__ = ["Placement", "TrainingResult", "fit", "read_losses"]

_CHECKPOINT = "last.ckpt"


@dataclass(frozen=True)
class Placement:
    """Where a training runs: the recipe's ``runtime`` section.

    Attributes:
        accelerator: ``auto``, ``cpu`` or ``gpu``.
        devices: Processes on each machine.
        nodes: Machines.
        workers: Loader processes of each; ``None`` = by the number of cores.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    workers: int | None = None


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        model: The trained model, in evaluation mode, on the CPU.
        steps: Steps of the schedule.
        active_steps: Steps in which each loss term was active.
    """

    model: Trainable
    steps: int
    active_steps: dict[str, int]


def fit(
    folder: Path,
    make_model: Callable[[], Trainable],
    make_data: Callable[[Trainable], TrainingImages | TrainingFeatures],
    config: TrainConfig,
    placement: Placement,
    seed: int,
    title: str = "train",
    section: str = "train",
) -> TrainingResult:
    """Trains, with checkpoints in ``folder``; a second call goes on from the last one.

    The result does not depend on how often it was interrupted: on the same CPU and number of
    threads it is bit-equal. (On a GPU it sees the same batches and random numbers, but some of
    CUDA's kernels add in an order of their own.)

    Args:
        folder: Gets ``last.ckpt``, ``logs/`` and, where the settings ask for them, ``snapshots/``.
        make_model: Builds the model with its starting weights.
        make_data: Builds the data for the model's normalisation.
        config: Schedule and optimiser.
        placement: Devices.
        seed: Seed of weights, order, views and dropout.
        title: Of the progress bar.
        section: Section of the recipe that ``config`` is, for errors.

    Raises:
        UserError: A loss that is not finite, a term that was never active, an unreadable image.
    """
    _hush()
    keep_freed_memory()
    L.seed_everything(seed, workers=False, verbose=False)
    with within_memory(section, NARROWER, WEIGHTS_IN_TRAINING):
        model = make_model()
    data = make_data(model)
    world = placement.devices * placement.nodes
    if config.batch % (world * config.accumulate):
        raise UserError(
            f"a batch of {config.batch} cannot be shared by {world} devices in {config.accumulate} parts each",
            where=f"{section}.batch",
            mend=f"make it a multiple of {world * config.accumulate}",
        )
    config = config.model_copy(
        update={"precision": _precision(folder, model, data, config, placement)}
    )
    steps = config.total_steps(len(data))
    module = TrainingModule(model, config, steps, seed, section)
    checkpoint = folder / _CHECKPOINT
    if checkpoint.exists():
        kept = _read_checkpoint(checkpoint)
        try:
            module.resume(kept)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint is of another training ({str(error).splitlines()[0]})",
                where=checkpoint,
                mend="delete it to train from the start",
            ) from None
    if module.steps_done < steps:
        _train(folder, module, data, placement, seed, title)
    module.check_terms()
    trained = module.trained().cpu().eval()
    return TrainingResult(trained, steps, dict(module.active_steps))


def _precision(
    folder: Path,
    model: Trainable,
    data: TrainingImages | TrainingFeatures,
    config: TrainConfig,
    placement: Placement,
) -> Precision:
    """The precision of the training; what ``auto`` means is measured on two of its images."""
    if isinstance(data, TrainingFeatures):
        return "32-true"  # a linear layer on averages: nothing to gain
    if config.precision != "auto":
        return config.precision
    gpu = placement.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    (batch,) = training_loader(data, [[(0, 0), (1 % len(data), 0)]], 0)
    if isinstance(batch, UserError):
        raise batch
    with torch.random.fork_rng(devices=[]):
        probe = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
        batch.images = batch.images.contiguous(memory_format=torch.channels_last)

        def work() -> None:
            for phase in probe.phases().values():
                with only(probe, phase):
                    terms = phase.losses(batch, 0.0)
                    if terms:
                        torch.stack([t.float() for t in terms.values()]).sum().backward()

        return chosen_precision(folder, "auto", device, work)


def _train(
    folder: Path,
    module: TrainingModule,
    data: TrainingImages | TrainingFeatures,
    placement: Placement,
    seed: int,
    title: str,
) -> None:
    config, start = module.train_config, module.steps_done
    world = placement.devices * placement.nodes
    trainer = L.Trainer(
        max_epochs=1,
        accelerator=placement.accelerator,
        devices=placement.devices,
        num_nodes=placement.nodes,
        strategy="ddp" if world > 1 else "auto",
        precision=config.precision,  # type: ignore[arg-type]  # auto was decided before
        logger=CSVLogger(
            folder, name="logs", version=f"from-{start:07d}", flush_logs_every_n_steps=10
        ),
        callbacks=[
            _Keep(folder / _CHECKPOINT, config.checkpoint_every),
            _Snapshots(folder / "snapshots", config.snapshot_every),
            _Show(title),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    accelerator = "cpu" if trainer.strategy.root_device.type == "cpu" else "gpu"
    if accelerator == "cpu" and config.precision == "16-mixed":
        console.print("  16-mixed needs a GPU: bf16-mixed is used instead")
    pooled = isinstance(data, TrainingFeatures)  # a look-up needs no process of its own
    workers = 0 if pooled else loader_processes(placement.workers, accelerator)
    with _stoppable():
        trainer.fit(module, _StepLoader(data, module, workers, seed, world))


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C: Lightning turns it into an exit, and switches it off for good."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


class _StepLoader(L.LightningDataModule):
    """Makes the loader once the process knows its rank."""

    def __init__(
        self,
        data: TrainingImages | TrainingFeatures,
        module: TrainingModule,
        workers: int,
        seed: int,
        world: int,
    ) -> None:
        super().__init__()
        self.data, self.module = data, module
        self.workers, self.seed, self.world = workers, seed, world

    def train_dataloader(self) -> DataLoader:
        module = self.module
        batches = StepBatches(
            len(self.data),
            module.train_config.batch,
            module.total_steps,
            self.seed,
            start=module.steps_done,
            rank=self.trainer.global_rank if self.trainer else 0,
            world=self.world,
        )
        return training_loader(self.data, batches, self.workers)


class _Keep(Callback):
    """Writes a checkpoint every so many steps and at the end; it appears only when complete."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: D102
        done = pl_module.steps_done
        if done % self.every == 0 or done == pl_module.total_steps:
            temporary = self.path.with_name(f".{self.path.name}.part")
            if not all(bool(p.isfinite().all()) for p in pl_module.model.parameters()):
                return  # the next loss will say so; the last good checkpoint stays
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                os.replace(temporary, self.path)


class _Snapshots(Callback):
    """Writes the weights every so many steps as ``<step>.safetensors``, to look back at a training."""

    def __init__(self, folder: Path, every: int | None) -> None:
        self.folder, self.every = folder, every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: D102
        done = pl_module.steps_done
        if self.every and done % self.every == 0 and trainer.is_global_zero:
            state = {k: v.contiguous() for k, v in pl_module.trained().state_dict().items()}
            with atomic_path(self.folder / f"{done:07d}.safetensors") as temporary:
                save_file(state, temporary)


class _Show(Callback):
    """Moves the bar and logs the loss terms about 200 times in a training."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Bar | None = None

    def on_train_start(self, trainer, pl_module) -> None:  # noqa: D102
        if trainer.is_global_zero:
            self.bar = Bar(self.title, pl_module.total_steps, pl_module.steps_done)
            self.bar.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: D102
        done, latest = pl_module.steps_done, pl_module.latest
        if self.bar is not None:
            self.bar.to(done, " ".join(f"{name} {value:.3f}" for name, value in latest.items()))
        every = max(1, pl_module.total_steps // 200)
        if trainer.logger is not None and (done % every == 0 or done == pl_module.total_steps):
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            trainer.logger.log_metrics({**latest, "lr": lr}, step=done)

    def on_train_end(self, trainer, pl_module) -> None:  # noqa: D102
        self._close()

    def on_exception(self, trainer, pl_module, exception) -> None:  # noqa: D102
        self._close(exception)

    def _close(self, error: BaseException | None = None) -> None:
        if self.bar is not None:
            self.bar.__exit__(type(error) if error else None, error, None)
            self.bar = None


def read_losses(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The logged terms of a training as (step, value) lists; a later start overrules an earlier."""
    rows: dict[int, dict[str, str]] = {}
    for file in sorted((folder / "logs").glob("from-*/metrics.csv")):
        start = int(file.parent.name.removeprefix("from-"))
        rows = {step: row for step, row in rows.items() if step <= start}
        with file.open(newline="", encoding="utf-8") as lines:
            rows |= {int(row["step"]): row for row in csv.DictReader(lines)}
    curves: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if name not in ("step", "epoch") and value:
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def _read_checkpoint(path: Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on a damaged file
        raise UserError(
            f"the checkpoint cannot be read ({error})",
            where=path,
            mend="delete it to train from the start",
        ) from None


def _hush() -> None:
    """Silences Lightning's banners: they advise on things that are decided here."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
