"""What every method must hold: a registered method is tested here without a file of its own."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from weakseg.config import Frozen
from weakseg.methods import Batch, Card, Maps, Method, Phase, build, methods
from weakseg.mixing import mixes
from weakseg.networks.backbone import Backbone, backbone_factory
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import shipped_recipes

K = 3
PROGRESS = (0.0, 0.5, 0.99)
"""Early, in the middle and late: a late term must be active at one of them."""


@contextmanager
def only(model: Method, phase: Phase) -> Iterator[list[nn.Parameter]]:
    """Freezes what the phase does not train, as the training loop does; yields what it trains."""
    own = {id(p) for p in phase.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    others = [p for p in trainable if id(p) not in own]
    for p in others:
        p.requires_grad_(False)
    try:
        yield [p for p in trainable if id(p) in own]
    finally:
        for p in others:
            p.requires_grad_(True)


def batch_of(size: int = 4, side: int = 64, tagged: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, side, side, generator=generator)
    tags = torch.zeros(size, K)
    if tagged:
        tags[torch.arange(size), torch.arange(size) % K] = 1
        tags[0] = 1
    return Batch(images, tags, [f"i{i}" for i in range(size)])


def finite(gradients: list[Tensor]) -> bool:
    return all(bool(g.isfinite().all()) for g in gradients)


class MethodContract:
    """The suite. A class that inherits it gives ``name``, and other settings where it must."""

    name: str
    settings: dict[str, object] = {}
    spec = BackboneSpec(  # with zero_init_last every block would start as the identity
        name="test_resnet", pretrained=False, options={"zero_init_last": False}
    )

    def new(self, seed: int = 0) -> Method:
        torch.manual_seed(seed)
        section = {"name": self.name, **self.settings}
        return build(section, backbone_factory(self.spec), K)

    @pytest.fixture
    def model(self) -> Method:
        return self.new()

    def steps(self, model: Method, batch: Batch) -> Iterator[tuple[Phase, float, dict]]:
        """Every phase at every progress, after its backward pass."""
        for progress in PROGRESS:
            for phase in model.phases().values():
                model.zero_grad(set_to_none=True)
                with only(model, phase):
                    terms = phase.losses(batch, progress)
                    if terms:
                        torch.stack([t.float() for t in terms.values()]).sum().backward()
                yield phase, progress, terms

    # -- what it says of itself

    def test_card_is_complete(self):
        method = methods[self.name]
        card = method.card
        assert isinstance(card, Card)
        assert card.name == self.name
        assert card.paper.strip()
        assert 1990 < card.year < 2100
        assert 10 < len(card.idea) <= 120
        assert "\n" not in card.idea
        assert not card.idea.endswith(".")
        assert all(isinstance(v, (int, float)) for v in card.published.values())

    def test_card_names_recipes_that_are_shipped(self):
        assert set(methods[self.name].card.recipes) <= set(shipped_recipes())

    def test_module_explains_paper_idea_and_loss(self):
        text = inspect.getdoc(inspect.getmodule(methods[self.name])) or ""
        assert len(text) > 400
        assert ".. math::" in text or ":math:" in text
        assert methods[self.name].__doc__

    def test_settings_are_frozen_and_their_defaults_valid(self):
        config_class = methods[self.name].Config
        assert issubclass(config_class, Frozen)
        config = config_class()
        assert config_class(**config.model_dump()) == config
        with pytest.raises(ValidationError, match="xtra"):
            config_class(no_such_setting=1)
        for key in config_class.model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(config, key, None)

    def test_heads_are_named(self, model: Method):
        assert model.heads
        assert len(set(model.heads)) == len(model.heads)

    # -- phases and losses

    def test_phases_name_parameters_of_the_model(self, model: Method):
        phases = model.phases()
        assert phases
        own = {id(p) for p in model.parameters()}
        for name, phase in phases.items():
            assert name.isidentifier()
            parameters = list(phase.parameters())
            assert parameters
            assert {id(p) for p in parameters} <= own
            assert phase.terms
            assert any(p.requires_grad for p in parameters)

    def test_losses_are_finite_scalars_with_declared_names(self, model: Method):
        seen: set[str] = set()
        for phase, progress, terms in self.steps(model, batch_of()):
            assert set(terms) <= set(phase.terms), f"undeclared terms at {progress}"
            seen |= set(terms)
            for name, term in terms.items():
                assert term.shape == (), name
                assert term.isfinite(), name
        declared = {term for phase in model.phases().values() for term in phase.terms}
        assert seen == declared, "a declared term is never active"

    def test_gradients_stay_inside_the_phase(self, model: Method):
        for phase, _, terms in self.steps(model, batch_of()):
            own = {id(p) for p in phase.parameters()}
            reached = {id(p) for p in model.parameters() if p.grad is not None}
            assert reached <= own
            assert bool(reached) == bool(terms)
            assert finite([p.grad for p in model.parameters() if p.grad is not None])

    def test_gradients_reach_the_backbone_and_every_trained_weight(self, model: Method):
        reached: set[int] = set()
        trained: set[int] = set()
        for phase, _, _ in self.steps(model, batch_of()):
            trained |= {id(p) for p in phase.parameters() if p.requires_grad}
            reached |= {
                id(p) for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0
            }
        names = {id(p): name for name, p in model.named_parameters()}
        first = next(p for p in model.backbone.parameters() if p.requires_grad)
        assert id(first) in reached
        assert not sorted(names[i] for i in trained - reached), "trained, but no loss reaches them"

    @pytest.mark.parametrize(
        "batch",
        [batch_of(1), batch_of(2, tagged=False), batch_of(1, tagged=False), batch_of(3)],
        ids=["one image", "no tags", "one image, no tags", "three images"],
    )
    def test_small_and_untagged_batches_train(self, model: Method, batch: Batch):
        for _, _, terms in self.steps(model, batch):
            assert all(term.isfinite() for term in terms.values())
            assert finite([p.grad for p in model.parameters() if p.grad is not None])

    def test_half_precision_gives_finite_losses(self, model: Method):
        batch = batch_of()
        for progress in PROGRESS:
            for phase in model.phases().values():
                with only(model, phase), torch.autocast("cpu", dtype=torch.bfloat16):
                    terms = phase.losses(batch, progress)
                assert all(term.isfinite() for term in terms.values())

    def test_the_batch_is_left_as_it_was(self, model: Method):
        batch, kept = batch_of(), batch_of()
        for _ in self.steps(model, batch):
            assert torch.equal(batch.images, kept.images)
            assert torch.equal(batch.tags, kept.tags)

    def test_same_seed_same_training(self):
        def train() -> dict[str, Tensor]:
            model = self.new()
            for phase, progress, _ in self.steps(model, batch_of()):
                with torch.no_grad():
                    for p in phase.parameters():
                        if p.grad is not None:
                            p -= 0.01 * p.grad
                model.after_step(progress)
            return model.state_dict()

        first, second = train(), train()
        assert all(torch.equal(first[key], second[key]) for key in first)
        fresh = self.new().state_dict()
        assert any(not torch.equal(first[key], fresh[key]) for key in first)

    # -- maps

    def check_maps(self, maps: Maps, size: int) -> None:
        batch, classes, height, width = maps.scores.shape
        assert (batch, classes) == (size, K)
        assert min(height, width) >= 1
        assert maps.scores.isfinite().all()
        assert maps.kind in ("logit", "unit", "probability")
        if maps.kind != "logit":
            assert maps.scores.min() >= 0
        if maps.kind == "probability":
            assert maps.scores.max() <= 1
        if maps.background is not None:
            assert maps.kind == "probability"
            assert maps.background.shape == (size, 1, height, width)
            total = maps.background.sum(1) + maps.scores.sum(1)
            torch.testing.assert_close(total, torch.ones_like(total))
        if maps.logits is not None:
            assert maps.logits.shape == (size, K)
            assert maps.logits.isfinite().all()

    @pytest.mark.parametrize("size", [(64, 64), (65, 47), (31, 96)])
    def test_maps_of_every_head_at_any_size(self, model: Method, size: tuple[int, int]):
        model.eval()
        with torch.inference_mode():
            for head in (None, *model.heads):
                self.check_maps(model(torch.randn(2, 3, *size), head), 2)

    def test_no_head_is_the_first_head(self, model: Method):
        model.eval()
        images = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            assert torch.equal(model(images).scores, model(images, model.heads[0]).scores)

    def test_an_image_does_not_see_its_neighbours(self, model: Method):
        model.eval()
        images = torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            both, singles = model(images), [model(image[None]) for image in images]
        for key in ("scores", "background", "logits"):
            if getattr(both, key) is not None:
                alone = torch.cat([getattr(maps, key) for maps in singles])
                torch.testing.assert_close(getattr(both, key), alone, atol=1e-5, rtol=1e-4)

    def test_forward_changes_nothing(self, model: Method):
        model.eval()
        before = copy.deepcopy(model.state_dict())
        flags = [p.requires_grad for p in model.parameters()]
        with torch.inference_mode():
            first = model(torch.ones(2, 3, 64, 64)).scores
            model(torch.randn(2, 3, 48, 64))
            again = model(torch.ones(2, 3, 64, 64)).scores
        assert torch.equal(first, again)
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any(module.training for module in model.modules())

    def test_features_match_the_levels(self, model: Method):
        model.eval()
        assert isinstance(model.backbone, Backbone)
        with torch.inference_mode():
            found = model.features(torch.randn(2, 3, 64, 96))
        wanted = [(2, v.channels, 64 // v.stride, 96 // v.stride) for v in model.backbone.levels]
        assert [tuple(f.shape) for f in found] == wanted

    # -- storage

    def test_state_round_trip(self, model: Method):
        for _ in self.steps(model, batch_of()):
            model.after_step(0.5)
        other = self.new(seed=1)
        images = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            assert not torch.equal(model.eval()(images).scores, other.eval()(images).scores)
            other.load_state_dict(model.state_dict())
            assert torch.equal(model(images).scores, other(images).scores)

    def test_another_number_of_classes(self):
        for classes in (1, 5):
            section = {"name": self.name, **self.settings}
            model = build(section, backbone_factory(self.spec), classes)
            batch = batch_of(2)
            batch.tags = torch.ones(2, classes)
            for _, _, terms in self.steps(model, batch):
                assert all(term.isfinite() for term in terms.values())
            with torch.inference_mode():
                assert model.eval()(batch.images).scores.shape[1] == classes


class TestSeamLearned(MethodContract):
    name = "seam"
    settings = {"keys": "learned", "minimum": 1, "flip": True, "rotation": 20, "translation": 0.1}


class TestSeamPublished(MethodContract):
    name = "seam"
    settings = {"keys": "published", "levels": [-3, -2], "power": 1, "rivals": "all", "minimum": 1}


class TestSeamWithoutPCM(MethodContract):
    name = "seam"
    settings = {"pcm": False}


RECURSEED = {"channels": 8, "dilations": (1, 2, 3), "start": 0.1, "mix_start": 0.2}


class TestRecurseed(MethodContract):
    name = "recurseed"
    settings = RECURSEED


class TestRecurseedTeacher(MethodContract):
    name = "recurseed"
    settings = RECURSEED | {"teacher": 0.9, "levels": None, "squash": "sigmoid", "distance": "l2"}


TRANSFORMER = BackboneSpec(name="test_vit", pretrained=False)


class TestMctformer(MethodContract):
    name = "mctformer"
    spec = TRANSFORMER


class TestMctformerPlus(MethodContract):
    name = "mctformer"
    settings = {"layers": 6, "root": True, "decay": 0.996, "contrast": 1}
    spec = TRANSFORMER


ACR = {"width": 4, "depth": 4, "start": 0.1}


class TestAcr(MethodContract):
    name = "acr"
    settings = ACR | {"classifier": {"name": "cam", "hidden": 8}}


class TestAcrPretrained(MethodContract):
    name = "acr"
    settings = ACR | {"strategy": "pretrained", "srf": False, "dropout": 0.5}


class TestAcrBaseline(MethodContract):
    name = "acr"
    settings = {"strategy": "baseline"}


class TestAcrCoarse(MethodContract):
    name = "acr"
    settings = ACR | {"detail": 2, "nt": 0}


class TestAcrVit(MethodContract):
    name = "acr"
    settings = ACR | {"classifier": {"name": "mctformer", "affinity": False}}
    spec = BackboneSpec(name="test_vit", pretrained=False)


for _mix in mixes:
    _part = {"mix": _mix, "mix_cls": 1.0}  # weighted tags too
    globals()[f"TestRecurseedWith{_mix.capitalize()}"] = type(
        f"TestRecurseedWith{_mix.capitalize()}",
        (MethodContract,),
        {"name": "recurseed", "settings": RECURSEED | _part},
    )


def test_there_are_methods():
    assert "cam" in methods


for _name in methods:
    _class = "Test" + "".join(part.capitalize() for part in _name.replace("+", "_").split("_"))
    globals().setdefault(_class, type(_class, (MethodContract,), {"name": _name}))
