"""BiShengIR's hfusion dialect, as text, in upstream's arith, tensor and linalg, so that it runs on this CPU."""

from __future__ import annotations

import re

from native import cumsum

BINARY = {
    "add": "addi",
    "sub": "subi",
    "mul": "muli",
    "div": "divsi",
    "mod": "remsi",
    "max_signed": "maxsi",
    "min_signed": "minsi",
    "vand": "andi",
    "vor": "ori",
}
COMPARE = {"veq": "eq", "vne": "ne", "vlt": "slt", "vle": "sle", "vgt": "sgt", "vge": "sge"}
OPERATOR = re.compile(r"^\s*%(\w+) = (hfusion\.[a-z_]+|linalg\.elemwise_\w+) (.*-> tensor<((?:\d+x)+)(\w+)>)$")
FLOAT = re.compile(r"b?f\d+")


def upstream(text: str) -> str:
    """The same module without hfusion; KeyError or ValueError for an operator that no kernel has had yet."""
    lines = []
    for line in text.splitlines():
        match = OPERATOR.match(line)
        lines.append(_operator(*match.groups()) if match else line)
    text = "\n".join(lines)
    text = re.sub(r"^module attributes \{.*?\} \{$", "module {", text, flags=re.M)
    text = re.sub(r"attributes \{[^{}]*(\{[^{}]*\}[^{}]*)*\} \{$", "attributes {} {", text, flags=re.M)
    text = re.sub(r"\{hacc\.arg_type = #hacc\.arg_type<\w+>\}", "", text)
    return re.sub(r"^.*annotation\.mark.*\n", "", text, flags=re.M)


def _operator(result: str, operator: str, rest: str, size: str, kind: str) -> str:
    tensor = f"tensor<{size}{kind}>"
    if operator == "hfusion.arange":
        return _arange(result, rest, tensor, kind)
    if operator == "hfusion.cumsum":
        if "reverse = false" not in rest:
            raise ValueError(rest)
        return cumsum(result, rest[1:].split(" ")[0], size[:-1], kind)
    names, kinds = (part.split(", ") for part in re.search(r"ins\(([^:]*) : ([^)]*)\)", rest).groups())
    lines = []
    for i, (name, given) in enumerate(zip(names, kinds, strict=True)):
        if not given.startswith("tensor"):  # a scalar for every lane
            names[i], kinds[i] = f"%splat_{result}_{i}", f"tensor<{size}{given}>"
            lines.append(f"{names[i]} = tensor.splat {name} : {kinds[i]}")
    source = re.search(r"(\w+)>$", kinds[0])[1].split("x")[-1]
    if operator == "hfusion.select":
        lines.append(f"%{result} = arith.select {', '.join(names)} : {kinds[0]}, {tensor}")
    elif operator == "hfusion.compare":
        how = COMPARE[re.search(r"compare_fn<(\w+)>", rest)[1]]
        # BiShengIR compares some integers as floats.
        ordered = "une" if how == "ne" else "o" + how.removeprefix("s")
        predicate = f"cmpf {ordered}" if FLOAT.match(source) else f"cmpi {how}"
        lines.append(f"%{result} = arith.{predicate}, {names[0]}, {names[1]} : {kinds[0]}")
    elif operator == "hfusion.cast":
        lines.append(f"%{result} = arith.{_cast(source, kind)} {names[0]} : {kinds[0]} to {tensor}")
    elif operator == "hfusion.elemwise_unary":
        if "vnot" not in rest:
            raise ValueError(rest)
        lines.append(f"%ones_{result} = arith.constant dense<{'true' if kind == 'i1' else -1}> : {tensor}")
        lines.append(f"%{result} = arith.xori {names[0]}, %ones_{result} : {tensor}")
    else:
        how = BINARY[re.search(r"binary_fn<(\w+)>", rest)[1]]
        lines.append(f"%{result} = arith.{how} {names[0]}, {names[1]} : {tensor}")
    return "\n".join(lines)


def _arange(result: str, rest: str, tensor: str, kind: str) -> str:
    offset, stride = re.search(r"offset\[(%\w+)\] strides\[(%\w+)\]", rest).groups()
    out = re.search(r"outs\((%\w+) :", rest)[1]
    return f"""%{result} = linalg.generic {{indexing_maps = [affine_map<(d0) -> (d0)>], iterator_types = ["parallel"]}}
    outs({out} : {tensor}) {{
    ^bb0(%o: {kind}):
      %i = linalg.index 0 : index
      %p = arith.muli %i, {stride} : index
      %q = arith.addi %p, {offset} : index
      %r = arith.index_cast %q : index to {kind}
      linalg.yield %r : {kind}
    }} -> {tensor}"""


def _cast(source: str, kind: str) -> str:
    wider = int(re.sub(r"\D", "", kind)) > int(re.sub(r"\D", "", source))
    if FLOAT.match(source):
        return ("extf" if wider else "truncf") if FLOAT.match(kind) else "fptosi"
    if FLOAT.match(kind):
        return "uitofp" if source == "i1" else "sitofp"
    return ("extui" if source == "i1" else "extsi") if wider else "trunci"
