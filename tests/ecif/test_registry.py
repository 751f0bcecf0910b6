"""A kind is found under its name, or by its dotted path, and a name belongs to one class."""

from dataclasses import dataclass, field

import pytest

from ecif.registry import Kind, find_kind, option


class Shape(Kind):
    """A contract."""


class Colour(Kind):
    """Another one."""


class Square(Shape, name="square"):
    pass


class Nameless(Shape):
    pass


def test_a_kind_is_found_under_its_name_and_by_its_path():
    assert find_kind(Shape, "square") is Square
    assert find_kind(Shape, f"{__name__}:Nameless") is Nameless
    assert Square.name == "square"


def test_contracts_share_no_names():
    class Square(Colour, name="square"):
        pass

    assert find_kind(Colour, "square") is Square
    assert list(Shape.kinds) == ["square"]


def test_a_name_belongs_to_one_class():
    with pytest.raises(TypeError, match="'square' belongs to"):

        class Other(Shape, name="square"):
            pass


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("circle", "no Shape 'circle': there are square"),
        ("nowhere.to_be:Found", "can't be imported"),
        ("ecif.registry:Nothing", "can't be imported"),
        ("ecif.registry:Kind", "is no subclass of"),
        ("ecif.registry:find_kind", "is no subclass of"),
    ],
)
def test_what_is_not_there_is_said(name, said):
    with pytest.raises(ValueError, match=said):
        find_kind(Shape, name)


def test_options_are_the_fields_that_a_constructor_takes():
    @dataclass
    class Circle(Shape, name="circle"):
        radius: float = option(1.0, "in metres", gt=0)
        area: float = field(init=False, default=0.0)

    assert [(o.name, o.default, dict(o.metadata)) for o in Circle.options()] == [
        ("radius", 1.0, {"description": "in metres", "gt": 0})
    ]
    assert Circle(2.0).radius == 2.0
    assert Square.options() == []
