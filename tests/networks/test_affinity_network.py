"""Branches that predict affinity, on any backbone."""

import pytest
import torch

from weakseg.networks.affinity import AffinityNetwork
from weakseg.networks.backbone import make_backbone

KINDS = {"irn": (1, 4), "psa": (448, 8)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (50, 37)])
def test_the_map_covers_the_image_at_the_branch_stride(tiny_spec, kind, size):
    channels, stride = KINDS[kind]
    network = AffinityNetwork(make_backbone(tiny_spec), kind, False)
    out = network(torch.randn(2, 3, *size))
    assert out.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_reach_the_backbone_only_where_it_is_trained(tiny_spec, kind, trained):
    network = AffinityNetwork(make_backbone(tiny_spec), kind, trained)
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    reached = {
        name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None
    }
    assert reached == ({"backbone", "branch"} if trained else {"branch"})


@pytest.mark.parametrize("trained", [False, True])
def test_a_fixed_backbone_keeps_its_statistics(tiny_spec, trained):
    network = AffinityNetwork(make_backbone(tiny_spec), "irn", trained).train()
    before = {k: v.clone() for k, v in network.backbone.state_dict().items() if "running" in k}
    assert before
    network(torch.randn(4, 3, 32, 32) + 3)
    after = network.backbone.state_dict()
    moved = any(not torch.equal(v, after[k]) for k, v in before.items())
    assert moved is trained


@pytest.mark.parametrize("kind", KINDS)
def test_training_the_backbone_thaws_nothing_that_it_keeps_fixed(tiny_spec, kind):
    backbone = make_backbone(tiny_spec.model_copy(update={"norm": "frozen"}))
    fixed = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert fixed
    AffinityNetwork(backbone, kind, train_backbone=True)
    assert {name for name, p in backbone.named_parameters() if not p.requires_grad} == fixed
