"""The optimisers of the published codes: three steps of each against an update written out here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.methods.base import Trainable, build
from weakseg.networks.backbone import Backbone, backbone_factory, make_backbone
from weakseg.networks.heads import CAMHead, init_heads
from weakseg.networks.spec import BackboneSpec
from weakseg.recipe import Recipe, load_recipe
from weakseg.training.config import PAPERS, PRESETS, TrainConfig
from weakseg.training.module import TrainingModule
from weakseg.training.optim import learning_rate, make_optimiser

STEPS, TOTAL = 3, 10
Rule = tuple[float, float] | None  # factor on lr and decay; None = left as it is
POLY = [(1 - step / TOTAL) ** 0.9 for step in range(STEPS)]


class Toy(Trainable):
    """All kinds of layers, with biases, in a pretrained backbone and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = make_backbone(BackboneSpec(name="test_resnet", pretrained=False))
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(3, 8, 3),
            "bn": nn.BatchNorm2d(8),
            "group": nn.GroupNorm(2, 8),
            "fixed": nn.Conv2d(8, 8, 1),
            "linear": nn.Linear(8, 8),
        }
        self.backbone.network = nn.ModuleDict(layers)
        self.backbone.network["fixed"].requires_grad_(False)
        self.backbone.from_scratch = False
        self.decoder = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8))
        self.classifier = nn.Conv2d(8, 5, 1)

    def losses(self, batch, progress: float) -> dict[str, Tensor]:
        return {}


# Parameters of the toy, in pairs of weight and bias; "fixed" is in none.
OLD, NORM, GROUP = "backbone.network.conv", "backbone.network.bn", "backbone.network.group"
LINEAR, DOUBLE, NEW_NORM, HEAD = "backbone.network.linear", "decoder.0", "decoder.1", "classifier"
D, E = 1e-4, 5e-4
TOYS: dict[str, dict[str, tuple[Rule, Rule]]] = {
    "puzzle": {
        **dict.fromkeys((OLD, NORM, GROUP, LINEAR), ((1, D), (2, 0))),
        **dict.fromkeys((DOUBLE, NEW_NORM, HEAD), ((10, D), (20, 0))),
    },
    "psa": {
        **dict.fromkeys((OLD, GROUP), ((1, E), (2, 0))),
        **dict.fromkeys((NORM, NEW_NORM, LINEAR), (None, None)),
        **dict.fromkeys((DOUBLE, HEAD), ((10, E), (20, 0))),
    },
    "acr": {
        **dict.fromkeys((OLD, GROUP, HEAD), ((1, E), (2, 0))),
        **dict.fromkeys((NORM, NEW_NORM, LINEAR), (None, None)),
        DOUBLE: ((10, E), (20, 0)),
    },
    "irn": {
        **dict.fromkeys((OLD, NORM, GROUP, LINEAR), ((1, D), (1, D))),
        **dict.fromkeys((DOUBLE, NEW_NORM, HEAD), ((10, D), (10, D))),
    },
    "mctformer": {
        **dict.fromkeys((OLD, LINEAR, DOUBLE, HEAD), ((1, 0.05), (1, 0))),
        **dict.fromkeys((NORM, GROUP, NEW_NORM), ((1, 0), (1, 0))),
    },
}
OF_SGD = {  # lr, momentum, whether it is Nesterov's
    "puzzle": (0.1, D, True),
    "psa": (0.1, E, False),
    "acr": (0.01, E, False),
    "irn": (0.1, D, False),
}


def toy_rule(preset: str) -> Callable[[str], Rule]:
    def rule(name: str) -> Rule:
        layer, _, kind = name.rpartition(".")
        if layer == "backbone.network.fixed":
            return None
        return TOYS[preset][layer][kind == "bias"]

    return rule


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in model.named_parameters()
    }


def trained(model: Trainable, config: TrainConfig) -> dict[str, Tensor]:
    """Parameters after three steps of ours with given gradients."""
    optimisers = TrainingModule(model, config, TOTAL, 0).configure_optimizers()
    for step in range(STEPS):
        for name, gradient in gradients(model, step).items():
            p = model.get_parameter(name)
            p.grad = gradient if p.requires_grad else None
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step / TOTAL) * group["factor"]
            optimiser.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def expected(
    model: nn.Module, rule: Callable[[str], Rule], lr: float, momentum: float, nesterov: bool
) -> dict[str, Tensor]:
    """The same by stochastic gradient descent, written out for each parameter."""
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in found.items()}
    for step in range(STEPS):
        for name, gradient in gradients(model, step).items():
            own = rule(name)
            if own is None:
                continue
            factor, decay = own
            pull = gradient + decay * found[name]
            velocity[name] = momentum * velocity[name] + pull
            move = pull + momentum * velocity[name] if nesterov else velocity[name]
            found[name] = found[name] - lr * POLY[step] * factor * move
    return found


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    for name, want in wanted.items():
        torch.testing.assert_close(found[name], want, rtol=1e-13, atol=1e-15, msg=name)
    assert any(not torch.equal(want, start[name]) for name, want in wanted.items())


@pytest.mark.parametrize("preset", OF_SGD)
def test_three_steps_of_sgd(preset: str):
    torch.manual_seed(0)
    model = Toy().double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = expected(model, toy_rule(preset), *OF_SGD[preset])
    found = trained(model, TrainConfig(preset=preset))  # type: ignore[arg-type]
    compare(found, wanted, start)
    for name in start:
        assert torch.equal(found[name], start[name]) == (toy_rule(preset)(name) is None), name


def test_three_steps_of_adamw():
    """MCTformer: learning rate by the batch, cosine behind 5 epochs that rise, a decay of .05."""
    torch.manual_seed(0)
    model = Toy().double()
    config = TrainConfig(preset="mctformer", batch=64, epochs=20)
    lr, warm = 5e-4 * 64 / 512, 5 / 20
    rates = [
        lr * 1e-3 / warm,
        lr * 0.1 / warm,
        lr * 0.2 / warm,
    ]  # the first of them is not nought
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = dict(start)
    first, second = ({n: torch.zeros_like(p) for n, p in start.items()} for _ in range(2))
    for step in range(STEPS):
        for name, g in gradients(model, step).items():
            rule = toy_rule("mctformer")(name)
            if rule is None:
                continue
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            mean = first[name] / (1 - 0.9 ** (step + 1))
            length = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            kept = wanted[name] * (1 - rates[step] * rule[1])
            wanted[name] = kept - rates[step] * mean / length
    compare(trained(model, config), wanted, start)
    assert learning_rate(config, 0.25) == pytest.approx(lr)
    assert learning_rate(config, 0.625) == pytest.approx(lr / 2)


def of_recipe(name: str, *sets: str) -> tuple[Recipe, Trainable]:
    """A shipped recipe's method on a small backbone that counts as pretrained."""
    recipe = load_recipe(name, sets=[*sets, "train.precision=32-true"])
    spec = recipe.backbone.model_copy(update={"pretrained": False, "weights": None})
    torch.manual_seed(0)
    method = build(recipe.method, backbone_factory(spec), 3)
    for module in method.modules():
        if isinstance(module, Backbone):
            module.from_scratch = False
    return recipe, method.double()


NARROW = "backbone.options.width=0.03125"
SHALLOW = tuple(f"backbone.network.{part}." for part in ("conv1a", "b2", "b2_1", "b2_2"))


def puzzle_rule(name: str) -> Rule:
    new, weight = name.startswith("head."), name.endswith("weight")
    return (10 if new else 1) * (1 if weight else 2), D if weight else 0


def seam_rule(name: str) -> Rule:
    if ".bn" in name or name.startswith(SHALLOW):
        return None
    return 10 if name.startswith(("head.", "pcm.")) else 1, E


def irn_rule(name: str) -> Rule:
    fixed = ("conv1.", "bn1.", "layer1.", "layer2.")
    if name.removeprefix("backbone.network.").startswith(fixed):
        return None
    return 10 if name.startswith("head.") else 1, D


def acr_rule(name: str) -> Rule:
    if ".bn" in name:
        return None
    if name.endswith("bias"):
        return 2, 0
    return 10 if name.startswith("reconstructor.up.") else 1, E


@pytest.mark.parametrize(
    ("name", "sets", "rule", "settings"),
    [
        ("voc12/puzzle_r50", ["backbone.name=test_resnet"], puzzle_rule, (0.1, D, True)),
        ("voc12/cam_r50", ["backbone.name=test_resnet"], irn_rule, (0.1, D, False)),
        ("voc12/irn_r50", ["backbone.name=test_resnet"], irn_rule, (0.1, D, False)),
        ("voc12/seam_wr38", [NARROW], seam_rule, (0.01, E, False)),
        ("voc12/acr_wr38", [NARROW, "method.width=2"], acr_rule, (0.01, E, False)),
        ("coco14/acr_wr38", [NARROW, "method.width=2"], acr_rule, (0.01, E, False)),
    ],
)
def test_recipes_of_papers_take_the_papers_steps(name, sets, rule, settings):
    """All phases; ACR has two, and all of its layers learn but BatchNorm; irn's BatchNorm learns."""
    recipe, method = of_recipe(name, *sets)
    start = {n: p.detach().clone() for n, p in method.named_parameters()}
    wanted = expected(method, rule, *settings)
    found = trained(method, recipe.train)
    compare(found, wanted, start)
    fixed = {n for n in start if torch.equal(found[n], start[n])}
    assert fixed == {n for n in start if rule(n) is None}


def test_without_a_pretrained_backbone_all_layers_learn_alike():
    model = Toy()
    model.backbone.from_scratch = True
    optimiser = make_optimiser(model, model.parameters(), TrainConfig(preset="puzzle"))
    assert {g["factor"] for g in optimiser.param_groups} == {1.0, 2.0}


def test_momentum_is_the_decay_unless_it_is_given():
    assert TrainConfig(preset="puzzle", weight_decay=4e-5).momentum == 4e-5
    assert TrainConfig(preset="psa", momentum=0.9).momentum == 0.9
    own = TrainConfig(preset="psa", momentum=0.9, weight_decay=0.3, bias_lr=1, trained="all")
    assert (own.weight_decay, own.bias_lr, own.trained) == (0.3, 1, "all")
    assert own.head_init == "xavier"
    # Decay of nought: momentum of nought, with which Nesterov's is the plain one.
    model = Toy()
    none = TrainConfig(preset="puzzle", weight_decay=0)
    assert not make_optimiser(model, model.parameters(), none).param_groups[0]["nesterov"]


@pytest.mark.parametrize(
    ("settings", "lr", "warmup"),
    [
        ({"batch": 64, "epochs": 60}, 6.25e-5, 1 / 12),
        ({"batch": 32, "epochs": 45}, 3.125e-5, 1 / 9),
        ({"batch": 32, "steps": 100}, 3.125e-5, 1 / 12),
        ({"batch": 32, "epochs": 4}, 3.125e-5, 1 / 2),
        ({"batch": 32, "epochs": 45, "lr": 1e-3, "warmup": 0}, 1e-3, 0),
    ],
)
def test_mctformers_rate_follows_the_batch(settings, lr, warmup):
    config = TrainConfig(preset="mctformer", **settings)
    assert (config.lr, config.warmup) == (pytest.approx(lr), pytest.approx(warmup))
    assert (config.optimiser, config.schedule, config.head_lr) == ("adamw", "cosine", 1)


@pytest.mark.parametrize(
    ("method", "preset", "lr"),
    [
        ("cam", "irn", 0.1),
        ("puzzle", "puzzle", 0.1),
        ("seam", "psa", 0.01),
        ("acr", "acr", 0.01),
        ("acr+vit", "mctformer", 1.5625e-5),
        ({"name": "acr", "classifier": "mctformer"}, "mctformer", 1.5625e-5),
        ("mctformer", "mctformer", 1.5625e-5),
        ("recurseed+cutmix", "puzzle", 0.1),
    ],
)
def test_paper_is_the_preset_of_the_methods_paper(method, preset: str, lr: float):
    recipe = load_recipe({"method": method, "train": {"preset": "paper", "batch": 16}})
    assert (recipe.train.preset, recipe.train.lr) == (preset, pytest.approx(lr))
    assert load_recipe(recipe.model_dump(mode="json")) == recipe
    own = load_recipe({"method": method, "train": {"preset": "paper", "lr": 0.3}})
    assert own.train.lr == 0.3


def test_paper_follows_another_method():
    values = {"method": "cam", "train": {"preset": "paper"}}
    assert load_recipe(values, sets=["method.name=seam"]).train.preset == "psa"


def test_papers_are_of_methods_that_there_are():
    from weakseg.methods import methods, resolve

    for name, settings in PAPERS.items():
        resolve({"name": name})
        TrainConfig(**settings)
    assert {name.partition("+")[0] for name in PAPERS} == set(methods)


def test_a_segmenter_and_an_unknown_method_have_no_paper():
    with pytest.raises(UserError, match="segmenter.train"):
        load_recipe({"segmenter": {"train": {"preset": "paper"}}})
    with pytest.raises(UserError) as caught:
        load_recipe({"method": "mine", "train": {"preset": "paper"}})
    assert caught.value.where == "train.preset"


def test_another_preset_takes_the_place_of_what_the_first_one_wrote_out():
    first = load_recipe({"method": "puzzle", "train": {"preset": "paper", "crop": 96}})
    written = first.model_dump(mode="json")
    for again in (
        load_recipe(written, sets=["train.preset=psa"]),
        load_recipe(written, overrides={"train": {"preset": "psa"}}),
    ):
        assert again.train == TrainConfig(preset="psa", crop=96)
    assert load_recipe(written, sets=["train.preset=default"]).train == TrainConfig(crop=96)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_sets_what_the_others_set(preset: str):
    """Else what one wrote out would stay when another is chosen."""
    names = {key for settings in PRESETS.values() for key in settings}
    computed = {"lr", "warmup", "power", "nesterov"} if preset == "mctformer" else set()
    assert names - set(PRESETS[preset]) == computed


def test_nothing_to_train_is_said():
    model = Toy()
    with pytest.raises(UserError) as caught:
        make_optimiser(
            model, model.backbone.network["linear"].parameters(), TrainConfig(preset="psa")
        )
    assert caught.value.where == "train.trained"


@pytest.mark.parametrize(
    ("kind", "deviation", "largest"),
    [
        ("default", (1 / (3 * 512)) ** 0.5, 512**-0.5),
        ("kaiming", (2 / 512) ** 0.5, None),
        ("xavier", (2 / (512 + 64)) ** 0.5, (6 / (512 + 64)) ** 0.5),
    ],
)
def test_first_weights_of_heads(kind, deviation: float, largest: float | None):
    """normal for kaiming, uniform for the others."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": CAMHead(512, 64), "other": nn.Conv2d(512, 64, 1, bias=False)})
    other = model["other"].weight.detach().clone()
    init_heads(model, kind)
    weight = model["head"].classifier.weight.detach()
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert abs(weight.mean().item()) < 0.05 * deviation
    if largest is None:
        assert weight.abs().max() > 3 * deviation
    else:
        assert weight.abs().max().item() == pytest.approx(largest, rel=0.01)
    assert torch.equal(model["other"].weight, other)


@pytest.mark.parametrize("layer", ["hidden", "classifier"])
def test_both_layers_of_a_head_with_two(layer: str):
    torch.manual_seed(0)
    model = CAMHead(256, 32, hidden=128)
    init_heads(model, "xavier")
    weight = getattr(model, layer).weight
    outputs, channels = weight.shape[:2]
    assert weight.std().item() == pytest.approx((2 / (channels + outputs)) ** 0.5, rel=0.05)
