"""The default schedule: what makes TVM's plain loops parallel and vectorized.

Producers are inlined into their readers; blocks that share leading dims (softmax, layer norm) become one parallel loop
over rows; elsewhere spatial loops are fused and run in parallel, and the innermost one is vectorized. Windows
(pooling, convolutions without an own kernel) keep their inner loops, which LLVM vectorizes better than we do.
A function whose schedule fails stays serial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import tvm
import tvm_ffi
from tvm import s_tir, tirx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Block: TypeAlias = Any
Loop: TypeAlias = Any
SPATIAL, REDUCTION = 0, 2
LANES = 8
GRAIN = 8192  # elements below which one loop is not worth splitting over threads
SMALL_WINDOW = 64
_COSTLY = {"exp", "tanh", "erf", "log", "log1p", "pow", "sin", "cos", "sigmoid", "sqrt", "rsqrt"}
_FAILURES = (s_tir.ScheduleError, RuntimeError, ValueError)


def schedule_module(module: tvm.IRModule) -> tvm.IRModule:
    """Schedule every PrimFunc that is not scheduled yet."""
    functions = {
        name: schedule_function(function) if isinstance(function, tirx.PrimFunc) else function
        for name, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def schedule_function(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Schedule one function, by rows if it can be, else block by block; unchanged where neither works."""
    attributes = function.attrs or {}
    if "tirx.is_scheduled" in attributes or "s_tir" not in attributes or _calls_out(function):
        return function
    bare = function.without_attr("global_symbol") if "global_symbol" in attributes else function
    for strategy in (_by_rows, _by_blocks):
        try:
            scheduled = strategy(s_tir.Schedule(bare))
        except _FAILURES:
            continue
        if scheduled is not None:
            for key, value in attributes.items():
                scheduled = scheduled.with_attr(key, value)
            return scheduled.with_attr("tirx.is_scheduled", True)
    return function


def _visit(node: Any, visit: Callable[[Any], None]) -> None:
    def walk(x: Any) -> None:
        visit(x)

    tvm_ffi.structural_walk(node, (tvm_ffi.Object, walk), order="post")


def _holds(node: Any, test: Callable[[Any], bool]) -> bool:
    found: list[bool] = []
    _visit(node, lambda x: found.append(True) if test(x) else None)
    return bool(found)


def _call_name(x: Any) -> str:
    return str(getattr(x.op, "name", "")) if isinstance(x, tvm.ir.Call) else ""


def _calls_out(function: tirx.PrimFunc) -> bool:
    return _holds(function.body, lambda x: _call_name(x) in ("tirx.tvm_call_packed", "tirx.call_extern"))


class _Blocks:
    """Questions about the blocks of a schedule."""

    def __init__(self, schedule: s_tir.Schedule) -> None:
        self.schedule = schedule

    def all(self) -> list[Block]:
        return list(self.schedule.get_child_blocks(self.schedule.get_sblock("root")))

    def kinds(self, block: Block) -> list[int]:
        return [int(v.iter_type) for v in self.schedule.get(block).iter_vars]

    def reduces(self, block: Block) -> bool:
        return REDUCTION in self.kinds(block)

    def extent(self, loop: Loop) -> int | None:
        extent = self.schedule.get(loop).extent
        return int(extent) if isinstance(extent, tirx.IntImm) else None

    def costly(self, block: Block) -> bool:
        return _holds(self.schedule.get(block).body, lambda x: _call_name(x).rsplit(".", 1)[-1] in _COSTLY)

    def has_modulo(self, block: Block) -> bool:
        return _holds(self.schedule.get(block).body, lambda x: isinstance(x, tirx.FloorMod | tirx.Mod))

    def fuse(self, block: Block, loops: list[Loop]) -> Loop:
        """Fuse loops; not around a modulo, which TVM simplifies wrongly once three loops are one."""
        return loops[0] if len(loops) == 1 or self.has_modulo(block) else self.schedule.fuse(*loops)

    def contiguous(self, block: Block, kind: int) -> bool:
        """Whether the last iteration variable of this kind indexes only the last dim of what the block reads."""
        body = self.schedule.get(block)
        variables = [v.var for v in body.iter_vars if int(v.iter_type) == kind]
        if not variables:
            return False
        last = variables[-1]

        def is_last(x: Any) -> bool:
            return isinstance(x, tirx.Var) and bool(x.same_as(last))

        used_last = False
        for read in body.reads:
            for dim, bounds in enumerate(read.region):
                used = _holds(bounds.min, is_last) or _holds(bounds.extent, is_last)
                if used and dim < len(read.region) - 1:
                    return False
                used_last = used_last or used
        return used_last

    def split_loops(self, block: Block, loops: list[Loop]) -> tuple[list[Loop], list[Loop]] | None:
        """Loops that only spatial, and that reduction variables depend on; None for scans."""
        nests: list[Any] = []
        body = self.schedule.get(block)
        outermost = self.schedule.get(self.schedule.get_loops(block)[0])
        _visit(
            outermost,
            lambda x: nests.append(x) if isinstance(x, s_tir.SBlockRealize) and x.block.same_as(body) else None,
        )
        if not nests:
            return None
        reducing: list[Any] = []
        for variable, value in zip(body.iter_vars, nests[0].iter_values, strict=True):
            if int(variable.iter_type) == REDUCTION:
                _visit(value, lambda x: reducing.append(x) if isinstance(x, tirx.Var) else None)
            elif int(variable.iter_type) != SPATIAL:
                return None
        spatial = [loop for loop in loops if not any(self.schedule.get(loop).loop_var.same_as(r) for r in reducing)]
        return spatial, [loop for loop in loops if loop not in spatial]


def _attempt(action: Callable[..., Any], *arguments: Any) -> None:
    """Take a step that a schedule may refuse; it is then left as it was."""
    try:
        action(*arguments)
    except _FAILURES:
        return


def _inline(schedule: s_tir.Schedule) -> None:
    """Inline what is only read elementwise; not what is costly and read many times."""
    blocks = _Blocks(schedule)
    outputs = {schedule.get(o).name_hint for o in schedule.get_output_blocks("root")}
    for block in blocks.all():
        if schedule.get(block).name_hint in outputs or any(k != SPATIAL for k in blocks.kinds(block)):
            continue
        readers = schedule.get_consumers(block)
        reducers = [r for r in readers if blocks.reduces(r)]
        if blocks.costly(block) and (len(readers) > 1 or reducers):
            continue
        if any(len(blocks.kinds(r)) > len(blocks.kinds(block)) for r in reducers):
            continue  # a window reads each value many times
        _attempt(schedule.compute_inline, block)
    for block in reversed(blocks.all()):
        if all(k == SPATIAL for k in blocks.kinds(block)):
            _attempt(schedule.reverse_compute_inline, block)


def _by_rows(schedule: s_tir.Schedule) -> tirx.PrimFunc | None:
    """One parallel loop over the leading dims that all blocks share; None where there are none."""
    _inline(schedule)
    blocks = _Blocks(schedule)
    shared = _shared_dims(blocks)
    if not shared:
        return None
    _split_reductions(blocks)
    *others, last = blocks.all()
    loops = schedule.get_loops(last)[:shared]
    rows = schedule.fuse(*loops) if shared > 1 else loops[0]
    for block in reversed(others):
        schedule.compute_at(block, rows, preserve_unit_loops=True)
    schedule.parallel(rows)
    for block in blocks.all():
        _schedule_block(blocks, block, rows)
    return schedule.mod["main"]


def _by_blocks(schedule: s_tir.Schedule) -> tirx.PrimFunc:
    _inline(schedule)
    blocks = _Blocks(schedule)
    _split_reductions(blocks)
    for block in blocks.all():
        _schedule_block(blocks, block, None)
    return schedule.mod["main"]


def _shared_dims(blocks: _Blocks) -> int:
    """How many leading dims every block has alike, if that takes in all spatial dims of each reduction."""
    all_blocks = blocks.all()
    reductions = [b for b in all_blocks if blocks.reduces(b)]
    if len(all_blocks) < 2 or not reductions or any(blocks.has_modulo(b) for b in all_blocks):
        return 0
    extents = []
    for block in all_blocks:
        body = blocks.schedule.get(block)
        dims = [v.dom.extent for v in body.iter_vars if int(v.iter_type) == SPATIAL]
        while block in reductions and dims and isinstance(dims[-1], tirx.IntImm) and int(dims[-1]) == 1:
            dims.pop()  # kept dims of a reduction
        extents.append(dims)
        across = block in reductions and blocks.contiguous(block, SPATIAL)
        if len(blocks.schedule.get_loops(block)) != len(body.iter_vars) or across:
            return 0
    shared = 0
    while shared < min(map(len, extents)) and all(
        tvm_ffi.structural_equal(dims[shared], extents[0][shared]) for dims in extents
    ):
        shared += 1
    needed = min(len(dims) for dims, block in zip(extents, all_blocks, strict=True) if block in reductions)
    return shared if shared == needed else 0


def _split_reductions(blocks: _Blocks) -> None:
    """Give sums along contiguous memory one partial result a lane."""
    for block in blocks.all():
        if blocks.reduces(block):
            _attempt(_split_reduction, blocks, block)


def _split_reduction(blocks: _Blocks, block: Block) -> None:
    schedule = blocks.schedule
    loops, kinds = schedule.get_loops(block), blocks.kinds(block)
    if len(loops) != len(kinds) or kinds != sorted(kinds) or len(schedule.get(block).writes) != 1:
        return
    if blocks.contiguous(block, SPATIAL) or not blocks.contiguous(block, REDUCTION):
        return
    reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION]
    tail, count = _constant_tail(blocks, reduced, LANES)
    if count % LANES or count < 4 * LANES:
        return
    joint = schedule.fuse(*tail) if len(tail) > 1 else tail[0]
    _, lanes = schedule.split(joint, [None, LANES])
    schedule.rfactor(lanes, kinds.count(SPATIAL))


def _constant_tail(blocks: _Blocks, loops: Iterable[Loop], multiple: int) -> tuple[list[Loop], int]:
    """Innermost loops of constant extent, up to the first whose joint extent is a multiple."""
    tail: list[Loop] = []
    count = 1
    for loop in reversed(list(loops)):
        extent = blocks.extent(loop)
        if extent is None:
            break
        tail.insert(0, loop)
        count *= extent
        if count % multiple == 0:
            break
    return tail, count


def _schedule_block(blocks: _Blocks, block: Block, outer: Loop | None) -> None:
    """Parallelize (unless inside `outer`) and vectorize one block."""
    schedule = blocks.schedule
    loops = schedule.get_loops(block)
    if outer is not None:
        position = next(i for i, loop in enumerate(loops) if schedule.get(loop).same_as(schedule.get(outer)))
        loops = loops[position + 1 :]
    split = blocks.split_loops(block, loops) if loops else None
    if split is None:
        return
    spatial, reduced = split
    if reduced:
        _schedule_reduction(blocks, block, (spatial, reduced), outer is None)
    else:
        _schedule_elementwise(blocks, block, spatial, outer is None)


def _schedule_reduction(blocks: _Blocks, block: Block, loops: tuple[list[Loop], list[Loop]], top: bool) -> None:
    schedule = blocks.schedule
    spatial, reduced = loops
    across = bool(spatial) and blocks.contiguous(block, SPATIAL)
    size = 1
    for loop in reduced:
        size *= blocks.extent(loop) or 0
    if across and 0 < size <= SMALL_WINDOW:
        if top:
            schedule.parallel(blocks.fuse(block, spatial[:2] if len(spatial) > 3 else spatial[:1]))
        return
    if across:
        inner, extent = spatial[-1], blocks.extent(spatial[-1])
        if top and spatial[:-1]:
            schedule.parallel(blocks.fuse(block, spatial[:-1]))
        if extent is not None and extent % LANES == 0:
            width = next(w for w in (4 * LANES, 2 * LANES, LANES) if extent % w == 0)
            outer_part, lanes = schedule.split(inner, [None, width]) if extent > width else (None, inner)
            schedule.reorder(*([outer_part] if outer_part is not None else []), *reduced, lanes)
            schedule.vectorize(lanes)  # before decomposing: afterwards two blocks share the loop
    elif top and spatial:
        schedule.parallel(blocks.fuse(block, spatial))
    schedule.decompose_reduction(block, reduced[0])


def _schedule_elementwise(blocks: _Blocks, block: Block, loops: list[Loop], top: bool) -> None:
    schedule = blocks.schedule
    inner: list[Loop] = []
    count: int | None = 1
    for loop in reversed(loops):
        extent = blocks.extent(loop)
        if extent is None:
            break
        inner.insert(0, loop)
        assert count is not None
        count *= extent
        if count >= 2 * LANES or blocks.has_modulo(block):
            break
    lead = loops[: len(loops) - len(inner)]
    if not inner and len(lead) > 1:
        inner, count, lead = lead[-1:], None, lead[:-1]
    if top and not lead and count is not None and count >= GRAIN and len(inner) == 1:
        width = next((w for w in (512, 256, 128, 64) if count % w == 0), 512)
        outer_part, part = schedule.split(inner[0], [None, width])
        lead, inner, count = [outer_part], [part], blocks.extent(part)
    if inner and count and count % LANES == 0:
        joint = schedule.fuse(*inner) if len(inner) > 1 else inner[0]
        schedule.vectorize(schedule.split(joint, [None, LANES])[1] if count > LANES else joint)
    if lead and top:
        schedule.parallel(blocks.fuse(block, lead))
