"""The training loop: phases, accumulation, clipping, averaging, bad losses, and exact resume."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakseg.data.loading import Augment, MaskBatch, TrainingImages
from weakseg.data.samples import Collection
from weakseg.errors import UserError
from weakseg.methods import Batch, Maps, Phase, Trainable
from weakseg.methods.recurseed import RecurSeed
from weakseg.mixing import build_mix, mixes
from weakseg.networks.backbone import backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.spec import BackboneSpec
from weakseg.training.config import TrainConfig
from weakseg.training.fit import Placement, TrainingResult, fit, read_losses
from weakseg.training.segmenter import Segmenter

AUGMENT = Augment(32, (0.8, 1.2), True, 0.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PLAIN: dict[str, Any] = {
    "batch": 4,
    "lr": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
}


class Toy(Trainable):
    """Two layers without BatchNorm; ``watch`` is called with (self, step) before each loss."""

    heads = ("cam",)
    terms = ("cls",)

    def __init__(self, steps: int, dropout: float = 0.0, watch: Callable | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 8, stride=8)
        self.second = nn.Conv2d(6, 2, 1)
        self.dropout = nn.Dropout(dropout)
        self.steps, self.watch = steps, watch

    def forward(self, images: Tensor, head: str | None = None) -> Maps:
        maps = self.second(self.dropout(self.first(images).tanh()))
        return Maps(maps, kind="logit", logits=maps.mean((2, 3)))

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        if self.watch is not None:
            self.watch(self, round(progress * self.steps))
        return {"cls": F.multilabel_soft_margin_loss(self(batch.images).logits, batch.tags)}


class TwoPhases(Toy):
    """Both losses depend on both layers; each phase trains one of them."""

    def phases(self) -> dict[str, Phase]:
        return {
            "front": Phase(self.front, self.first.parameters, ("a",)),
            "back": Phase(self.back, self.second.parameters, ("b",)),
        }

    def front(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"a": super().losses(batch, progress)["cls"]}

    def back(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {"b": super().losses(batch, progress)["cls"]}


class Ending(TwoPhases):
    """Its first phase has nothing to teach after the first step."""

    def front(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        return super().front(batch, progress) if progress == 0 else {}


@pytest.fixture
def run(tmp_path: Path, tiny_collection: Collection) -> Callable[..., TrainingResult]:
    """Trains in a folder; ``make`` builds the model from the number of steps."""

    def train(
        make: Callable[[int], Trainable] = Toy,
        steps: int = 4,
        folder: str = "run",
        seed: int = 0,
        **settings: Any,
    ) -> TrainingResult:
        return fit(
            tmp_path / folder,
            lambda: make(steps),
            lambda _: TrainingImages(tiny_collection, AUGMENT, seed),
            TrainConfig(**PLAIN | {"steps": steps} | settings),
            Placement("cpu", workers=0),
            seed,
        )

    return train


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def assert_differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert any(not torch.equal(a[key], b[key]) for key in a)


def raising(error: BaseException, at: int) -> Callable[[Toy, int], None]:
    def watch(_: Toy, step: int) -> None:
        if step == at:
            raise error

    return watch


# -- one step


def test_training_changes_the_model_and_counts_its_steps(run, tmp_path: Path):
    start = weights(Toy(3))
    result = run(lambda n: _with(Toy(n), start), steps=3)
    assert_differ(weights(result.model), start)
    assert (result.steps, result.active_steps) == (3, {"cls": 3})
    assert not result.model.training
    assert (tmp_path / "run/last.ckpt").exists()
    assert not list((tmp_path / "run").glob(".*"))
    assert [step for step, _ in read_losses(tmp_path / "run")["cls"]] == [1, 2, 3]


def test_a_phase_without_terms_leaves_its_parameters_alone(run):
    """Neither momentum nor decay moves them."""
    start = weights(Ending(4))
    moving = {"momentum": 0.9, "weight_decay": 0.1}
    once = run(lambda n: _with(Ending(n), start), steps=4, **moving)
    assert once.active_steps == {"a": 1, "b": 4}
    one = run(lambda n: _with(TwoPhases(n), start), steps=4, folder="other", **moving)
    assert one.active_steps == {"a": 4, "b": 4}
    first = run(lambda n: _with(Ending(n), start), steps=1, folder="first", **moving)
    assert torch.equal(once.model.first.weight, first.model.first.weight)
    assert not torch.equal(one.model.first.weight, first.model.first.weight)


def _with(model: Toy, state: dict[str, Tensor]) -> Toy:
    model.load_state_dict(state)
    return model


def test_one_step_is_one_step_of_sgd(run, tiny_collection: Collection):
    kept: dict[str, Any] = {}

    def keep(model: Toy, step: int) -> None:
        kept.setdefault("start", weights(model))

    class Keeping(Toy):
        def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            kept["batch"] = batch
            return super().losses(batch, progress)

    trained = run(lambda n: Keeping(n, watch=keep), steps=1, lr=0.3).model
    model = _with(Toy(1), kept["start"])
    model.losses(kept["batch"], 0.0)["cls"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained.state_dict()[name], p - 0.3 * p.grad)


def test_each_phase_changes_only_its_own_parameters(run):
    calls: list[tuple[dict[str, Tensor], dict[str, bool]]] = []

    def watch(model: Toy, step: int) -> None:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        calls.append((weights(model), flags))

    result = run(lambda n: TwoPhases(n, watch=watch), steps=2)
    assert len(calls) == 4
    calls.append((weights(result.model), {}))
    for i, ((before, flags), (after, _)) in enumerate(zip(calls, calls[1:], strict=False)):
        own = "first" if i % 2 == 0 else "second"
        assert {n for n, flag in flags.items() if flag} == {f"{own}.weight", f"{own}.bias"}
        for name in before:
            assert torch.equal(before[name], after[name]) == (not name.startswith(own)), name
    assert all(p.requires_grad for p in result.model.parameters())
    assert result.active_steps == {"a": 2, "b": 2}


def test_an_accumulated_batch_is_the_batch(run):
    whole = run(folder="whole", steps=3)
    for parts in (2, 4):
        found = run(folder=f"in {parts}", steps=3, accumulate=parts)
        for name, value in weights(found.model).items():
            torch.testing.assert_close(value, weights(whole.model)[name])
        assert found.active_steps == {"cls": 3}


def test_clipping_bounds_the_step(run):
    starts: list[dict[str, Tensor]] = []
    make = lambda n: Toy(n, watch=lambda model, _: starts.append(weights(model)))  # noqa: E731
    for clip, wanted in ((0.01, 0.01), (1e6, None)):
        starts.clear()
        after = weights(run(make, steps=1, lr=1.0, clip=clip, folder=f"clip {clip}").model)
        moved = torch.cat([(after[k] - starts[0][k]).flatten() for k in after]).norm()
        if wanted is not None:
            torch.testing.assert_close(moved, torch.tensor(wanted), rtol=1e-3, atol=0)
        else:
            assert moved > 0.05


def test_averaged_weights_have_their_closed_form(run):
    seen: list[dict[str, Tensor]] = []

    class Logged(Toy):
        def __init__(self, steps: int) -> None:
            super().__init__(steps)
            self.register_buffer("count", torch.zeros(1))  # as the statistics of BatchNorm

        def after_step(self, progress: float) -> None:
            self.count += 1
            seen.append(weights(self))

    found = weights(run(Logged, steps=5, ema=0.8).model)
    assert len(seen) == 5
    for name in found:
        first, *rest = [step[name] for step in seen]
        wanted = 0.8**4 * first + sum(0.2 * 0.8 ** (3 - i) * w for i, w in enumerate(rest))
        torch.testing.assert_close(found[name], wanted)
    assert_differ(found, seen[-1])


def test_the_schedule_reaches_the_optimiser(run, tmp_path: Path):
    run(steps=4, schedule="poly", power=1.0, lr=0.4)
    rates = [value for _, value in read_losses(tmp_path / "run")["lr"]]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_new_layers_take_longer_steps(run):
    """Beside a backbone that was trained before; the schedule keeps the factor."""
    names = ("second.weight", "backbone.network.conv1.0.weight")
    before: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    steps: dict[str, tuple[Tensor, Tensor]] = {}

    class Started(Toy):
        def __init__(self, steps: int) -> None:
            super().__init__(steps)
            spec = BackboneSpec(name="test_resnet", pretrained=False)
            self.backbone = make_backbone(spec)
            self.backbone.from_scratch = False

        def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            if progress:
                for name in names:
                    steps[name] = self.get_parameter(name).detach() - before[name], gradients[name]
            deep = self.backbone(batch.images)[-1].mean()
            terms = {"cls": super().losses(batch, progress)["cls"] + deep}
            for name in names:
                own = self.get_parameter(name)
                before[name] = own.detach().clone()
                own.register_hook(lambda g, name=name: gradients.__setitem__(name, g.clone()))
            return terms

    run(Started, steps=2, lr=0.1, head_lr=7)
    for name, factor in zip(names, (7, 1), strict=True):
        moved, gradient = steps[name]
        torch.testing.assert_close(moved, -0.1 * factor * gradient, atol=1e-6, rtol=1e-3)


def test_each_step_draws_anew(run):
    drawn: list[float] = []
    run(lambda n: Toy(n, watch=lambda *_: drawn.append(torch.rand(()).item())), steps=4)
    assert len(set(drawn)) == 4


def test_progress_is_the_share_that_is_done(run):
    seen: list[float] = []

    class Logged(Toy):
        def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            seen.append(progress)
            return super().losses(batch, progress)

    run(Logged, steps=4)
    assert seen == [0, 0.25, 0.5, 0.75]


# -- terms


class Late(Toy):
    """A second term from three quarters on, and nothing at all in the first step."""

    terms = ("cls", "late")

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        terms = super().losses(batch, progress)
        if progress == 0:
            return {}
        return terms | ({"late": 0 * terms["cls"]} if progress >= 0.75 else {})


def test_terms_may_come_late(run):
    assert run(Late, steps=4).active_steps == {"cls": 3, "late": 1}


def test_a_declared_term_that_never_was_active_is_an_error(run):
    for _ in range(2):  # the second call finds a finished training, and says the same
        with pytest.raises(UserError, match=r"\['late'\] were never active in 3 steps") as caught:
            run(Late, steps=3)
        assert caught.value.mend is not None
        assert "train.steps" in caught.value.mend


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_before_it_harms(run, tmp_path: Path, bad: float):
    class Bad(Toy):
        def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
            terms = super().losses(batch, progress)
            return {name: t * bad if progress == 0.5 else t for name, t in terms.items()}

    with pytest.raises(UserError) as caught:
        run(Bad, steps=10, checkpoint_every=2)
    assert "at step 5 in the term 'cls'" in caught.value.what
    assert caught.value.mend is not None
    assert "lower train.lr" in caught.value.mend
    kept = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert kept["weakseg"]["steps_done"] == 4
    assert all(v.isfinite().all() for v in kept["state_dict"].values())
    mended = run(steps=10, checkpoint_every=2)
    assert_equal(weights(mended.model), weights(run(steps=10, folder="whole").model))


def test_weights_that_are_no_numbers_are_not_kept(run, tmp_path: Path):
    """A step can spoil them though its own loss was finite."""

    class Spoiled(Toy):
        def after_step(self, progress: float) -> None:
            if progress == 0.5:
                self.second.weight.data[0, 0] = float("nan")

    with pytest.raises(UserError, match="became nan at step 3"):
        run(Spoiled, steps=4, checkpoint_every=1)
    kept = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert kept["weakseg"]["steps_done"] == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_by_loader_processes_too(
    tiny_collection: Collection, tmp_path: Path, workers: int
):
    victim = tiny_collection[3].image
    victim.write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        fit(
            tmp_path / "run",
            lambda: Toy(4),
            lambda _: TrainingImages(tiny_collection, AUGMENT, 0),
            TrainConfig(**PLAIN | {"steps": 4}),
            Placement("cpu", workers=workers),
            0,
        )
    assert caught.value.where == str(victim)
    assert caught.value.mend
    assert "Traceback" not in caught.value.what


def test_a_batch_that_cannot_be_cut_is_refused(run, tiny_collection, tmp_path: Path):
    config = TrainConfig(batch=6, accumulate=2, steps=1)
    with pytest.raises(UserError, match="cannot be shared by 2 devices in 2 parts") as caught:
        fit(
            tmp_path,
            lambda: Toy(1),
            lambda _: TrainingImages(tiny_collection, AUGMENT, 0),
            config,
            Placement("cpu", devices=2),
            0,
        )
    assert caught.value.where == "train.batch"


# -- resume


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 1e-3, "schedule": "poly"},
        {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.1, "schedule": "cosine"},
        {"momentum": 0.9, "ema": 0.7},
        {"optimiser": "adamw", "lr": 0.01, "accumulate": 2, "clip": 0.05, "warmup": 0.3},
    ],
    ids=["sgd", "adamw", "averaged", "accumulated"],
)
@pytest.mark.parametrize("stop", [3, 5])
def test_an_interrupted_training_ends_bit_equal(run, tmp_path: Path, settings: dict, stop: int):
    settings = settings | {"steps": 7, "checkpoint_every": 3}
    whole = run(lambda n: Toy(n, dropout=0.5), folder="whole", **settings)
    broken = lambda n: Toy(n, 0.5, raising(RuntimeError("power cut"), stop))  # noqa: E731
    with pytest.raises(RuntimeError, match="power cut"):
        run(broken, **settings)
    kept = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert kept["weakseg"]["steps_done"] == 3

    torch.manual_seed(99)  # nothing may hang on the random state at the start
    resumed_at: list[int] = []
    again = run(lambda n: Toy(n, 0.5, lambda _, step: resumed_at.append(step)), **settings)
    assert min(resumed_at) == 3
    assert_equal(weights(again.model), weights(whole.model))
    assert again.active_steps == whole.active_steps == {"cls": 7}
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def test_two_phases_resume_bit_equal(run):
    settings = {"steps": 5, "checkpoint_every": 2, "momentum": 0.9}
    whole = run(TwoPhases, folder="whole", **settings)
    with pytest.raises(RuntimeError):
        run(lambda n: TwoPhases(n, watch=raising(RuntimeError(), 3)), **settings)
    assert_equal(weights(run(TwoPhases, **settings).model), weights(whole.model))


def test_a_finished_training_is_not_trained_again(run):
    first = run(steps=3)
    again = run(lambda n: Toy(n, watch=raising(AssertionError("trained again"), 0)), steps=3)
    assert_equal(weights(first.model), weights(again.model))


def test_other_seeds_give_other_weights(run):
    found = [weights(run(steps=2, seed=seed, folder=str(seed)).model) for seed in (0, 1)]
    assert_differ(*found)


def test_a_damaged_checkpoint_is_named(run, tmp_path: Path):
    run(steps=2)
    file = tmp_path / "run/last.ckpt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="the checkpoint cannot be read") as caught:
        run(steps=2)
    assert caught.value.where == str(file)


def test_ctrl_c_stays_ctrl_c(run):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(lambda n: Toy(n, watch=raising(KeyboardInterrupt(), 2)), checkpoint_every=1)
    assert signal.getsignal(signal.SIGINT) is before
    assert run(checkpoint_every=1).active_steps == {"cls": 4}


# -- the segmenter


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    backbone = make_backbone(BackboneSpec(name="test_resnet", pretrained=False))
    return Segmenter(DeepLabV3Plus(backbone, 3, channels=8, dilations=(1, 2, 3))).eval()


def test_unsure_pixels_do_not_train(segmenter: Segmenter):
    images = torch.randn(2, 3, 32, 32)
    masks = torch.randint(0, 3, (2, 32, 32))
    masks[:, :, 20:] = 255
    loss = segmenter.losses(MaskBatch(images, masks, ["a", "b"]), 0.0)["seg"]
    logits = segmenter.network(images)[..., :20].movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks[..., :20].reshape(-1)))


def test_a_batch_of_unsure_pixels_alone_has_no_loss(segmenter: Segmenter):
    batch = MaskBatch(torch.randn(1, 3, 32, 32), torch.full((1, 32, 32), 255), ["a"])
    loss = segmenter.losses(batch, 0.0)["seg"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in segmenter.parameters())


def test_a_segmenter_gives_probabilities(segmenter: Segmenter):
    with torch.inference_mode():
        maps = segmenter(torch.randn(2, 3, 33, 40))
    assert maps.kind == "probability"
    assert maps.scores.shape == (2, 2, 33, 40)
    total = maps.scores.sum(1) + maps.background[:, 0]
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("mix", sorted(mixes))
def test_a_segmenter_trains_on_mixed_images_too(segmenter: Segmenter, mix: str):
    mixed = Segmenter(segmenter.network, build_mix(mix, 2), mix_start=0.5).eval()
    batch = MaskBatch(torch.randn(4, 3, 32, 32), torch.randint(0, 3, (4, 32, 32)), list("abcd"))
    assert set(mixed.losses(batch, 0.4)) == {"seg"}
    terms = mixed.losses(batch, 0.5)
    assert set(terms) == set(mixed.terms) == {"seg", "mix_seg"}
    assert terms["seg"] == segmenter.losses(batch, 0.5)["seg"]
    assert terms["mix_seg"].isfinite() and terms["mix_seg"].requires_grad


def test_a_training_with_a_teacher_and_a_bank_goes_on_bit_equal(run, tmp_path: Path):
    """What only ``training_state`` holds decides the steps after the interruption."""

    class Broken(RecurSeed):
        stop = 99

        def after_step(self, progress: float) -> None:
            super().after_step(progress)
            if round(progress * 6) == self.stop:
                raise RuntimeError("power cut")

    spec = BackboneSpec(name="test_resnet", pretrained=False, options={"zero_init_last": False})
    config = RecurSeed.Config(
        start=0, mix_start=0, teacher=0.5, mix={"name": "cda", "least": 0.01, "most": 1},
        channels=8, dilations=(1, 2, 3), foreground=0.3, background=0.2,
    )  # fmt: skip

    def make(stop: int) -> Callable[[int], RecurSeed]:
        def model(_: int) -> RecurSeed:
            made = Broken(backbone_factory(spec), 2, config)
            made.stop = stop
            return made

        return model

    settings = {"steps": 6, "checkpoint_every": 2, "accumulate": 2, "ema": 0.7}
    whole = run(make(99), folder="whole", **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        run(make(4), **settings)
    kept = torch.load(tmp_path / "run/last.ckpt", weights_only=True)["weakseg"]
    assert kept["model"]["teacher"] and kept["model"]["mix"]
    assert_equal(weights(run(make(99), **settings).model), weights(whole.model))


def test_checkpoints_without_a_state_of_the_model_are_gone_on_with(run, tmp_path: Path):
    """Those that were written before methods had one."""
    with pytest.raises(RuntimeError, match="power cut"):
        run(
            lambda n: Toy(n, watch=raising(RuntimeError("power cut"), 3)),
            steps=5,
            checkpoint_every=2,
        )
    path = tmp_path / "run/last.ckpt"
    kept = torch.load(path, weights_only=True)
    del kept["weakseg"]["model"]
    torch.save(kept, path)
    assert_equal(
        weights(run(steps=5, checkpoint_every=2).model), weights(run(steps=5, folder="whole").model)
    )
