"""The base of every typed configuration: frozen, strict, and clear about what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from weakseg.errors import UserError
from weakseg.registry import suggest

__all__ = [
    "Channels",
    "Count",
    "Frozen",
    "Images",
    "Pixels",
    "Scale",
    "Scales",
    "Steps",
    "validate",
]

# Far beyond what any machine can do, and below what no machine survives: a slip of the keyboard
# ends as a wrong setting, and not in the killer of processes that ran out of memory.

Pixels = Annotated[int, Field(ge=1, le=65_536)]
"""A side of an image, a crop or a tile, in pixels."""

Images = Annotated[int, Field(ge=1, le=65_536)]
"""Images in a batch."""

Channels = Annotated[int, Field(ge=1, le=16_384)]
"""Channels of a layer."""

Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
"""Steps of a training."""

Count = Annotated[int, Field(ge=1, le=1_024)]
"""Layers, cells, iterations, dilations, processes: whatever there are few of."""

Scale = Annotated[float, Field(ge=1 / 64, le=16)]
"""A factor on the size of an image."""


def _some(scales: tuple[float, ...]) -> tuple[float, ...]:
    if not 1 <= len(scales) <= _MOST_SCALES:  # a length of the field would add to errors of items
        raise ValueError(f"there must be 1 to {_MOST_SCALES} scales")
    return scales


_MOST_SCALES = 64

Scales = Annotated[tuple[Scale, ...], AfterValidator(_some)]
"""Factors on the size of an image, whose maps are averaged."""


class Frozen(BaseModel):
    """Immutable settings; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


C = TypeVar("C", bound=Frozen)


def validate(config: type[C], values: Mapping[str, Any], *, where: object, prefix: str = "") -> C:
    """Builds ``config`` from plain values and reports every mistake at once, one line per key.

    Raises:
        UserError: With one line for each wrong key, the value, the rule and the nearest name.
    """
    try:
        return config.model_validate(values)
    except ValidationError as error:
        lines = [_line(config, e, prefix) for e in error.errors()]
    count = f"{len(lines)} settings are" if len(lines) > 1 else "a setting is"
    raise UserError(
        f"{count} wrong\n" + "\n".join(f"  {line}" for line in lines),
        where=where,
        mend="correct the keys above; `weakseg init` writes a recipe with every key explained",
    )


def _line(config: type[BaseModel], error: Any, prefix: str) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join([*([prefix] if prefix else []), *location])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {suggest(location[-1], _fields(config, location[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: is required"
    return f"{key} = {error['input']!r:.200}: {error['msg']}"


def _fields(config: type[BaseModel], path: list[str]) -> list[str]:
    """Names that are valid at ``path`` inside ``config``."""
    for part in path:
        field = config.model_fields.get(part)
        if field is None:
            continue
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [m for m in inner if isinstance(m, type) and issubclass(m, BaseModel)]
        if models:
            config = models[0]
    return list(config.model_fields)
