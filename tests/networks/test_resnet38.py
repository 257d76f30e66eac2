"""ResNet38: its shape, its function against a plain reference, its weights, what is frozen."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_mxnet import FORMS, pack
from torch import Tensor, nn

from weakseg.errors import UserError
from weakseg.export.model import load, save
from weakseg.inference import Normalise, Predictor
from weakseg.methods import Batch, build
from weakseg.networks.backbone import Backbone, backbone_factory, make_backbone
from weakseg.networks.decoder import DeepLabV3Plus
from weakseg.networks.fold import folded
from weakseg.networks.resnet38 import ResNet38
from weakseg.networks.spec import BackboneSpec
from weakseg.training.config import TrainConfig
from weakseg.training.optim import make_optimiser

WIDTH = 1 / 16
SHALLOW = ("conv1a.", "b2.", "b2_1.", "b2_2.")

# The units in the MXNet file's names, with the stride of each and the dilations of its
# convolutions, and whether a convolution is the shortcut; written down by hand.
UNITS: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "2a": (2, (1, 1), True),
    "2b1": (1, (1, 1), False),
    "2b2": (1, (1, 1), False),
    "3a": (2, (1, 1), True),
    "3b1": (1, (1, 1), False),
    "3b2": (1, (1, 1), False),
    "4a": (2, (1, 1), True),
    "4b1": (1, (1, 1), False),
    "4b2": (1, (1, 1), False),
    "4b3": (1, (1, 1), False),
    "4b4": (1, (1, 1), False),
    "4b5": (1, (1, 1), False),
    "5a": (1, (1, 2), True),
    "5b1": (1, (2, 2), False),
    "5b2": (1, (2, 2), False),
    "6a": (1, (1, 4, 1), True),
    "7a": (1, (1, 4, 1), True),
}
# Channels of the input and behind each convolution, and the kernels' sides, by stage.
CHANNELS = {
    "2": ((64, 128, 128), (3, 3)),
    "3": ((128, 256, 256), (3, 3)),
    "4": ((256, 512, 512), (3, 3)),
    "5": ((512, 512, 1024), (3, 3)),
    "6": ((1024, 512, 1024, 2048), (1, 3, 1)),
    "7": ((2048, 1024, 2048, 4096), (1, 3, 1)),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every array of the published file at full width, from the tables above."""
    out: dict[str, tuple[int, ...]] = {"arg:conv1a_weight": (64, 3, 3, 3)}

    def norm(name: str, channels: int) -> None:
        for key in ("arg:{}_gamma", "arg:{}_beta", "aux:{}_moving_mean", "aux:{}_moving_var"):
            out[key.format(name)] = (channels,)

    for unit, (_, _, has_shortcut) in UNITS.items():
        channels, kernels = CHANNELS[unit[0]]
        if "b" in unit:
            channels = (channels[-1], *channels[1:])
        for i, branch in enumerate(("2a", "2b1", "2b2")[: len(kernels)]):
            norm(f"bn{unit}_branch{branch}", channels[i])
            side = kernels[i]
            out[f"arg:res{unit}_branch{branch}_weight"] = (channels[i + 1], channels[i], side, side)
        if has_shortcut:
            out[f"arg:res{unit}_branch1_weight"] = (channels[-1], channels[0], 1, 1)
    norm("bn7", 4096)
    return out


def narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side if side <= 3 else round(side * WIDTH) for side in shape)


def published() -> dict[str, np.ndarray]:
    """Random arrays in the published layout at the tests' width, the classifier with them."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, full in shapes().items():
        shape = narrow(full)
        if name.endswith(("_gamma", "_moving_var")):
            array = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            array = rng.normal(0, 0.3, shape)
        else:
            array = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        arrays[name] = array.astype("<f4")
    arrays["arg:linear1000_weight"] = np.zeros((5, 256), "<f4")
    arrays["arg:linear1000_bias"] = np.zeros(5, "<f4")
    return arrays


def reference(arrays: dict[str, np.ndarray], images: Tensor) -> list[Tensor]:
    """The network in evaluation mode, spelled out in double precision on the file's arrays."""

    def tensor(name: str) -> Tensor:
        return torch.tensor(arrays[name]).double()

    def activate(x: Tensor, name: str) -> Tensor:
        mean, var = tensor(f"aux:{name}_moving_mean"), tensor(f"aux:{name}_moving_var")
        scale = tensor(f"arg:{name}_gamma") / (var + 1e-5).sqrt()
        shift = tensor(f"arg:{name}_beta") - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)

    x = F.conv2d(images, tensor("arg:conv1a_weight"), padding=1)
    levels = []
    for unit, (stride, dilations, has_shortcut) in UNITS.items():
        activated = activate(x, f"bn{unit}_branch2a")
        if unit in ("3a", "4a", "5a", "6a"):
            levels.append(activated)
        if has_shortcut:
            x = F.conv2d(activated, tensor(f"arg:res{unit}_branch1_weight"), stride=stride)
        y = activated
        for branch, dilation in zip(("2a", "2b1", "2b2"), dilations, strict=False):
            if branch != "2a":
                y = activate(y, f"bn{unit}_branch{branch}")
            weight = tensor(f"arg:res{unit}_branch{branch}_weight")
            padding = dilation if weight.shape[-1] == 3 else 0
            step = stride if branch == "2a" else 1
            y = F.conv2d(y, weight, stride=step, padding=padding, dilation=dilation)
        x = x + y
    return [*levels, activate(x, "bn7")]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published weights at the tests' width."""
    path = tmp_path_factory.mktemp("weights") / "resnet38.params"
    path.write_bytes(pack(published(), 2))
    return path


def make(**settings) -> Backbone:
    options = {"width": WIDTH} | settings.pop("options", {})
    spec = {"pretrained": False, "output_stride": 8, "options": options} | settings
    return make_backbone(BackboneSpec(name="resnet38", **spec))


def test_full_width_has_the_published_shapes():
    with torch.device("meta"):
        network = ResNet38().eval()
        levels = network(torch.empty(2, 3, 48, 64))
    assert [tuple(level.shape) for level in levels] == [
        (2, 128, 24, 32),
        (2, 256, 12, 16),
        (2, 512, 6, 8),
        (2, 1024, 6, 8),
        (2, 4096, 6, 8),
    ]
    assert network.levels == ((128, 2), (256, 4), (512, 8), (1024, 8), (4096, 8))
    # 3x3 and 1x1 kernels counted by hand, in units of 64 x 64 weights (conv1a apart).
    stage2 = 9 * (1 * 2 + 5 * 2 * 2) + 1 * 2
    stage3 = 9 * (2 * 4 + 5 * 4 * 4) + 2 * 4
    stage4 = 9 * (4 * 8 + 11 * 8 * 8) + 4 * 8
    stage5 = 9 * (8 * 8 + 8 * 16 + 4 * 8 * 16) + 8 * 16
    stage6 = 16 * 8 + 9 * 8 * 16 + 16 * 32 + 16 * 32
    stage7 = 32 * 16 + 9 * 16 * 32 + 32 * 64 + 32 * 64
    kernels = 64 * 64 * (stage2 + stage3 + stage4 + stage5 + stage6 + stage7) + 27 * 64
    assert sum(p.numel() for p in network.parameters() if p.ndim == 4) == kernels
    published_sizes = [torch.Size(shape).numel() for shape in shapes().values()]
    own = [t.numel() for k, t in network.state_dict().items() if "num_batches" not in k]
    assert sorted(own) == sorted(published_sizes)
    assert 104e6 < kernels < 106e6


@pytest.mark.parametrize("form", FORMS)
def test_the_published_file_gives_the_published_function(tmp_path: Path, form: int):
    arrays = published()
    path = tmp_path / "w.params"
    path.write_bytes(pack(arrays, form))
    backbone = make(weights=path, options={"freeze": False}).double().eval()
    images = torch.randn(2, 3, 40, 56, dtype=torch.float64, requires_grad=True)
    expected, found = reference(arrays, images), backbone(images)
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 0.01
        torch.testing.assert_close(a, b)
    # An activation in place that spoiled what backward reads would show here.
    mixing = [torch.randn_like(level) for level in expected]
    gradients = [torch.autograd.grad(levels, images, mixing)[0] for levels in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dilate", [False, True])
def test_the_levels_that_it_states_are_those_it_returns(dilate: bool):
    backbone = make(dilate=dilate).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(2, 3, 64, 96))
    assert [level.name for level in backbone.levels] == ["C1", "C2", "C3", "C4", "C5"]
    assert [level.stride for level in backbone.levels] == [2, 4, 8, 8, 8]
    for level, found in zip(backbone.levels, maps, strict=True):
        assert found.shape == (2, level.channels, 64 // level.stride, 96 // level.stride)
    dilations = {
        name: m.dilation[0]
        for name, m in backbone.network.named_modules()
        if hasattr(m, "dilation")
    }
    assert [k for k, d in dilations.items() if d == 2] == [
        "b5.conv_branch2b1",
        "b5_1.conv_branch2a",
        "b5_1.conv_branch2b1",
        "b5_2.conv_branch2a",
        "b5_2.conv_branch2b1",
    ]
    assert [k for k, d in dilations.items() if d == 4] == ["b6.conv_branch2b1", "b7.conv_branch2b1"]
    assert set(dilations.values()) == {1, 2, 4}


def test_it_starts_from_scratch_with_signal_at_every_depth():
    backbone = make(norm="trained")
    assert backbone.from_scratch
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert backbone.std == (0.229, 0.224, 0.225)
    levels = backbone(torch.randn(2, 3, 48, 48))
    assert all(0.1 < level.std() < 10 for level in levels)
    levels[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())


def test_dropout_drops_whole_channels_in_training_alone():
    off, on = make(options={"dropout": (0, 0)}), make(options={"dropout": (0.2, 0.6)})
    on.load_state_dict(off.state_dict())
    images = torch.randn(1, 3, 32, 32)
    off.eval(), on.eval()
    with torch.no_grad():
        for a, b in zip(off(images), on(images), strict=True):
            assert torch.equal(a, b)
        seen: dict[str, Tensor] = {}
        for stage in ("b6", "b7"):
            for branch in ("branch2a", "branch2b1", "branch2b2"):
                name = f"{stage}.conv_{branch}"
                on.network.get_submodule(name).register_forward_hook(
                    lambda m, x, y, name=name: seen.__setitem__(name, x[0][0])
                )
        for norm in (m for m in on.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.constant_(norm.bias, 3.0)  # so that a whole channel of zeros was dropped
        on.train()(images)
    shares = {k: (x.flatten(1) == 0).all(1).float().mean().item() for k, x in seen.items()}
    assert shares["b6.conv_branch2a"] == shares["b7.conv_branch2a"] == 0
    for stage, p in (("b6", 0.2), ("b7", 0.6)):
        for branch in ("branch2b1", "branch2b2"):
            assert shares[f"{stage}.conv_{branch}"] == pytest.approx(p, abs=0.25)


@pytest.mark.parametrize("norm", ["auto", "trained"])
def test_given_weights_keep_the_shallow_units_as_they_are(file: Path, norm: str):
    model = build({"name": "cam"}, lambda: make(weights=file, norm=norm), 3)
    batch = Batch(torch.randn(2, 3, 32, 32), torch.eye(3)[:2], ["a", "b"])
    before = copy.deepcopy(model.backbone.network.state_dict())
    optimiser = make_optimiser(model, model.parameters(), TrainConfig(lr=0.1))
    model.eval().train()
    model.losses(batch, 0.0)["cls"].backward()
    optimiser.step()
    changed = {
        key
        for key, tensor in model.backbone.network.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    assert not [key for key in changed if key.startswith(SHALLOW)]
    weights = {key for key in before if "conv" in key and not key.startswith(SHALLOW)}
    assert weights <= changed
    assert ("b3.bn_branch2a.running_mean" in changed) == (norm == "trained")
    assert ("b3.bn_branch2a.weight" in changed) == (norm == "trained")
    assert norm == "trained" or changed == weights
    shallow = [p for k, p in model.backbone.network.named_parameters() if k.startswith(SHALLOW)]
    assert shallow and all(p.grad is None for p in shallow)


def frozen(backbone: Backbone) -> bool:
    """Whether the shallow convolutions are; all of them, or none."""
    flags = {
        p.requires_grad
        for k, p in backbone.network.named_parameters()
        if k.startswith(SHALLOW) and p.ndim == 4
    }
    assert len(flags) == 1
    assert all(p.requires_grad for k, p in backbone.network.named_parameters() if "b3.conv" in k)
    return not flags.pop()


def test_what_is_frozen_follows_the_weights_unless_said(file: Path):
    assert frozen(make(weights=file))
    assert not frozen(make(weights=file, options={"freeze": False}))
    assert not frozen(make())
    assert not frozen(make(norm="trained"))
    assert frozen(make(norm="frozen"))  # weights follow, as from a trained classifier
    assert not frozen(make(norm="frozen", options={"freeze": False}))
    assert frozen(make(options={"freeze": True}))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_of_torch_load_exactly_and_heads_are_left_aside(
    file: Path, tmp_path: Path, suffix: str
):
    given = make(weights=file)
    state = given.network.state_dict() | {"fc8.weight": torch.zeros(2, 2)}
    state = {k: v for k, v in state.items() if "num_batches" not in k}  # as old files lack it
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    found = make(weights=path)
    assert not found.from_scratch
    for key, tensor in given.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key


def misfit(path: Path, **settings) -> str:
    with pytest.raises(UserError, match="the weights do not fit resnet38") as caught:
        make(weights=path, **settings)
    assert caught.value.where == str(path)
    assert "ilsvrc-cls_rna-a1_cls1000_ep-0001.params" in str(caught.value.mend)
    return caught.value.what


def test_a_params_file_that_does_not_fit_is_refused(tmp_path: Path, file: Path):
    path = tmp_path / "w.params"

    def without(name: str, **more: np.ndarray) -> str:
        arrays = published() | {"arg:" + k: v for k, v in more.items()}
        arrays.pop(name, None)
        path.write_bytes(pack(arrays, 1))
        return misfit(path)

    key = "aux:bn4b2_branch2b1_moving_var"
    assert f"the array {key} is missing" in without(key)
    assert "unknown array arg:res8a_weight" in without("", res8a_weight=np.zeros(2, "<f4"))
    kernel = np.zeros((2, 2), "<f4")
    what = without("", res6a_branch1_weight=kernel)
    assert "b6.conv_branch1.weight has shape (2, 2), not (128, 64, 1, 1)" in what
    path.write_bytes(pack(published() | {"arg:bn7_gamma": np.full(256, np.nan, "<f4")}, 1))
    with pytest.raises(UserError, match="bn7.weight holds values that are not finite"):
        make(weights=path)
    assert "has shape" in misfit(file, options={"width": 1 / 8})
    path.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut off or damaged"):
        make(weights=path)


def test_files_of_other_networks_are_refused(tmp_path: Path):
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "conv1a.weight is missing" in misfit(tmp_path / "other.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    misfit(tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(b"\x07" * 200)
    misfit(tmp_path / "noise.pth")


def test_the_settings_that_it_cannot_have_are_refused_with_the_way_out():
    with pytest.raises(UserError, match="no hub has weights of resnet38") as caught:
        make(pretrained=True)
    assert "ilsvrc-cls_rna-a1_cls1000_ep-0001.params" in str(caught.value.mend)
    assert "damaged copy" in str(caught.value.mend)
    with pytest.raises(UserError, match="output_stride 16 was asked for") as caught:
        make(output_stride=16)
    assert "set output_stride: 8" in str(caught.value.mend)
    with pytest.raises(UserError) as caught:
        make(options={"widht": 1, "width": 0, "dropout": (0.1, 1.0)})
    assert "3 settings are wrong" in caught.value.what
    assert "backbone.options.widht: unknown key; did you mean 'width'" in caught.value.what
    for name in ("resnet38d", "resnet38.in1k"):
        with pytest.raises(UserError, match="unknown backbone") as caught:
            make_backbone(BackboneSpec(name=name))
        assert "'resnet38'" in str(caught.value.mend)


@pytest.mark.parametrize("norm", ["frozen", "trained"])
def test_a_model_folder_answers_as_the_model_that_was_saved(file: Path, tmp_path: Path, norm: str):
    given = BackboneSpec(
        name="resnet38",
        weights=file,
        output_stride=8,
        options={"width": WIDTH, "dropout": (0.2, 0.2)},
    )
    model = build({"name": "cam"}, backbone_factory(given), 2).eval()
    predictor = Predictor(
        model, ("a", "b"), Normalise(model.backbone.mean, model.backbone.std), threshold=0.3
    )
    spec = given.model_copy(update={"weights": None, "pretrained": False, "norm": norm})
    network = {
        "task": "method",
        "method": {"name": "cam"},
        "backbone": spec.model_dump(mode="json"),
    }
    save(tmp_path / "model", predictor, network, {})
    found = load(tmp_path / "model")
    images = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8)
    assert torch.equal(found.probabilities(images), predictor.probabilities(images))


def test_it_serves_the_decoder_and_folding(file: Path):
    model = DeepLabV3Plus(make(weights=file), 3, 8, (1, 2, 3)).eval()
    images = torch.randn(1, 3, 30, 44)
    with torch.no_grad():
        assert model(images).shape == (1, 3, 30, 44)
    backbone = model.backbone
    fast = folded(backbone, lambda network: network(images)[-1])
    norms = [
        sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        for network in (backbone, fast)
    ]
    assert norms == [37, 18]  # all but those that read a sum: one in each unit, and bn7
