"""What all policies have in common."""

import re
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from kvpack.errors import InvalidOptionError

_NAME = re.compile(r"[a-z0-9.]+(-[a-z0-9.]+)*")


class Policy:
    """Base of the four roles: frozen, shared between generations, known by a kebab-case `name`."""

    role: ClassVar[str]
    name: ClassVar[str]
    #: Whether it works on some heads of a layer as on all, summing over heads with `sum_heads` or `mean_heads` only.
    #: Where heads are on several processes, other selectors and compressors are given those of all; what else is not by
    #: head is refused.
    by_head: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it: the name, as "policy", and options.

        Raises:
            InvalidOptionError: if it is no dataclass, or holds a module or a tensor.
        """
        if not is_dataclass(self):
            raise InvalidOptionError(f"{type(self).__name__} must be a dataclass to be written as data")
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        for option, value in options.items():
            if isinstance(value, Tensor | np.ndarray | nn.Module):
                module = "save it with save_pretrained and give the folder instead"
                instead = module if isinstance(value, nn.Module) else "give numbers, or a tuple of them"
                given = f"{option} of {self.role} {self.name} is a {type(value).__name__}"
                raise InvalidOptionError(f"{given}, which is no data to write; {instead}")
        return {"policy": self.name, **options}


def named(thing: Any, name: object = None) -> str:
    """Return the name of a policy, stack or adapter, its own unless another is given.

    Raises:
        InvalidOptionError: if nobody can ask for it by that.
    """
    name = getattr(thing, "name", None) if name is None else name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        what = getattr(thing, "__name__", type(thing).__name__)
        raise InvalidOptionError(f"the name of {what} is {name!r}, but it must be kebab-case, e.g. 'my-policy'")
    return name
