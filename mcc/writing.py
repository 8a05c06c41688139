"""Writing calls and constants into an exported module, with the fake values that later steps read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode

ORIGIN = ("nn_module_stack", "stack_trace")  # of a node's meta, what says where it is from


@dataclass(frozen=True)
class Writer:
    """Writes in front of a node.

    Attributes:
        module: an exported module.
        before: one of its nodes.
    """

    module: fx.GraphModule
    before: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an op."""
        with self.module.graph.inserting_before(self.before):
            made = self.module.graph.call_function(target, args, kwargs)
        made.meta = self._origin()
        with self.fake_mode, enable_python_dispatcher():
            values: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            made.meta["val"] = target(*values[0], **values[1])
        return made

    def stored(self, value: Tensor, name: str = "constant") -> fx.Node:
        """A read of a tensor that is stored under this name, or one like it; a parameter stays one."""
        name = next(n for i in count() if not hasattr(self.module, n := f"{name}_{i}" if i else name))
        if isinstance(value, Parameter):
            self.module.register_parameter(name, value)
        else:
            self.module.register_buffer(name, value, persistent=False)
        with self.module.graph.inserting_before(self.before):
            made = self.module.graph.get_attr(name)
        made.meta = self._origin() | {"val": self.fake_mode.from_tensor(value, static_shapes=True)}
        return made

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode of the module's fake values."""
        return next(mode for n in self.module.graph.nodes if (mode := fake_mode_of(n.meta.get("val"))) is not None)

    def _origin(self) -> dict[str, Any]:
        return {k: v for k, v in self.before.meta.items() if k in ORIGIN}


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor among nested values."""
    return next((t.fake_mode for t in pytree.tree_leaves(values) if isinstance(t, FakeTensor)), None)


def replace_call(module: fx.GraphModule, node: fx.Node, made: Any) -> None:
    """Let the readers of a call read what replaces it, as the type it has; of several results each by its place."""
    if isinstance(made, fx.Node):
        wanted, given = node.meta["val"], made.meta["val"]
        if isinstance(wanted, Tensor) and given.dtype is not wanted.dtype:
            made = Writer(module, node)(torch.ops.aten.to.dtype, made, wanted.dtype)
        node.replace_all_uses_with(made)
    else:
        for user in list(node.users):
            if user.users:
                user.replace_all_uses_with(made[user.args[1]])
            module.graph.erase_node(user)
    module.graph.erase_node(node)
