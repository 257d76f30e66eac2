"""Settings are strict, frozen, and every mistake is told at once."""

import pickle

import pytest
from pydantic import Field, ValidationError

from weakseg.config import Frozen, validate
from weakseg.errors import UserError


class Inner(Frozen):
    rate: float = Field(0.1, gt=0)
    name: str = "x"


class Outer(Frozen):
    size: int
    inner: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None
    pair: tuple[int, int] = (1, 2)


def lines(values: dict, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        validate(Outer, values, where="here", **kwargs)
    assert caught.value.where == "here"
    assert caught.value.mend
    return caught.value.what.splitlines()


def test_good_values_pass():
    config = validate(Outer, {"size": 3, "inner": {"rate": 2}}, where="here")
    assert config == Outer(size=3, inner=Inner(rate=2.0))


def test_settings_cannot_be_changed():
    config = Outer(size=1)
    with pytest.raises(ValidationError, match="frozen"):
        config.size = 2  # type: ignore[misc]


def test_a_default_is_checked_too():
    class Wrong(Frozen):
        rate: float = Field(-1.0, gt=0)

    with pytest.raises(ValidationError):
        Wrong()


def test_every_mistake_has_its_own_line():
    head, *body = lines(
        {"sise": 4, "inner": {"rate": -1, "nam": "y"}, "maybe": {"rat": 1}, "pair": [1, "b"]}
    )
    assert head == "6 settings are wrong"
    keys = {line.strip().split(":")[0].split(" = ")[0] for line in body}
    assert keys == {"size", "sise", "inner.rate", "inner.nam", "maybe.rat", "pair.1"}
    text = "\n".join(body)
    assert "size: is required" in text
    assert "inner.rate = -1: Input should be greater than 0" in text
    assert "pair.1 = 'b': Input should be a valid integer" in text


def test_unknown_keys_are_answered_with_the_nearest_name_of_their_own_level():
    text = "\n".join(lines({"size": 1, "innr": {}, "inner": {"nam": "y"}, "maybe": {"rat": 1}}))
    assert "innr: unknown key; did you mean 'inner'?" in text
    assert "inner.nam: unknown key; did you mean 'name'? Valid names: name, rate" in text
    assert "maybe.rat: unknown key; did you mean 'rate'? Valid names: name, rate" in text


def test_one_mistake_is_spoken_of_in_the_singular():
    assert lines({"size": "many"}) == [
        "a setting is wrong",
        "  size = 'many': Input should be a valid integer, unable to parse string as an integer",
    ]


def test_keys_carry_the_prefix():
    assert lines({"size": 1, "inner": {"rate": 0}}, prefix="method")[1].startswith(
        "  method.inner.rate = 0:"
    )


def test_the_error_keeps_its_parts_across_processes():
    error = UserError("what", where="where", mend="mend")
    again = pickle.loads(pickle.dumps(error))
    assert (again.what, again.where, again.mend) == ("what", "where", "mend")
    assert str(again) == str(error) == "where: what\n  mend: mend"
    assert str(UserError("alone")) == "alone"
