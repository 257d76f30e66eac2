"""Broken and hostile input, made anew for each test, each with what is promised about it.

A :class:`World` is a sound collection that a case then spoils. ``@case(...)`` states the promise:

``error``
    The command ends with code 2 and a message that matches; it says how to mend it.
``code``
    The check names this problem, and ``item`` among its items.
``accepted``
    No error; the function that the case returns, if any, looks at the check's findings.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 40


@dataclass
class World:
    """A folder with ``images``, a table of twelve of them, and something beside them."""

    root: Path

    def __post_init__(self) -> None:
        self.images = self.root / "images"
        self.images.mkdir(parents=True)
        self.rows: list[tuple[str, str]] = []
        for i in range(12):
            self.add(f"{i}.png", ("cat", "dog")[i % 2], seed=i)
        self.outside = self.root / "outside"
        self.outside.mkdir()
        Image.fromarray(pixels(99)).save(self.outside / "secret.png")
        self.write()

    @property
    def table(self) -> Path:
        return self.root / "labels.csv"

    def add(self, name: str, tags: str = "cat", *, seed: int = 50) -> Path:
        """An image and its row."""
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed)).save(path)
        self.rows.append((name, tags))
        return path

    def put(self, content: bytes, name: str = "x.png") -> Path:
        """A file of these bytes and its row."""
        path = self.images / name
        path.write_bytes(content)
        self.rows.append((name, "cat"))
        self.write()
        return path

    def text(self) -> str:
        rows = [f'{name},"{tags}"' for name, tags in self.rows]
        return "\n".join(["image,labels", *rows]) + "\n"

    def write(self, text: str | bytes | None = None) -> None:
        content = self.text() if text is None else text
        self.table.write_bytes(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True)
class Case:
    """A world spoiled in one way.

    Attributes:
        spoil: Changes a world; may return further words of the command, or a function that looks
            at the check's findings.
    """

    name: str
    spoil: Callable[[World], Any]
    error: str | None = None
    code: str | None = None
    item: str | None = None


IMAGES: list[Case] = []
TABLES: list[Case] = []
NAMES: list[Case] = []
LINKS: list[Case] = []
MASKS: list[Case] = []


def case(group: list[Case], **promise: Any) -> Callable[[Callable[[World], Any]], Any]:
    """Enters a function into a group."""

    def enter(spoil: Callable[[World], Any]) -> Callable[[World], Any]:
        group.append(Case(spoil.__name__.strip("_"), spoil, **promise))
        return spoil

    return enter


def pixels(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def counts(**expected: int) -> Callable[[dict], None]:
    """Looks whether the check counted so many train images of each class."""

    def look(found: dict) -> None:
        assert found["images_per_class"]["train"] == expected

    return look


# --- images ---------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8) -> bytes:
    """A gray PNG file by hand, whatever its header claims."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def whole(suffix: str = "jpg", **options: Any) -> bytes:
    import io

    file = io.BytesIO()
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    Image.fromarray(pixels(50)).save(file, kind, **options)
    return file.getvalue()


@case(IMAGES, code="truncated-file", item="x")
def truncated_jpeg(w: World) -> None:
    w.put(whole()[:-200], "x.jpg")


@case(IMAGES, code="truncated-file", item="x")
def truncated_png(w: World) -> None:
    w.put(whole("png")[:900])


@case(IMAGES, code="empty-file", item="x")
def empty_image(w: World) -> None:
    w.put(b"")


@case(IMAGES, code="not-an-image", item="x")
def text_named_jpg(w: World) -> None:
    w.put(b"<html><body>404 Not Found</body></html>", "x.jpg")


@case(IMAGES, code="not-an-image", item="x")
def svg_named_png(w: World) -> None:
    w.put(b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')


@case(IMAGES, code="not-an-image", item="x")
def random_bytes(w: World) -> None:
    w.put(np.random.default_rng(0).bytes(4000), "x.jpg")


@case(IMAGES, code="decompression-bomb", item="x")
def bomb(w: World) -> None:
    w.put(png(50_000, 50_000, (b"IDAT", zlib.compress(bytes(100_000)))))


@case(IMAGES, code="decompression-bomb", item="x")
def bomb_below_the_limit_of_pillow(w: World) -> None:
    w.put(png(10_000, 10_000, (b"IDAT", zlib.compress(bytes(100_000)))))


@case(IMAGES, code="unreadable-file", item="x")
def bomb_in_a_comment(w: World) -> None:
    comment = b"note\0\0" + zlib.compress(bytes(80_000_000), 9)
    w.put(png(40, 40, (b"zTXt", comment), (b"IDAT", zlib.compress(bytes(41 * 40)))))


@case(IMAGES)
def animated_webp(w: World) -> Any:
    frames = [Image.fromarray(pixels(i)) for i in range(70, 73)]
    frames[0].save(w.images / "x.webp", save_all=True, append_images=frames[1:])
    w.rows.append(("x.webp", "cat"))
    w.write()
    return lambda found: problem_of(found, "animated", "x")


@case(IMAGES, code="converted", item="x")
def sixteen_bits(w: World) -> None:
    w.put(b"")
    Image.fromarray(pixels(50)[..., 0].astype(np.uint16) * 257).save(w.images / "x.png")


@case(IMAGES, code="converted", item="x")
def cmyk_jpeg(w: World) -> None:
    w.put(b"", "x.jpg")
    Image.fromarray(pixels(50)).convert("CMYK").save(w.images / "x.jpg")


@case(IMAGES, code="converted", item="x")
def gif_named_png(w: World) -> None:
    w.put(whole("gif"))


@case(IMAGES)
def exif_of_an_impossible_rotation(w: World) -> Any:
    exif = Image.Exif()
    exif[0x0112] = 99
    w.put(whole(exif=exif), "x.jpg")
    return lambda found: found["problems"] == []


@case(IMAGES)
def exif_of_garbage(w: World) -> Any:
    w.put(whole(exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(40)), "x.jpg")
    return counts(cat=7, dog=6)


@case(IMAGES)
def garbage_behind_the_image(w: World) -> Any:
    w.put(whole() + b"<?php system($_GET['c']); ?>" * 50, "x.jpg")
    return counts(cat=7, dog=6)


@case(IMAGES, code="tiny-image", item="x")
def one_pixel(w: World) -> None:
    w.put(b"")
    Image.new("RGB", (1, 1), "red").save(w.images / "x.png")


@case(IMAGES)
def no_pixels(w: World) -> Any:
    w.put(png(0, 0, (b"IDAT", zlib.compress(b""))))
    return "errors", {"unreadable-file", "not-an-image"}


@case(IMAGES, code="unreadable-file", item="x")
def damaged_checksum(w: World) -> None:
    content = bytearray(whole("png"))
    content[60] ^= 0xFF
    w.put(bytes(content))


@case(IMAGES, code="unreadable-file", item="x")
def folder_named_like_an_image(w: World) -> None:
    (w.images / "x.jpg").mkdir()
    w.rows.append(("x.jpg", "cat"))
    w.write()


@case(IMAGES, code="unreadable-file", item="x")
def pipe(w: World) -> None:
    os.mkfifo(w.images / "x.jpg")
    w.rows.append(("x.jpg", "cat"))
    w.write()


@case(IMAGES, code="elongated", item="x")
def one_row(w: World) -> None:
    w.put(b"")
    Image.fromarray(np.tile(pixels(50)[:1], (1, 30, 1))).save(w.images / "x.png")


@case(IMAGES, code="copies-with-other-tags")
def the_same_image_with_other_tags(w: World) -> None:
    w.put((w.images / "1.png").read_bytes())


def problem_of(found: dict, code: str, item: str | None) -> None:
    problems = {p["code"]: p for p in found["problems"]}
    assert code in problems, sorted(problems)
    assert problems[code]["mend"]
    assert item is None or item in problems[code]["items"]


# --- tables ---------------------------------------------------------------------------------

SOUND = counts(cat=6, dog=6)


@case(TABLES)
def byte_order_mark(w: World) -> Any:
    w.write(b"\xef\xbb\xbf" + w.text().encode())
    return SOUND


@case(TABLES)
def utf16(w: World) -> Any:
    w.write(w.text().encode("utf-16"))
    return SOUND


@case(TABLES, error="not UTF-8 text")
def latin1(w: World) -> None:
    w.write(w.text().replace("cat", "Bär").encode("latin-1"))


@case(TABLES)
def semicolons(w: World) -> Any:
    w.write(w.text().replace(",", ";"))
    return SOUND


@case(TABLES)
def tabs(w: World) -> Any:
    w.write(w.text().replace(",", "\t"))
    return SOUND


@case(TABLES)
def windows_lines(w: World) -> Any:
    w.write(w.text().replace("\n", "\r\n"))
    return SOUND


@case(TABLES)
def old_macintosh_lines(w: World) -> Any:
    w.write(w.text().replace("\n", "\r"))
    return SOUND


@case(TABLES, error="control character")
def nul_bytes(w: World) -> None:
    w.write(w.text().replace("3.png", "3.p\0ng"))


@case(TABLES, error="close every quote")
def unbalanced_quotes(w: World) -> None:
    w.write(w.text().replace('"dog"', '"dog', 1))


@case(TABLES, error="no rows")
def header_only(w: World) -> None:
    w.write("image,labels\n")


@case(TABLES, error="empty")
def empty_table(w: World) -> None:
    w.write(b"")


@case(TABLES, error="table|column")
def only_blank_lines(w: World) -> None:
    w.write("\n\n\n")


@case(TABLES, error="two columns have the name")
def header_twice(w: World) -> None:
    w.write(w.text().replace("image,labels", "image,labels,labels").replace('"\n', '","dog"\n'))


@case(TABLES)
def rows_twice(w: World) -> Any:
    w.write(w.text() + w.text().split("\n", 1)[1])
    return SOUND


@case(TABLES, error="cells? where the header")
def ragged_rows(w: World) -> None:
    w.write(w.text() + "1.png,cat,dog,owl\n")


@case(TABLES, error="leads out of the image folder")
def path_traversal(w: World) -> None:
    w.write(w.text() + "../outside/secret.png,cat\n")


@case(TABLES, error="leads out of the image folder")
def path_traversal_of_windows(w: World) -> None:
    w.write(w.text() + "..\\..\\windows\\win.ini,cat\n")


@case(TABLES, error="leads out of the image folder")
def absolute_path(w: World) -> None:
    w.write(w.text() + f"{w.outside / 'secret.png'},cat\n/etc/passwd,dog\n")


@case(TABLES, code="missing-file")
def very_long_name(w: World) -> None:
    w.write(w.text() + f"{'a' * 5000}.png,cat\n")


@case(TABLES, error="splits")
def one_image_in_two_splits(w: World) -> None:
    lines = w.text().replace("image,labels", "image,labels,split").replace('"\n', '",train\n')
    w.write(lines + "1.png,dog,val\n")


@case(TABLES, error="no tags")
def cells_without_tags(w: World) -> None:
    w.write(w.text() + "1.png,\n")


@case(TABLES, error="holds '2'")
def one_hot_of_two(w: World) -> None:
    w.write("image,cat,dog\n" + "".join(f"{i}.png,{i % 2},1\n" for i in range(11)) + "11.png,2,1\n")
    return "--classes", _class_file(w, "cat\ndog\n")


@case(TABLES, error="JSON object")
def damaged_json_lines(w: World) -> Any:
    file = w.root / "labels.jsonl"
    file.write_text('{"image": "1.png", "labels": ["cat"]}\n[[[[\n' + "[" * 100_000 + "\n")
    return "table", file


@case(TABLES, error="may be harmful|no file of label vectors")
def pickle_that_runs_commands(w: World) -> Any:
    import pickle

    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {w.outside / 'owned'}",)

    file = w.root / "cls_labels.npy"
    file.write_bytes(pickle.dumps({"2007_000032": Attack()}))
    return "table", file


@case(TABLES, error="does not exist|no such table")
def missing_table(w: World) -> Any:
    return "table", w.root / "other.csv"


@case(TABLES, error="table")
def table_that_is_a_folder(w: World) -> Any:
    return "table", w.outside


@case(TABLES, error="table|UTF-8|column")
def table_that_is_an_image(w: World) -> Any:
    return "table", w.images / "1.png"


@case(TABLES, error="field larger|long")
def one_cell_of_a_megabyte(w: World) -> None:
    w.write(w.text() + f'1.png,"{"x" * 1_000_000}"\n')


@case(TABLES, error="stand twice")
def class_list_with_repetition(w: World) -> Any:
    return "--classes", _class_file(w, "cat\ndog\ncat\n")


@case(TABLES, error="cannot be read")
def class_list_that_is_no_text(w: World) -> Any:
    return "--classes", w.images / "1.png"


@case(TABLES, error="is no class")
def class_list_without_a_tag(w: World) -> Any:
    return "--classes", _class_file(w, "cat\nowl\n")


def _class_file(w: World, text: str) -> Path:
    file = w.root / "classes.txt"
    file.write_text(text, encoding="utf-8")
    return file


# --- names of images and classes ------------------------------------------------------------


@case(NAMES)
def decomposed_unicode(w: World) -> Any:
    w.add("cafe\u0301.png", "Ka\u0308fer", seed=60)  # the file decomposed, as macOS writes
    w.rows[-1] = ("caf\u00e9.png", "K\u00e4fer")  # the row composed
    w.rows.append(("0.png", "Ka\u0308fer"))
    w.write()
    return counts(Käfer=2, cat=6, dog=6)


@case(NAMES)
def emoji_and_right_to_left(w: World) -> Any:
    w.add("\U0001f408.png", "\U0001f408", seed=60)
    w.add("\u05d7\u05ea\u05d5\u05dc.png", "\u05d7\u05ea\u05d5\u05dc", seed=61)
    w.add("\u202egnp.png", "\u202etac", seed=62)
    w.write()
    return lambda found: len(found["classes"]) == 5


@case(NAMES)
def long_name_that_fits(w: World) -> Any:
    w.add("n" * 251 + ".png", seed=60)
    w.write()
    return counts(cat=7, dog=6)


@case(NAMES)
def blanks_quotes_and_percent_in_file_names(w: World) -> Any:
    for i, name in enumerate(("a  b .png", "100%s.png", "a'b.png", "-rf.png", "$(touch x).png")):
        w.add(name, seed=60 + i)
    w.write()
    return counts(cat=11, dog=6)


@case(NAMES)
def class_names_of_html(w: World) -> Any:
    w.add("a.png", "<script>alert(1)</script>", seed=60)
    w.add("b.png", '"><img src=x onerror=alert(1)>'.replace('"', '""'), seed=61)
    w.write()
    return lambda found: "<script>alert(1)</script>" in found["classes"]


@case(NAMES)
def class_names_of_paths_and_yaml(w: World) -> Any:
    for i, name in enumerate(("../../etc/passwd", "a/b", "-n", "- x: [y", "!!python/none", "null")):
        w.add(f"n{i}.png", name, seed=60 + i)
    w.write()
    return lambda found: len(found["classes"]) == 8


@case(NAMES, error="line break|control")
def class_name_of_two_lines(w: World) -> None:
    w.write(w.text() + '1.png,"do\ng"\n')


@case(NAMES, error="line break|control")
def class_folder_of_two_lines(w: World) -> Any:
    for i in range(4):
        w.add(f"{'a' if i % 2 else 'b'}\nc/{i}.png", seed=60 + i)
    return "table", None


@case(NAMES, error="cannot be a class")
def class_named_background(w: World) -> None:
    w.write(w.text() + "1.png,background\n")


@case(NAMES, code="too-many-classes", item="c9999")
def ten_thousand_classes(w: World) -> None:
    rows = [f"{i % 12}.png,c{i}" for i in range(10_000)]
    w.write(w.text() + "\n".join(rows) + "\n")


# --- links ----------------------------------------------------------------------------------


@case(LINKS)
def link_to_an_image_outside(w: World) -> Any:
    (w.images / "x.png").symlink_to(w.outside / "secret.png")
    w.rows.append(("x.png", "cat"))
    w.write()
    return counts(cat=7, dog=6)


@case(LINKS, code="missing-file", item="x")
def link_to_nothing(w: World) -> None:
    (w.images / "x.png").symlink_to(w.outside / "gone.png")
    w.rows.append(("x.png", "cat"))
    w.write()


@case(LINKS)
def folders_in_a_circle(w: World) -> Any:
    (w.images / "a").mkdir()
    (w.images / "a" / "b").symlink_to(w.images, target_is_directory=True)
    (w.images / "c").symlink_to(w.images / "a", target_is_directory=True)
    return SOUND


@case(LINKS)
def link_to_itself(w: World) -> Any:
    (w.images / "x.png").symlink_to(w.images / "x.png")
    (w.images / "loop").symlink_to(w.images / "loop")
    w.rows.append(("x.png", "cat"))
    w.write()
    return "errors", {"missing-file", "unreadable-file"}


@case(LINKS)
def folder_linked_twice(w: World) -> Any:
    for name in ("p", "q"):
        (w.images / name).symlink_to(w.outside, target_is_directory=True)
    return SOUND


# --- masks ----------------------------------------------------------------------------------


def _masks(w: World, array: np.ndarray, name: str = "1.png", **options: Any) -> tuple[str, Path]:
    folder = w.root / "masks"
    folder.mkdir()
    for i in (0, 2):
        Image.fromarray(np.ones((SIDE, SIDE), np.uint8)).save(folder / f"{i}.png")
    Image.fromarray(array).save(folder / name, **options)
    return "--masks", folder


@case(MASKS, code="mask-colours", item="1")
def mask_of_colours(w: World) -> Any:
    return _masks(w, pixels(1))


@case(MASKS, code="mask-size", item="1")
def mask_of_another_size(w: World) -> Any:
    return _masks(w, np.ones((SIDE, SIDE + 1), np.uint8))


@case(MASKS, code="mask-ids", item="1")
def mask_with_ids_above_the_classes(w: World) -> Any:
    return _masks(w, np.full((SIDE, SIDE), 3, np.uint8))


@case(MASKS, code="mask-unreadable", item="1")
def mask_of_jpeg(w: World) -> Any:
    return _masks(w, np.ones((SIDE, SIDE), np.uint8), format="JPEG")


@case(MASKS, code="mask-unreadable", item="1")
def mask_bomb(w: World) -> Any:
    words = _masks(w, np.ones((SIDE, SIDE), np.uint8))
    (w.root / "masks" / "1.png").write_bytes(
        png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(100_000))))
    )
    return words


@case(MASKS, code="mask-unreadable", item="1")
def empty_mask(w: World) -> Any:
    words = _masks(w, np.ones((SIDE, SIDE), np.uint8))
    (w.root / "masks" / "1.png").write_bytes(b"")
    return words


@case(MASKS, error="has a mask here")
def masks_of_other_images(w: World) -> Any:
    (w.root / "masks").mkdir()
    return "--masks", w.root / "masks"


@case(MASKS, error="has a mask here|folder")
def masks_that_are_a_file(w: World) -> Any:
    return "--masks", w.table
