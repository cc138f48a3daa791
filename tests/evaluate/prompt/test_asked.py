"""Changes of latents as they are typed."""

import pytest

from common.errors import InputError
from evaluate.prompt.asked import Asked, of_layers, parse


def test_what_is_typed() -> None:
    assert parse("set", "12/345=3.0,  7@4=-1e-2") == [
        Asked("set", 12, 345, None, 3.0),
        Asked("set", None, 7, 4, -0.01),
    ]
    assert parse("ablate", "0/1 0/2@0\n3") == [
        Asked("ablate", 0, 1, None, 0.0),
        Asked("ablate", 0, 2, 0, 0.0),
        Asked("ablate", None, 3, None, 0.0),
    ]
    assert parse("scale", "12/5=0") == [Asked("scale", 12, 5, None, 0.0)]


@pytest.mark.parametrize(
    "typed",
    ["345", "345=", "345=three", "345=nan", "345=inf", "345=1e39", "a=1", "-3=1", "12/=1", "/3=1", "3@=1", "1/2/3=1",
     "12/345 = 3", "3=1=2", "3@1.5=2", "3@-1=2", "12:345=1", "", " , ", "３=1", "12/345=\u22123"],
)  # fmt: skip
def test_what_is_no_change(typed: str) -> None:
    for how in ("set", "scale"):
        with pytest.raises(InputError, match=f"^{how.upper()}: .*expected"):
            parse(how, typed)


def test_ablate_takes_no_value() -> None:
    for typed in ("12/345=0", "345@2=1"):
        with pytest.raises(
            InputError, match=r"^ABLATE: expected layer/latent, or layer/latent@token \(12/345@5\)"
        ):
            parse("ablate", typed)


def test_layers() -> None:
    (own,) = of_layers(parse("set", "345=1"), (12,))
    assert own == Asked("set", 12, 345, None, 1.0)
    with pytest.raises(InputError, match=r"SET: 345@2: of which layer\? layers 3 12 are read; give 3/345@2"):
        of_layers(parse("set", "345@2=1"), (3, 12))
    with pytest.raises(
        InputError, match=r'ABLATE: 7/1: layer 7 is not read, only layer 12; give LAYER="12 7"'
    ):
        of_layers(parse("ablate", "7/1"), (12,))
