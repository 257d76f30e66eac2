"""Images, tags and classes: samples, the sources that yield them, and their check."""

from weakseg.data import coco, folder, shapes, voc  # noqa: F401  (they register themselves)
