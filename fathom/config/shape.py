"""What a configuration class accepts, read from its annotations: which fields, which kinds, under which addresses."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fathom.config.text import Key

Model = type[BaseModel]


@dataclass(frozen=True)
class Shape:
    """One annotation, without the wrapping.

    annotation  bare, with `limits`, what pydantic holds beside it (Gt, Ge, ...): to say it in words
    models      the configuration classes that may stand here, by their tag; a single class has the tag ""
    tag         the key that tells them apart (`kind`), or None
    item        the shape of a list's or mapping's items, or None
    many        whether a list is meant, and with `item` not a mapping
    labels      whether pydantic adds a label of its own to error locations here (a union without a tag)
    optional    whether null may stand here
    """

    annotation: Any = Any
    limits: tuple[Any, ...] = ()
    models: dict[str, Model] = field(default_factory=dict)
    tag: str | None = None
    item: Shape | None = None
    many: bool = False
    labels: bool = False
    optional: bool = False

    def model(self, value: Any) -> Model | None:
        """The class that a written value selects, or None where that is not known."""
        if self.tag is None:
            return self.models.get("")
        tag = value.get(self.tag) if isinstance(value, dict) else None
        return self.models.get(tag) if isinstance(tag, str) else None


def shape_of(annotation: Any, discriminator: str | None = None, limits: Sequence[Any] = ()) -> Shape:
    """The shape of an annotation; discriminator and limits where a FieldInfo has taken them off the annotation."""
    origin, arguments, beside = get_origin(annotation), get_args(annotation), tuple(limits)
    if origin is Annotated:
        inner, *extras = arguments
        infos = [extra for extra in extras if isinstance(extra, FieldInfo)]
        tags = [info.discriminator for info in infos if isinstance(info.discriminator, str)]
        deeper = [limit for info in infos for limit in info.metadata]
        return shape_of(inner, tags[0] if tags else discriminator, (*beside, *deeper))
    if origin in (Union, types.UnionType):
        return _union(annotation, discriminator, beside)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Shape(annotation, beside, {"": annotation})
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        inside = [argument for argument in arguments if argument is not Ellipsis]
        return Shape(annotation, beside, item=shape_of(inside[0]) if inside else None, many=True)
    if isinstance(origin, type) and issubclass(origin, dict):
        return Shape(annotation, beside, item=shape_of(arguments[1]))
    return Shape(annotation, beside)


def _union(annotation: Any, discriminator: str | None, limits: tuple[Any, ...]) -> Shape:
    members = [member for member in get_args(annotation) if member is not type(None)]
    optional = len(members) < len(get_args(annotation))
    if len(members) == 1:
        return replace(shape_of(members[0], discriminator, limits), optional=optional)
    if discriminator is None:
        return Shape(annotation, limits, labels=True, optional=optional)
    found = [model for member in members for model in shape_of(member, discriminator).models.values()]
    models = {tag: model for model in found for tag in tags_of(model, discriminator)}
    return Shape(annotation, limits, models, discriminator, optional=optional)


def fields_of(model: Model) -> dict[str, Shape]:
    """Every field of a class with its shape."""
    return {name: field_shape(info) for name, info in model.model_fields.items()}


def field_shape(info: FieldInfo) -> Shape:
    """The shape of one field."""
    return shape_of(info.annotation, info.discriminator if isinstance(info.discriminator, str) else None, info.metadata)


def bare(shape: Shape) -> list[Any]:
    """The plain types that may stand at a place, null apart."""
    if get_origin(shape.annotation) not in (Union, types.UnionType):
        return [shape.annotation]
    return [member for member in get_args(shape.annotation) if member is not type(None)]


def tags_of(model: Model, discriminator: str) -> tuple[str, ...]:
    """The values of `kind` that stand for a class."""
    annotation = model.model_fields[discriminator].annotation
    return tuple(str(value) for value in get_args(annotation)) if get_origin(annotation) is Literal else ()


def written_path(model: Model, location: Sequence[Key], data: Any) -> tuple[Key, ...]:
    """A pydantic error location as the path that the user wrote: without the tags and labels of unions."""
    path: list[Key] = []
    shape: Shape | None = Shape(models={"": model})
    rest = list(location)
    while rest:
        if shape is not None and shape.labels:
            rest.pop(0)
            shape = Shape()
            continue
        tagged = shape is not None and shape.tag is not None and rest[0] in shape.models
        cls = shape.models[str(rest.pop(0))] if tagged and shape else shape.model(data) if shape else None
        if not rest:
            break
        key = rest.pop(0)
        if key == "[key]":
            break
        path.append(key)
        data = _inside(data, key)
        inside = shape.item if shape is not None else None
        shape = inside if cls is None else fields_of(cls).get(str(key))
    return tuple(path)


def _inside(data: Any, key: Key) -> Any:
    try:
        return data[key]
    except (KeyError, IndexError, TypeError):
        return None


def shape_at(model: Model, path: Sequence[Key], data: Any) -> tuple[Shape | None, FieldInfo | None]:
    """The shape that a written path leads to, and its field where it is one."""
    shape: Shape | None = Shape(models={"": model})
    info: FieldInfo | None = None
    for key in path:
        cls = shape.model(data) if shape is not None else None
        if cls is not None:
            info = cls.model_fields.get(str(key))
            shape = None if info is None else field_shape(info)
        else:
            info, shape = None, shape.item if shape is not None else None
        data = _inside(data, key)
    return shape, info


def addresses(model: Model, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every knob below a class: (section, ..., key) and the kind it belongs to or ''. Items of lists count as 0."""
    for name, shape in fields_of(model).items():
        path = (*prefix, name)
        yield path, ""
        below, at = (shape.item, (*path, "0")) if shape.many and shape.item else (shape, path)
        for tag, member in below.models.items():
            for address, kind in addresses(member, at):
                yield address, kind or tag
