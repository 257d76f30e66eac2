"""ACR's claims: two phases that leave each other alone, the losses by hand, inferability."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weakseg.config import Frozen
from weakseg.data.drawing import draw
from weakseg.errors import UserError
from weakseg.export.model import initialise
from weakseg.methods import Batch, Classifier, Maps, Method, build, resolve
from weakseg.methods.acr import ACR, _draw
from weakseg.networks.backbone import MakeBackbone, backbone_factory, make_backbone
from weakseg.networks.spec import BackboneSpec
from weakseg.ops import Cells
from weakseg.recipe import load_recipe, shipped_recipes
from weakseg.stages.train import start_backbone
from weakseg.training.config import TrainConfig
from weakseg.training.module import TrainingModule

K = 3
SMALL = {"name": "acr", "width": 4, "depth": 4, "t": 0.8, "nt": 0.3, "start": 0.0}


def new(spec: BackboneSpec, **settings: Any) -> ACR:
    model = build(SMALL | settings, backbone_factory(spec), K)
    assert isinstance(model, ACR)
    return model


def batch_of(size: int = 4, side: int = 64) -> Batch:
    tags = F.one_hot(torch.arange(size) % K, K).float()
    tags[0] = 1
    return Batch(torch.randn(size, 3, side, side), tags, [str(i) for i in range(size)])


def step(model: ACR, phase: str, batch: Batch, progress: float = 0.5) -> None:
    """One step of plain descent, as the loop does it: everything outside the phase is frozen."""
    own = model.phases()[phase]
    parameters = list(own.parameters())
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in parameters))
    torch.stack(list(own.losses(batch, progress).values())).sum().backward()
    with torch.no_grad():
        for p in parameters:
            p -= 0.1 * p.grad
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.requires_grad_(True)


# -- phases


@pytest.mark.parametrize("phase", ["reconstructor", "classifier"])
def test_a_phase_changes_only_its_own_network(phase: str, tiny_spec: BackboneSpec):
    # with zero_init_last every block would start as the identity
    model = new(tiny_spec.model_copy(update={"options": {"zero_init_last": False}}))
    before = copy.deepcopy(model.state_dict())
    step(model, phase, batch_of())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    of_classifier = {k for k in before if k.startswith("classifier.")}
    own = of_classifier if phase == "classifier" else set(before) - of_classifier
    assert changed <= own  # running statistics of BatchNorm as well
    assert {k for k in own if k.endswith("weight")} <= changed
    assert all(module.training for module in model.modules())


def test_the_reconstructor_leads_and_the_classifier_follows(tiny_spec: BackboneSpec):
    phases = new(tiny_spec).phases()
    assert list(phases) == ["reconstructor", "classifier"]
    assert phases["reconstructor"].terms == ("re_cls", "re_full", "re_t", "re_nt")
    assert phases["classifier"].terms == ("cls", "adv_t", "adv_nt")


def test_the_baseline_is_a_cam(tiny_spec: BackboneSpec):
    torch.manual_seed(1)
    model = new(tiny_spec, strategy="baseline")
    torch.manual_seed(1)
    cam = build({"name": "cam"}, backbone_factory(tiny_spec), K)
    batch = batch_of()
    assert list(model.phases()) == ["classifier"]
    assert not [name for name, _ in model.named_parameters() if not name.startswith("classifier.")]
    ours = model.phases()["classifier"].losses(batch, 0.5)
    torch.testing.assert_close(ours, cam.losses(batch, 0.5))
    assert torch.equal(model.eval()(batch.images).scores, cam.eval()(batch.images).scores)


def test_a_pretrained_reconstructor_learns_first_and_then_opposes(tiny_spec: BackboneSpec):
    model = new(tiny_spec, strategy="pretrained", pretrain=0.4)
    ru, cu = model.phases().values()
    assert set(ru.losses(batch_of(), 0.39)) == set(ru.terms)
    assert set(cu.losses(batch_of(), 0.39)) == {"cls"}
    assert ru.losses(batch_of(), 0.4) == {}
    assert set(cu.losses(batch_of(), 0.4)) == set(cu.terms)


def test_terms_switch_off_and_start_late(tiny_spec: BackboneSpec):
    cu = new(tiny_spec, t=0, start=0.3).phases()["classifier"]
    assert cu.terms == ("cls", "adv_nt")
    assert set(cu.losses(batch_of(), 0.2)) == {"cls"}
    assert set(cu.losses(batch_of(), 0.3)) == {"cls", "adv_nt"}


# -- losses


class Given(Classifier):
    """Its maps are what it is told; one weight, so that there is something to train."""

    terms = ("cls",)

    def __init__(
        self, make_backbone: MakeBackbone, classes: int, maps: Callable, cells: Cells | None = None
    ) -> None:
        super().__init__(make_backbone, classes, Frozen())
        self.backbone = make_backbone()
        self.maps = maps
        self.cells = cells

    def classify(self, batch: Batch) -> tuple[Maps, dict[str, Tensor]]:
        zero = next(self.backbone.parameters()).sum() * 0
        return Maps(self.maps(batch) + zero, kind="logit", cells=self.cells), {"cls": zero}


class Painter(nn.Module):
    """Paints the mask itself in every channel; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def features(self, levels: list[Tensor], cells: Any) -> Tensor:
        return levels[0].mean(1, keepdim=True)

    def forward(self, features: Tensor, keep: Tensor, cells: Any) -> Tensor:
        self.given.append(keep)
        return keep.expand(-1, 3, -1, -1) + 0 * features.mean()


def told(spec: BackboneSpec, maps: Tensor, **settings: Any) -> tuple[ACR, Painter]:
    """An ACR whose classifier gives these maps (B, K, h, w) and whose reconstructor paints masks."""
    model = new(spec, **settings)
    model.classifier = Given(backbone_factory(spec), K, lambda _: maps)
    painter = Painter()
    model.reconstructor = painter  # type: ignore[assignment]
    return model, painter


def one_class(batch: int = 2, side: int = 64) -> Batch:
    tags = torch.zeros(batch, K)
    tags[:, 1] = 1
    return Batch(torch.randn(batch, 3, side, side), tags, ["a"] * batch)


def test_both_losses_are_the_formulas_of_the_docstring(tiny_spec: BackboneSpec):
    maps = torch.randn(2, K, 64, 64)  # of the images' size: nothing is enlarged
    model, _ = told(tiny_spec, maps, srf=False)
    batch = one_class()
    image = batch.images
    own = maps[:, 1:2].relu()
    low, high = own.amin((2, 3), keepdim=True), own.amax((2, 3), keepdim=True)
    c = (own - low - 1e-5).clamp(min=0) / (high - low + 1e-5)
    best = (maps.argmax(1, keepdim=True) == 1).float()
    ru, cu = (phase.losses(batch, 0.5) for phase in model.phases().values())
    wanted = {
        "re_full": 0.2 * (1 - image).abs().mean(),
        "re_t": 0.3 * ((1 - c - image) * c).abs().mean(),
        "re_nt": 0.5 * ((c - image) * (1 - c)).abs().mean(),
        "adv_t": -0.8 * ((c - image) * (c == 0)).abs().mean(),
        "adv_nt": -0.3 * ((1 - c - image) * c * best).abs().mean(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close((ru | cu)[name], value)


def test_a_segment_that_hides_nearly_all_is_not_painted(tiny_spec: BackboneSpec):
    maps = torch.zeros(2, K, 64, 64)
    maps[0, 1] = 1
    maps[0, 1, 0, 0] = 0  # one pixel stays
    maps[1, 1, :32] = 1
    model, _ = told(tiny_spec, maps, srf=False)
    batch = one_class()
    term = model.phases()["reconstructor"].losses(batch, 0.5)["re_t"]
    top = batch.images[1, :, :32]
    torch.testing.assert_close(
        term, 0.3 * top.abs().sum() / batch.images.numel(), atol=1e-4, rtol=1e-3
    )


def test_feeding_leaves_remnants_for_the_reconstructor_and_none_for_the_classifier(
    tiny_spec: BackboneSpec,
):
    maps = torch.zeros(2, K, 64, 64)
    maps[:, 1, 16:48, 16:48] = 1
    model, painter = told(tiny_spec, maps, share=(0.25, 0.75), grid=8)
    batch, inside = one_class(), maps[:, 1:2] > 0
    shares = []
    for progress in (0.0, 0.999):
        painter.given.clear()
        for _ in range(40):
            model.phases()["reconstructor"].losses(batch, progress)
        full, rest, segment = torch.stack(painter.given).unflatten(1, (3, 2)).unbind(1)
        assert (full == 1).all()
        assert set(rest.round(decimals=3).unique().tolist()) == {0, 1}
        assert (rest[:, ~inside] == 1).all()  # the rest is never hidden with the segment
        assert (segment[:, inside] > 0.999).all()
        shares.append((rest[:, inside].mean().item(), segment[:, ~inside].mean().item()))
        cells = rest.unflatten(-1, (8, 8)).unflatten(-3, (8, 8))
        assert (
            (cells.amax((-3, -1)) - cells.amin((-3, -1))) < 1e-3
        ).all()  # whole cells of the grid
    for found in shares[0]:
        assert found == pytest.approx(0.75, abs=0.05)
    for found in shares[1]:
        assert found == pytest.approx(0.25, abs=0.05)
    painter.given.clear()
    model.phases()["classifier"].losses(batch, 0.5)
    segment, rest = painter.given[0].chunk(2)
    torch.testing.assert_close(segment, inside.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(rest, 1 - segment)


def test_a_pretrained_reconstructor_meets_all_shares_in_its_own_time(tiny_spec: BackboneSpec):
    model = new(tiny_spec, strategy="pretrained", pretrain=0.4, share=(0.2, 0.8), grid=32)
    shares = [model._grid(torch.zeros(8, 3, 64, 64), p).mean().item() for p in (0, 0.2, 0.3999)]
    assert shares == pytest.approx([0.2, 0.5, 0.8], abs=0.03)


def test_an_image_without_tags_opposes_nothing(tiny_spec: BackboneSpec):
    model, painter = told(tiny_spec, torch.randn(1, K, 8, 8))
    batch = Batch(torch.randn(1, 3, 64, 64), torch.zeros(1, K), ["a"])
    terms = model.phases()["classifier"].losses(batch, 0.5)
    assert (painter.given[0][:1] == 0).all()
    assert terms["adv_t"] == 0
    assert terms["adv_nt"] == 0


def test_the_drawn_class_is_a_tag_and_each_has_its_turn():
    seen = set()
    for i in range(30):
        torch.manual_seed(i)  # as the loop does before each step
        seen.add(_draw(torch.tensor([[0.0, 1, 1]])).item())
    assert seen == {1, 2}


def test_coarser_painting_sees_the_same_image(tiny_spec: BackboneSpec):
    maps = torch.randn(2, K, 8, 8)
    model, painter = told(tiny_spec, maps, detail=2, depth=4)
    batch = one_class()
    model.phases()["classifier"].losses(batch, 0.5)
    assert painter.given[0].shape == (4, 1, 32, 32)
    torch.testing.assert_close(model._pictures(batch.images), F.avg_pool2d(batch.images, 2))


@pytest.mark.parametrize("detail", [1, 2])
def test_segments_lie_where_the_cells_of_the_maps_lie(detail: int, tiny_spec: BackboneSpec):
    """And where the code spreads them evenly, with place: stretch."""
    maps, row = torch.zeros(1, K, 8, 8), np.array([0.0, 0.1, 0.3, 1.0, 0.5, 0.2, 0.1, 0.0])
    maps[:, 1] = torch.from_numpy(row)
    at = detail * np.arange(64 // detail) + (detail - 1) / 2  # middles of what is painted
    for place, cell in (("cells", at / 8), ("stretch", (at + 0.5) / 8 - 0.5)):
        model, painter = told(tiny_spec, maps, place=place, detail=detail)
        model.classifier = Given(
            backbone_factory(tiny_spec), K, lambda _: maps, Cells((8, 8), (0, 0))
        )
        with torch.no_grad():
            model.phases()["classifier"].losses(one_class(1), 0.5)
        found = painter.given[0][0, 0].numpy()
        wanted = np.broadcast_to(np.interp(cell, np.arange(8), row), found.shape)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_the_reconstructor_is_told_where_its_features_lie(tiny_spec: BackboneSpec):
    model = new(tiny_spec, detail=2)
    given = []
    painted = model.reconstructor.forward
    model.reconstructor.forward = lambda f, k, c: (given.append(c), painted(f, k, c))[1]  # type: ignore[method-assign]
    for phase in model.phases().values():
        phase.losses(batch_of(), 0.5)
    (stride, _), (offset, _) = (lambda c: (c.stride, c.offset))(model.encoder.cells((64, 64))[-3])
    middle = (offset - 0.5) / 2  # pixels 0 and 1 are the first one that is painted
    assert given == [Cells((stride / 2, stride / 2), (middle, middle))] * 2
    assert new(tiny_spec, place="stretch")._places(torch.zeros(1, 3, 64, 64)) is None


# -- guards


def module_of(model: ACR) -> TrainingModule:
    config = TrainConfig(steps=4, batch=4, lr=0.1, momentum=0)
    return TrainingModule(model, config, 4, 0)


def run_step(module: TrainingModule, batch: Batch) -> None:
    """One training step without Lightning's trainer."""
    optimisers = module.configure_optimizers()
    module.optimizers = lambda: optimisers  # type: ignore[method-assign]
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    module.training_step(batch, 0)


@pytest.fixture
def _ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingModule, "global_rank", 0, raising=False)


@pytest.mark.usefixtures("_ranked")
@pytest.mark.parametrize("broken", ["reconstructor", "classifier"])
def test_nan_in_one_phase_leaves_the_other_network_intact(broken: str, tiny_spec: BackboneSpec):
    model = new(tiny_spec)
    module = module_of(model)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    if broken == "reconstructor":
        with torch.no_grad():
            model.reconstructor.paint.weight.fill_(float("nan"))
    else:
        plain = model.classifier.classify

        def poisoned(batch: Batch) -> tuple[Maps, dict[str, Tensor]]:
            maps, terms = plain(batch)
            if torch.is_grad_enabled():  # in its own phase
                terms["cls"] = terms["cls"] * float("nan")
            return maps, terms

        model.classifier.classify = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the loss became nan") as caught:
        run_step(module, batch_of())
    assert ("'re_" if broken == "reconstructor" else "'cls'") in str(caught.value)
    now = model.state_dict()
    other = "classifier." if broken == "reconstructor" else ("encoder", "reconstructor.")
    untouched = [k for k in now if k.startswith("classifier.")]
    assert all(
        torch.equal(now[k], kept[k]) for k in untouched if "running" not in k and "num" not in k
    )
    assert all(now[k].isfinite().all() for k in now if k.startswith(other))


def test_a_classifier_is_what_it_needs(tiny_spec: BackboneSpec):
    with pytest.raises(UserError, match="seam does more than classify") as caught:
        new(tiny_spec, classifier="seam")
    assert "cam" in str(caught.value)
    with pytest.raises(UserError, match="unknown method"):
        new(tiny_spec, classifier={"name": "cma"})
    with pytest.raises(UserError, match="t and nt are off"):
        new(tiny_spec, t=0, nt=0)
    kept = new(tiny_spec, classifier={"name": "cam", "hidden": 8}).config.classifier
    assert kept == {"name": "cam", "hidden": 8}


def test_a_small_crop_is_refused_with_the_depth_that_fits(tiny_spec: BackboneSpec):
    model = new(tiny_spec, depth=6)
    with pytest.raises(UserError, match=r"halved 6 times(.|\n)*depth: 5(.|\n)*at least 64"):
        model.phases()["reconstructor"].losses(batch_of(side=48), 0.5)
    coarse = new(tiny_spec, depth=6, detail=2)
    with pytest.raises(UserError, match=r"painted at 56(.|\n)*depth: 5(.|\n)*at least 128"):
        coarse.phases()["reconstructor"].losses(batch_of(side=112), 0.5)


def started(model: Method, source: Method, folder: Path) -> set[str]:
    """Starts a model from another one's folder; names of the tensors that stayed as they were."""
    save_file(source.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return set(initialise(model, folder))


def test_a_classifier_starts_both_networks(tiny_spec: BackboneSpec, tmp_path: Path):
    section = {"name": "cam", "hidden": 8}
    cam = build(section, backbone_factory(tiny_spec), K)
    model = new(tiny_spec, classifier=section)
    fresh = started(model, cam, tmp_path)
    assert fresh
    assert all(key.startswith("reconstructor.") for key in fresh)
    pairs = zip(cam.backbone.parameters(), model.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    batch = batch_of()
    assert torch.equal(model.eval()(batch.images).scores, cam.eval()(batch.images).scores)


def test_a_trained_acr_starts_itself_whole_and_others_as_its_classifier(
    tiny_spec: BackboneSpec, tmp_path: Path
):
    trained, images = new(tiny_spec), torch.randn(1, 3, 64, 64)
    again = new(tiny_spec)
    assert not started(again, trained, tmp_path)
    state = trained.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    cam = build({"name": "cam"}, backbone_factory(tiny_spec), K)
    assert not started(cam, trained, tmp_path)
    assert torch.equal(cam.eval()(images).scores, trained.eval()(images).scores)
    baseline = new(tiny_spec, strategy="baseline")
    fresh = started(again, baseline, tmp_path)
    assert all(key.startswith("reconstructor.") for key in fresh)
    backbone = make_backbone(tiny_spec)
    save_file(state, tmp_path / "model.safetensors")
    start_backbone(backbone, tmp_path, "here")
    pairs = zip(backbone.parameters(), trained.backbone.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_both_phases_of_a_step_draw_the_same_classes(tiny_spec: BackboneSpec):
    model, painter = told(tiny_spec, torch.rand(1, K, 8, 8).expand(16, -1, -1, -1), srf=False)
    batch = Batch(torch.randn(16, 3, 64, 64), torch.ones(16, K), [""] * 16)
    for seed in range(3):
        torch.manual_seed(seed)
        painter.given.clear()
        for phase in model.phases().values():
            phase.losses(batch, 0.5)
        of_ru, of_cu = painter.given
        torch.testing.assert_close(of_ru.chunk(3)[2], of_cu.chunk(2)[0])  # c, in both


@pytest.mark.parametrize("parts", [1, 4])
def test_a_loop_of_ones_own_draws_anew_in_each_step(parts: int, tiny_spec: BackboneSpec):
    """Nothing is seeded between the steps, and the batch is the same one."""
    maps = torch.arange(K).float()[:, None, None] * torch.rand(8, 8)  # class k is k times class 1
    maps = maps.expand(16 // parts, -1, -1, -1) + 0.1 * torch.rand(16 // parts, K, 8, 8)
    model, painter = told(tiny_spec, maps, srf=False)
    batch = Batch(torch.randn(16, 3, 64, 64), torch.ones(16, K), [""] * 16)

    def steps(seed: int) -> list[tuple[Tensor, ...]]:
        torch.manual_seed(seed)
        seen = []
        for _ in range(4):
            painter.given.clear()
            for phase in model.phases().values():
                for part in batch.parts(parts):
                    phase.losses(part, 0.5)
            of_ru, of_cu = painter.given[:parts], painter.given[parts:]
            torch.testing.assert_close(
                torch.cat([g.chunk(3)[2] for g in of_ru]), torch.cat([g.chunk(2)[0] for g in of_cu])
            )
            seen.append(torch.cat([g.detach().chunk(2)[0] for g in of_cu]))
        return seen

    first, again, other = steps(0), steps(0), steps(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert not torch.equal(first[0], other[0])


def test_a_phase_alone_draws_anew_for_the_same_batch(tiny_spec: BackboneSpec):
    model, painter = told(tiny_spec, torch.rand(16, K, 8, 8), srf=False)
    batch = Batch(torch.randn(16, 3, 64, 64), torch.ones(16, K), [""] * 16)
    for phase, pieces in (("reconstructor", 3), ("classifier", 2)):
        painter.given.clear()
        for _ in range(3):
            model.phases()[phase].losses(batch, 0.5)
        segments = [given.chunk(pieces)[-pieces + 1] for given in painter.given]
        assert not any(torch.equal(segments[i], segments[j]) for i in range(3) for j in range(i))


def test_the_arg_max_is_that_of_enlarged_maps(tiny_spec: BackboneSpec):
    """Two maps that cross between two cells: which of them is larger changes at their crossing, not
    half-way between the cells."""
    maps = torch.full((1, K, 4, 4), -1.0)
    maps[:, 1] = torch.tensor([1.0, 0.9, 0.3, 0.0])  # the drawn one; along each row
    maps[:, 2] = torch.tensor([0.0, 0.0, 0.9, 1.0])
    model, _ = told(tiny_spec, maps)
    batch = one_class(1, 32)
    with torch.no_grad():
        found = model.phases()["classifier"].losses(batch, 0.5)["adv_nt"]
    at = ((np.arange(32) + 0.5) * 4 / 32 - 0.5).clip(0, 3)
    own, other = (np.interp(at, np.arange(4), maps[0, k, 0].numpy()) for k in (1, 2))
    c = np.interp(at, np.arange(4), np.maximum(maps[0, 1, 0].numpy(), 0))
    judged = np.broadcast_to(c * (own > other), (32, 32))
    wanted = 0.3 * (np.abs(1 - c - batch.images.numpy()) * judged).mean()
    assert float(found) == pytest.approx(-wanted, rel=1e-4)
    assert (own > other).sum() == 17  # they cross at cell 1.6, pixel 16.3


@pytest.mark.parametrize("name", [n for n in shipped_recipes() if "/acr" in n])
def test_shipped_crops_are_large_enough(name: str):
    recipe = load_recipe(name)
    _, config = resolve(recipe.method)
    assert recipe.train.crop // config.detail >= 2**config.depth


def test_weak_maps_are_not_opposed_harder_than_strong_ones(tiny_spec: BackboneSpec):
    """Else they shrink, are opposed harder still, and end empty, where nothing is given away."""
    strong, batch = torch.rand(2, K, 8, 8) * 4, one_class()
    reached = []
    for factor in (1.0, 0.1, 1e-3):
        maps = (strong * factor).requires_grad_()
        model, painter = told(tiny_spec, maps)
        terms = model.phases()["classifier"].losses(batch, 0.5)
        (gradient,) = torch.autograd.grad(terms["adv_t"] + terms["adv_nt"], maps)
        reached.append((gradient.norm().item(), painter.given[0].detach()))
    assert reached[0][0] > 0
    assert all(norm <= 1.001 * reached[0][0] * 4 for norm, _ in reached[1:])
    torch.testing.assert_close(reached[1][1], reached[0][1], atol=1e-3, rtol=0)  # the same c


def test_the_guard_is_a_range_and_can_be_off(tiny_spec: BackboneSpec):
    """Min-max makes a map of a tenth of the range equal, and its gradient ten times as large."""
    strong = torch.rand(2, K, 8, 8)  # range below 1

    def gradient(factor: float, guard: float) -> float:
        maps = (strong * factor).requires_grad_()
        model, _ = told(tiny_spec, maps, guard=guard)
        torch.manual_seed(0)
        terms = model.phases()["classifier"].losses(batch, 0.5)
        return torch.autograd.grad(terms["adv_t"] + terms["adv_nt"], maps)[0].norm().item()

    batch = one_class()
    assert gradient(0.1, 0) == pytest.approx(10 * gradient(1, 0), rel=1e-2)
    assert gradient(0.1, 1) == pytest.approx(gradient(1, 1), rel=1e-2)
    assert gradient(0.1, 0.05) == pytest.approx(gradient(0.1, 0), rel=1e-6)  # strong enough for it
    ranges = [float(m.max() - m.min()) for m in strong[:, 1]]
    assert gradient(1, 2) == pytest.approx(gradient(1, 0) * np.mean(ranges) / 2, rel=0.05)


def test_presets_give_way_to_keys_beside_them():
    def of(**settings: Any) -> Any:
        return resolve({"name": "acr", **settings})[1]

    assert (of(preset="narrow").width, of(preset="narrow").detail) == (16, 2)
    paper = of(preset="paper", depth=7)
    assert (paper.t, paper.nt, paper.start, paper.dropout) == (0.8, 0.3, 0, 0.5)
    assert (paper.depth, paper.guard, paper.place, paper.merge) == (7, 0, "stretch", "range")
    assert of().guard == 1
    assert of(**paper.model_dump(mode="json")) == paper
    with pytest.raises(UserError, match="preset"):
        of(preset="narow")


# -- inferability


def drawings(count: int, side: int = 64) -> tuple[Tensor, Tensor]:
    """Images of shapes-v1 (B, 3, S, S) around 0, and masks (B, 1, S, S) of a thing in each."""
    found = [draw(0, i, side) for i in range(count)]
    images = np.stack([d.image for d in found])
    masks = np.stack([d.mask == d.mask[(d.mask > 0) & (d.mask < 255)].max() for d in found])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.25, torch.from_numpy(masks)[:, None].float()


def halved(masks: Tensor) -> Tensor:
    """The left half of each mask's pixels."""
    order = masks.sum(-2, keepdim=True).cumsum(-1)
    return masks * (order <= 0.5 * order[..., -1:])


def dilated(masks: Tensor, by: int) -> Tensor:
    return F.max_pool2d(masks, 2 * by + 1, 1, by)


def test_inferability_measures_precision(tiny_spec: BackboneSpec):
    """A thing is hardest to guess where exactly it is hidden: a half left over gives it away, and
    ground hidden with it is guessed from the ground around."""
    images, masks = drawings(224)
    spec = tiny_spec.model_copy(update={"output_stride": 8})
    model = new(spec, width=8, detail=2, dropout=0, share=(0.4, 0.8))
    kinds = (masks, halved(masks), dilated(masks, 4))
    where = torch.zeros(8, dtype=torch.long)

    def maps(batch: Batch) -> Tensor:
        mixed = torch.stack([kinds[i % 3][n] for i, n in enumerate(where.tolist())])
        return mixed.expand(-1, K, -1, -1) - 0.5

    model.classifier = Given(backbone_factory(spec), K, maps)
    ru = model.phases()["reconstructor"]
    optimiser = torch.optim.Adam(ru.parameters(), lr=4e-3)
    for i in range(200):
        torch.manual_seed(i)
        where = torch.randint(0, 128, (8,))
        optimiser.zero_grad()
        terms = ru.losses(Batch(images[where], torch.ones(8, K), []), i / 200)
        torch.stack([v for name, v in terms.items() if name != "re_cls"]).sum().backward()
        optimiser.step()
    model.eval()
    unseen, exact = F.avg_pool2d(images[128:], 2), F.max_pool2d(masks[128:], 2)
    with torch.inference_mode():
        places = model._places(images)
        assert places is not None
        features = model.reconstructor.features(model.encoder(images[128:])[-3:], places)

        def error(hidden: Tensor) -> float:
            off = (
                (model.reconstructor(features, 1 - hidden, places[0]) - unseen)
                .abs()
                .mean(1, keepdim=True)
            )
            return ((off * hidden).sum() / hidden.sum()).item()

        found = error(exact), error(halved(exact)), error(dilated(exact, 2))
    assert found[0] > 1.02 * found[1]
    assert found[0] > 1.02 * found[2]
