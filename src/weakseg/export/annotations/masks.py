"""A plain folder (or archive) of indexed PNG masks that mirrors the images; read only.

Values are ids in the order of ``classes.txt``, where one lies beside the masks, else of the run's
classes; 255 is unsure.
"""

from __future__ import annotations

from collections.abc import Iterator

from weakseg.errors import UserError
from weakseg.export.annotations.base import Format, Found, Labels, formats
from weakseg.export.annotations.tree import Problems, Tree
from weakseg.export.annotations.voc import IndexedPng, read_classes

__all__ = ["Masks"]


@formats.register("masks")
class Masks(Format):
    """See the module's text."""

    writes = False

    def fits(self, tree: Tree) -> bool:
        """True where there is a PNG file."""
        return bool(tree.ending(".png"))

    def read(self, tree: Tree, labels: Labels, problems: Problems) -> Iterator[Found]:
        """All PNG files."""
        files = tree.ending(".png")
        if not files:
            raise UserError(
                "there are no PNG files", where=tree.where, mend="give the folder of the masks"
            )
        ids = read_classes(tree, labels)
        for file in files:
            name = file[: -len(".png")]
            inner = name.partition("masks/")[2]  # an archive of the folder itself
            yield Found(name, IndexedPng(tree, file, None, ids), other_names=(inner,) * bool(inner))
