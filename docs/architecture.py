"""Draw ``docs/architecture.svg``: the rooms of the package and what each imports, read from the import statements.

    python docs/architecture.py            writes the drawing
    python docs/architecture.py --list     prints files, lines and arrows of every room

Imports inside functions count; those under TYPE_CHECKING, where only a type is named, do not, nor do ``__main__``
modules, which are programs. The drawing leaves out arrows to core and launch, which every room may import, and arrows
that follow from others.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "latent_medi"
DRAWING = Path(__file__).with_name("architecture.svg")
BELOW_ALL = ("core", "launch")
WIDTH, HEIGHT, GAP, ROW, MARGIN = 132, 34, 26, 84, 24


def modules() -> dict[str, Path]:
    """The files of the package by module name, programs aside."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The room of a module; the command line's files are one."""
    name = module.split(".")[1] if "." in module else ""
    return "command line" if name in ("cli", "completion") or name.endswith("verbs") else name


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from _imports(child)


def file_imports() -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = set()
        for node in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {word if word in known else node.module for word in full}
        graph[name] = (targets & set(known)) - {name}
    return graph


def room_imports(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    graph: dict[str, set[str]] = {}
    for module, targets in files.items():
        if room(module):
            graph.setdefault(room(module), set()).update({room(t) for t in targets} - {"", room(module)})
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, from a node back to it; empty if there is none."""
    state: dict[str, int] = {}

    def walk(node: str, path: list[str]) -> list[str]:
        state[node] = 1
        for target in sorted(graph.get(node, ())):
            if state.get(target) == 1:
                return [*path[path.index(target) :], target]
            if target not in state and (found := walk(target, [*path, target])):
                return found
        state[node] = 2
        return []

    return next((found for node in sorted(graph) if node not in state and (found := walk(node, [node]))), [])


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows of a graph without circles that do not follow from others."""
    reach: dict[str, set[str]] = {}

    def reached(node: str) -> set[str]:
        if node not in reach:
            reach[node] = set().union(*({t} | reached(t) for t in graph[node])) if graph[node] else set()
        return reach[node]

    return {n: {t for t in ts if not any(t in reached(o) for o in ts - {t})} for n, ts in graph.items()}


def _rows(graph: dict[str, set[str]]) -> tuple[list[list[str]], set[tuple[str, str]]]:
    """Nodes in rows, importers above, and arrows between neighbouring rows; long arrows pass through empty names."""
    level: dict[str, int] = {}

    def of(node: str) -> int:
        if node not in level:
            level[node] = 1 + max((of(t) for t in graph[node]), default=-1)
        return level[node]

    rows: list[list[str]] = [[] for _ in range(1 + max(of(n) for n in sorted(graph)))]
    arrows = set()
    for node in sorted(graph):
        rows[level[node]].append(node)
    for node in sorted(graph):
        for target in sorted(graph[node]):
            last = node
            for between in range(level[node] - 1, level[target], -1):
                passing = f" {node}>{target}@{between}"
                rows[between].append(passing)
                arrows.add((last, passing))
                last = passing
            arrows.add((last, target))
    for turn in range(24):  # each row in the order of its neighbours' mean places
        down = turn % 2 == 0
        for i in range(len(rows) - 2, -1, -1) if down else range(1, len(rows)):
            place = {n: k for k, n in enumerate(rows[i + 1 if down else i - 1])}
            near = {n: [place[a if down else b] for a, b in arrows if (b if down else a) == n] for n in rows[i]}
            own = {n: k for k, n in enumerate(rows[i])}
            rows[i].sort(key=lambda n, near=near, own=own: sum(near[n]) / len(near[n]) if near[n] else own[n])
    return rows, arrows


def drawing() -> str:
    """The SVG."""
    graph = room_imports(file_imports())
    graph = {n: ts - set(BELOW_ALL) for n, ts in graph.items() if n not in BELOW_ALL}
    rows, arrows = _rows(reduced(graph))

    def size(node: str) -> int:
        return GAP if node.startswith(" ") else WIDTH

    widths = [sum(map(size, row)) + GAP * (len(row) - 1) for row in rows]
    width = max(widths) + 2 * MARGIN
    height = len(rows) * ROW + HEIGHT + 2 * MARGIN
    at: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(rows):
        x = (width - widths[i]) / 2
        for node in row:
            at[node] = (x + size(node) / 2, MARGIN + (len(rows) - 1 - i) * ROW)
            x += size(node) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">',
        "<title>Rooms of latent_medi: an arrow goes from a room to one that it imports</title>",
        '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4.5" orient="auto">'
        '<path d="M0,0 L9,4.5 L0,9 z" fill="#667"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="#fff"/>',
    ]
    for a, b in sorted(arrows):
        (x, y), (u, v) = at[a], at[b]
        y += HEIGHT / 2 if a.startswith(" ") else HEIGHT
        v += HEIGHT / 2 if b.startswith(" ") else 0
        tip = "" if b.startswith(" ") else ' marker-end="url(#tip)"'
        middle = (y + v) / 2
        path = f"M{x:g},{y:g} C{x:g},{middle:g} {u:g},{middle:g} {u:g},{v:g}"
        lines.append(f'<path d="{path}" fill="none" stroke="#667" stroke-width="1.3"{tip}/>')
    boxes = [(n, at[n][0] - WIDTH / 2, at[n][1], WIDTH) for n in sorted(at) if not n.startswith(" ")]
    bottom = f"{', '.join(BELOW_ALL)}: every room may import them"
    boxes.append((bottom, MARGIN, height - MARGIN - HEIGHT, width - 2 * MARGIN))
    for name, x, y, wide in boxes:
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="{HEIGHT}" rx="6" fill="#eef2f8" stroke="#345"/>'
            f'<text x="{x + wide / 2:g}" y="{y + HEIGHT / 2 + 5:g}" font-size="14" text-anchor="middle" fill="#123">'
            f"{name}</text>"
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print files, lines and arrows of every room instead")
    if not parser.parse_args().list:
        DRAWING.write_text(drawing(), encoding="utf-8")
        return
    graph = room_imports(file_imports())
    of_room = {name: [path for module, path in modules().items() if room(module) == name] for name in graph}
    for name in sorted(graph):
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in of_room[name])
        print(f"{name:18}{len(of_room[name]):4} files{lines:7} lines  imports {', '.join(sorted(graph[name])) or '-'}")
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows")


if __name__ == "__main__":
    main()
