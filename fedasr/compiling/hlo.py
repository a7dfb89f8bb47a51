"""Reads a compiled program's text: what is launched, how often, and what it moves.

XLA prints a module as computations of instructions. An instruction of a computation that runs by
itself (the entry, a loop's body) is a launch on the device, unless it only names or groups values.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
_COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice")
_HOST = re.compile(r"xla_\w*callback|^(?:infeed|outfeed)\b|is_host_transfer=true|MoveToHost")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_OPCODE = re.compile(r"^\s*(?P<opcode>[\w\-]+)\((?P<operands>[^)]*)\)?")
_SHAPE = re.compile(r"\b(pred|bf16|c64|c128|f8\w*|[suf]\d+)\[([\d,]*)\](\{[^}]*\})?")
_TILED = re.compile(r"\{([\d,]+):T\(([\d,]+)\)")  # of a layout: axes from the last, and its tile
_NEAR = re.compile(r"S\(1\)")  # of an array's layout: in a TPU's own memory, not in the device's
_WORKSPACE = re.compile(r"\bs8\[(\d+)\]")  # of a library's product: not to be written whole
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind between devices.

    Attributes:
      number: how many are made. bytes: of what a device has from all of them.
      largest: bytes of what it has from the largest.
    """

    number: int
    bytes: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """What runs between a beginning and an end, once for the whole program.

    Attributes:
      trips: how often; None if that is known only when it runs.
      launches: instructions that a device starts in one turn, without those of loops within.
      moved: bytes that these read and write in the device's memory, each array that one of them
        names counted whole, but of an array that is only sliced, or written in one place, that
        part. A TPU's arrays count with what fills up their tiles. What it has in its own fast
        memory, or a library works in, does not count.
      loops: within.
      exchanges: (kind, bytes of the result) of each collective in one turn, without those of loops.
      copies: of the launches those that only copy a part of an array, started beside others (GPUs).
    """

    trips: int | None
    launches: int
    moved: int
    loops: tuple["Loop", ...]
    exchanges: tuple[tuple[str, int], ...] = ()
    copies: int = 0

    @property
    def total_moved(self) -> int:
        """`moved` of one turn with that of the loops within, of unknown ones one turn."""
        return self.moved + sum((loop.trips or 1) * loop.total_moved for loop in self.loops)

    def every_loop(self) -> Iterator["Loop"]:
        """The loops within, and those within them."""
        for loop in self.loops:
            yield loop
            yield from loop.every_loop()

    @property
    def total(self) -> int:
        """Launches of one turn with those of the loops within, of unknown ones one turn."""
        return self.launches + sum((loop.trips or 1) * loop.total for loop in self.loops)

    @property
    def collectives(self) -> dict[str, Collective]:
        """By kind, of one turn with those of the loops within, of unknown ones one turn."""
        found: dict[str, Collective] = {}

        def add(kind: str, times: int, more: Collective) -> None:
            known = found.get(kind, Collective(0, 0, 0))
            found[kind] = Collective(
                known.number + times * more.number,
                known.bytes + times * more.bytes,
                max(known.largest, more.largest),
            )

        for kind, size in self.exchanges:
            add(kind, 1, Collective(1, size, size))
        for loop in self.loops:
            for kind, inner in loop.collectives.items():
                add(kind, 1 if loop.trips is None else loop.trips, inner)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """What stands in a program's text.

    Attributes:
      entry: the program as a loop of one turn.
      from_host: names of instructions that call the host or wait for it.
      float64: whether any array has 64 bits of float.
    """

    entry: Loop
    from_host: tuple[str, ...]
    float64: bool

    @property
    def step(self) -> Loop:
        """One turn of the innermost loop whose turns nobody knows: a client's local step."""
        found = self.entry
        while unknown := [loop for loop in found.loops if loop.trips is None]:
            found = max(unknown, key=lambda loop: loop.total)
        return found


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool


def read(text: str) -> Program:
    """Reads what `compiled.as_text()` gives.

    Raises:
      ValueError: it is no such text.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("the text has no entry computation")
    every = [x for found in computations.values() for x in found]
    host = tuple(x.name for x in every if _HOST.search(f"{x.opcode} {x.text}"))
    wide = any(re.search(r"\b(f64|c128)\[", x.shape) for x in every)
    return Program(_loop(computations, entry, 1), host, wide)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str | None]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] | None = None
    entry = None
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = found.setdefault(opened["name"], [])
            if opened["entry"]:
                entry = opened["name"]
        elif line.rstrip() == "}":  # what begins so may be of a kernel's description
            current = None
        elif current is not None and (instruction := _instruction(line)) is not None:
            current.append(instruction)
    return found, entry


def _instruction(line: str) -> _Instruction | None:
    if (matched := _INSTRUCTION.match(line)) is None:
        return None
    shape, rest = _shape_and_rest(matched["rest"])
    if (opcode := _OPCODE.match(rest)) is None:
        return None
    operands = tuple(re.findall(r"%([\w.\-]+)", opcode["operands"]))
    return _Instruction(
        matched["name"], shape, opcode["opcode"], operands, rest, bool(matched["root"])
    )


def _shape_and_rest(text: str) -> tuple[str, str]:
    """An instruction's shape, which may be a tuple with brackets within, and what follows."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _loop(computations: dict[str, list[_Instruction]], name: str, trips: int | None) -> Loop:
    instructions = computations.get(name, [])
    sizes = {x.name: shape_bytes(x.shape, tiles=False) for x in instructions}
    outside = {x.name: _outside_bytes(x.shape) for x in instructions}
    launches = moved = copies = 0
    loops: list[Loop] = []
    exchanges: list[tuple[str, int]] = []
    for instruction in instructions:
        if instruction.opcode == "while":
            (body,) = _called(instruction, "body")
            loops.append(_loop(computations, body, _trips(computations, instruction)))
        elif instruction.opcode in ("call", "conditional"):
            parts = [_loop(computations, callee, 1) for callee in _callees(instruction)]
            if parts:
                part = max(parts, key=lambda loop: loop.total)
                launches, moved = launches + part.launches, moved + part.moved
                copies += part.copies
                loops += part.loops
                exchanges += part.exchanges
        elif not _is_free(instruction):
            launches += 1
            copies += _only_copies(computations, instruction)
            moved += _moved(computations, instruction, outside)
            exchanges += _exchanges(computations, instruction, sizes)
    return Loop(trips, launches, moved, tuple(loops), tuple(exchanges), copies)


def _is_free(instruction: _Instruction) -> bool:
    """Whether nothing is launched: it names, groups or awaits values, or only takes room."""
    opcode = instruction.opcode
    room = opcode == "custom-call" and 'custom_call_target="AllocateBuffer"' in instruction.text
    return opcode in _FREE or opcode.endswith("-done") or room


def _moved(
    computations: dict[str, list[_Instruction]], instruction: _Instruction, sizes: dict[str, int]
) -> int:
    """Bytes that an instruction reads and writes, see `Loop.moved`; sizes: of `_outside_bytes`."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode in _SLICES or opcode == "slice-start":
        part = instruction.shape
        if opcode == "slice-start":  # names what it reads, what it writes, and a mark
            part = [found[0] for found in _SHAPE.finditer(part)][1]
        far = sizes.get(operands[0], 1) > 0
        return shape_bytes(part) * far + _outside_bytes(part)
    if opcode == "dynamic-update-slice":
        return 2 * sizes.get(operands[1], 0)
    if opcode == "copy-start":  # names what it writes, what it reads, and a mark
        return _outside_bytes(instruction.shape) - 4
    written = sizes[instruction.name] - _workspace(computations, instruction)
    if opcode in ("fusion", "fusion-start") and (callee := _called(instruction, "calls")):
        parameters = [x for x in computations.get(callee[0], []) if x.opcode == "parameter"]
        if parameters:
            places = [int(re.findall(r"\((\d+)\)", x.text)[0]) for x in parameters]
            read = sum(
                _read(computations, callee[0], x)
                for place, x in zip(places, parameters, strict=True)
                if place >= len(operands) or sizes.get(operands[place], 1)
            )
            return read + min(_written(computations, callee[0]), written)
    return written + sum(sizes.get(operand, 0) for operand in operands)


def _workspace(computations: dict[str, list[_Instruction]], instruction: _Instruction) -> int:
    """Bytes of an instruction's results that are the workspace of a library's product."""
    within = [x for name in _called(instruction, "calls") for x in computations.get(name, [])]
    if not any('custom_call_target="__cublas' in x.text for x in (instruction, *within)):
        return 0
    return sum(map(int, _WORKSPACE.findall(instruction.shape)))


def _read(computations: dict[str, list[_Instruction]], name: str, parameter: _Instruction) -> int:
    """Bytes that a fusion reads of one of its parameters, see `Loop.moved`."""
    whole = shape_bytes(parameter.shape)

    def of_users(found: str) -> int:
        total = 0
        for user in computations[name]:
            for place, operand in enumerate(user.operands):
                if operand != found:
                    continue
                if user.opcode == "bitcast":
                    # Whoever called for nothing but another view reads the whole.
                    total += whole if user.root else of_users(user.name)
                elif user.opcode in _SLICES and place == 0:
                    total += shape_bytes(user.shape)
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    pass
                elif user.opcode == "fusion":
                    (callee,) = _called(user, "calls")
                    inner = [x for x in computations[callee] if f"parameter({place})" in x.text]
                    total += _read(computations, callee, inner[0])
                else:
                    return whole
        return total

    return min(whole, of_users(parameter.name))


def _written(computations: dict[str, list[_Instruction]], name: str) -> int:
    """Bytes that a fusion writes, see `Loop.moved`."""
    by_name = {x.name: x for x in computations[name]}
    (root,) = (x for x in computations[name] if x.root)
    total = 0
    for part in [by_name[x] for x in root.operands] if root.opcode == "tuple" else [root]:
        while part.opcode == "bitcast" and part.operands[0] in by_name:
            part = by_name[part.operands[0]]
        if part.opcode == "dynamic-update-slice":
            total += shape_bytes(by_name[part.operands[1]].shape)
        elif part.opcode == "fusion":
            total += _written(computations, _called(part, "calls")[0])
        else:
            total += shape_bytes(part.shape)
    return total


def _only_copies(computations: dict[str, list[_Instruction]], instruction: _Instruction) -> bool:
    """Whether a fusion that is started beside others only slices, or writes into a place."""
    if instruction.opcode != "fusion-start":
        return False
    (callee,) = _called(instruction, "calls")
    allowed = {"parameter", "constant", "bitcast", "tuple", "dynamic-update-slice", *_SLICES}
    of_place = {x.name for x in computations[callee] if not re.search(r"\[\d", x.shape)}
    return all(x.opcode in allowed or x.name in of_place for x in computations[callee])


def _exchanges(
    computations: dict[str, list[_Instruction]], instruction: _Instruction, sizes: dict[str, int]
) -> list[tuple[str, int]]:
    """The collective that an instruction is, or those within what it calls, such as a fusion."""
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return [
            found
            for callee in _called(instruction, "calls")
            for found in _loop(computations, callee, 1).exchanges
        ]
    size = sizes[instruction.name]
    if opcode in ("all-gather-start", "collective-permute-start"):  # named beside what goes in
        size -= sum(sizes.get(operand, 0) for operand in instruction.operands)
    return [(kind, size)]


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int | None:
    """How often a loop turns: as the compiler says, or as its condition counts up to a constant."""
    if known := _TRIPS.search(loop.text):
        return int(known[1])
    (condition,) = _called(loop, "condition")
    constants = {}
    for instruction in computations.get(condition, []):
        value = re.match(r"\s*constant\((\d+)\)", instruction.text)
        if value:
            constants[instruction.name] = int(value[1])
        if instruction.root and instruction.opcode == "compare" and "=LT" in instruction.text:
            return constants.get(instruction.operands[-1])
    return None


def _called(instruction: _Instruction, attribute: str) -> list[str]:
    return re.findall(rf"\b{attribute}=%?([\w.\-]+)", instruction.text)


def _callees(instruction: _Instruction) -> Iterator[str]:
    for attribute in ("to_apply", "calls", "true_computation", "false_computation"):
        yield from _called(instruction, attribute)
    for group in re.findall(r"branch_computations=\{([^}]*)\}", instruction.text):
        yield from re.findall(r"%?([\w.\-]+)", group)


def shape_bytes(shape: str, tiles: bool = True) -> int:
    """Bytes of a shape as XLA writes it, such as "bf16[8,144]{1,0}" or a tuple of such.

    tiles: with what fills them up: "f32[8,144]{1,0:T(8,128)}" takes the room of [8, 256].
    """
    found = _SHAPE.findall(shape)
    return sum(_array_bytes(kind, sizes, layout if tiles else "") for kind, sizes, layout in found)


def _outside_bytes(shape: str) -> int:
    """`shape_bytes` of the arrays that are in the device's memory."""
    return sum(_array_bytes(*x) for x in _SHAPE.findall(shape) if not _NEAR.search(x[2]))


def _array_bytes(kind: str, sizes: str, layout: str) -> int:
    bits = _BITS.get(kind) or (8 if kind.startswith("f8") else int(kind[1:]))
    axes = [int(size) for size in sizes.split(",") if size]
    if tiled := _TILED.match(layout):
        order, tile = ([int(x) for x in found.split(",")] for found in tiled.groups())
        for axis, whole in zip(order, reversed(tile), strict=False):
            axes[axis] = -(-axes[axis] // whole) * whole
    return bits * math.prod(axes) // 8
