r"""ClassMix (Olsson et al., Segmentation-Based Data Augmentation, WACV 2021).

The idea. Cut along the network's own prediction instead of a box: half of the classes that it sees
in an image are pasted onto the next image, so borders of the cut are borders of things.

What is done, with :math:`P_i \in \{0..K\}^{h \times w}` the class of largest probability (among
the background and the tagged classes) and n the number of classes in it, background included:

.. math::
    C_i \subset P_i,\ |C_i| = \lfloor n / 2 \rfloor \text{ at random}, \qquad
    M_i = [P_i \in C_i], \qquad
    I = M_i I_i + (1 - M_i) I_{(i + 1) \bmod B}

and alike for labels and maps. With n = 1 nothing is pasted and the next image comes back as it is;
with one object on a background, one of the two is pasted, each half of the time.

Paper and code. As published, the partner is the next image of the batch. The paper has no tags;
ours are those of the image below, and the tagged classes among what is pasted. It mixes the labels
that it cuts by; here the labels may be others (a refined target), so both count for the tags.
Without probabilities it cuts by the labels; unsure pixels are never pasted then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weakseg.config import Frozen
from weakseg.mixing.base import Mix, Scene, mixes, paste, present
from weakseg.ops.confusion import IGNORE

__all__ = ["ClassMix"]


@mixes.register("classmix")
class ClassMix(Mix):
    """Pastes half of the predicted classes onto the next image."""

    paper = "Olsson et al., WACV 2021"
    idea = "half of the classes that are predicted in an image are pasted onto the next one"

    class Config(Frozen):
        """ClassMix has no settings of its own."""

    config: Config

    @torch.no_grad()
    def __call__(self, scene: Scene, generator: torch.Generator | None = None) -> Scene:
        """Half of the classes of each image on the next image of the batch."""
        count = len(scene.images)
        onto = ((torch.arange(count) + 1) % max(count, 1)).to(scene.tags.device)
        prediction = self._prediction(scene)
        chosen = self._half(present(prediction, self.num_classes), generator)
        # A column for each label, so that unsure pixels find one too.
        table = F.pad(chosen, (0, IGNORE + 1 - chosen.shape[1]))
        cut = table.gather(1, prediction.flatten(1)).view_as(prediction)
        pasted = chosen | present(scene.labels.where(cut, IGNORE), self.num_classes)
        tags = torch.maximum(scene.tags * pasted[:, 1:], scene.tags[onto])
        return paste(scene, cut, onto, tags)

    def _prediction(self, scene: Scene) -> Tensor:
        """(B, h, w) class ids."""
        if scene.probabilities is None:
            return scene.labels
        possible = F.pad(scene.tags > 0, (1, 0), value=True)[..., None, None]
        return scene.probabilities.float().masked_fill(~possible, -1).argmax(1)

    @staticmethod
    def _half(found: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, K + 1) bool: of the n classes found in each image, n // 2."""
        order = torch.rand(found.shape, generator=generator).to(found.device)
        place = order.masked_fill(~found, 2).argsort(1).argsort(1)
        return place < found.sum(1, keepdim=True) // 2
