"""Layout of the structs and values of the enumerators in the public C++ headers.

What a program that was compiled with these headers knows of them: sizes, offsets of the fields,
enumerators. `api_layout.json` beside this file has them on record. After a change,

    python tests/cpp/api_layout.py

writes the record anew; it refuses to where what is on record changed under the same
ULTRAMEM_API_VERSION.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "csrc" / "include"
RECORD = Path(__file__).with_suffix(".json")

Layout = dict[str, dict[str, int]]


def code_of(header: str) -> str:
    """Without comments and preprocessor lines."""
    lines = [re.sub(r"//.*", "", line) for line in header.splitlines()]
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def fields_of(body: str) -> list[str]:
    """Names of a struct's own fields, from what stands between its braces."""
    nested = re.compile(r"\{[^{}]*\}")
    while nested.search(body):
        body = nested.sub(";", body)  # bodies of functions
    names = []
    for statement in body.split(";"):
        text = " ".join(statement.split())
        if not text or text.startswith(("using ", "static ")):
            continue
        if pointer := re.search(r"\(\*(\w+)\)\(", text):
            names.append(pointer[1])
        elif "(" not in text and not text.startswith("ULTRAMEM_"):
            for declarator in re.sub(r"=[^,]*|\[[^]]*\]", "", text).split(","):
                names.append(declarator.split()[-1].lstrip("*&"))
    return names


def parse(header: str) -> dict[str, list[str]]:
    """Fields of every struct and enumerators of every enum, templates apart."""
    code = code_of(header)
    declared = {}
    for keywords, name, body in re.findall(
        r"^((?:template .*\n)?(?:struct|enum class)) (\w+)[^;{]*\{(.*?)\n?\};",
        code,
        re.MULTILINE | re.DOTALL,
    ):
        if keywords == "struct":
            declared[name] = fields_of(body)
        elif keywords == "enum class":
            declared[name] = [f"::{e}" for e in re.findall(r"\b(k\w+)\b", body)]
    return declared


def measure() -> dict[str, Any]:
    """{"api_version": ..., "layout": {name: {"size": ..., field or ::enumerator: ...}}}."""
    declared: dict[str, list[str]] = {}
    for header in sorted((INCLUDE / "ultramem").glob("*.h")):
        declared |= parse(header.read_text())
    lines = ["#include <cstddef>", "#include <cstdio>", "#include <ultramem/ultramem.h>"]
    lines += ["using namespace ultramem;", "#define SHOW(name, member, value) \\"]
    lines += ['  std::printf("%s %s %lld\\n", name, member, static_cast<long long>(value))']
    lines += ["int main() {", '  SHOW("api", "version", ULTRAMEM_API_VERSION);']
    for name, members in declared.items():
        lines.append(f'  SHOW("{name}", "size", sizeof({name}));')
        for member in members:
            value = f"{name}{member}" if member[0] == ":" else f"offsetof({name}, {member})"
            lines.append(f'  SHOW("{name}", "{member}", {value});')
    lines.append("}")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "layout.cpp"), Path(folder, "layout")
        source.write_text("\n".join(lines))
        command = ["c++", "-std=c++17", "-Wno-invalid-offsetof", f"-I{INCLUDE}", str(source)]
        subprocess.run([*command, "-o", str(program)], check=True)
        output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    layout: Layout = {}
    for line in output.splitlines():
        name, member, value = line.split()
        layout.setdefault(name, {})[member] = int(value)
    return {"api_version": layout.pop("api")["version"], "layout": layout}


def changed(recorded: Layout, measured: Layout) -> list[str]:
    """What is on record and is not so any more. Additions are no change, but for fields."""
    wrong = []
    for name, members in recorded.items():
        now = measured.get(name)
        if now is None:
            wrong.append(f"{name} is gone")
            continue
        for member in sorted(members.keys() | now.keys()):
            if member not in members:
                if member[0] != ":":
                    wrong.append(f"{name}.{member} is new")
            elif members[member] != now.get(member):
                wrong.append(f"{name} {member}: {members[member]}, now {now.get(member)}")
    return wrong


def main() -> int:
    measured = measure()
    if RECORD.exists():
        recorded = json.loads(RECORD.read_text())
        wrong = changed(recorded["layout"], measured["layout"])
        if wrong and recorded["api_version"] == measured["api_version"]:
            print("raise ULTRAMEM_API_VERSION (version.h):", *wrong, sep="\n  ", file=sys.stderr)
            return 1
    RECORD.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
