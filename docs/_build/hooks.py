"""For mkdocs: pages of the site that lie outside of docs/, under the links that GitHub follows too.

A link such as ../benchmarks/results/x.md, from a page in docs/, leads out of the folder that mkdocs reads. What such
links name is put into the site under its path in the repository, and the links are shortened to match.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside of docs/, and the two pages that stand at the root."""
    outside = set(PAGES)
    for file in [file for file in files if file.src_uri.endswith(".md")]:
        outside |= {target for _, target in _links_out(file.content_string, file.src_uri)}
    for page in PAGES:
        outside |= {target for _, target in _links_out((ROOT / page).read_text(), f"../{page}")}
    for path in sorted(outside):
        found = ROOT / path
        for each in sorted(found.rglob("*")) if found.is_dir() else [found]:
            uri = each.relative_to(ROOT).as_posix()
            if each.is_file() and "__pycache__" not in uri and uri != "README.md" and not files.get_file_from_path(uri):
                files.append(File.generated(config, uri, abs_src_path=str(each)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ as links within the site; a folder is named by its path."""
    uri = page.file.src_uri
    at_root = uri in PAGES or (page.file.generated_by is not None and not uri.startswith("docs/"))
    base = posixpath.dirname(uri)

    def shortened(match: re.Match[str]) -> str:
        target = _target(match[1], uri if not at_root else f"../{uri}")
        if target is None:
            return match[1]
        target = "README.md" if target in ("README.md", "docs/README.md") else target.removeprefix("docs/")
        if (ROOT / target).is_dir():
            first = sorted(f.src_uri for f in files if f.src_uri.startswith(f"{target}/"))
            target = first[0] if first else target
        return posixpath.relpath(target, base or ".")

    return LINK.sub(shortened, markdown)


def _links_out(markdown: str, uri: str) -> list[tuple[str, str]]:
    links = [(link, _target(link, uri)) for link in LINK.findall(markdown)]
    return [(link, target) for link, target in links if target and not target.startswith(("docs/", "README"))]


def _target(link: str, uri: str) -> str | None:
    """The path in the repository of a link that leads out of docs/, or of any link of a page at the root; else None."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), link))
    inside = path.startswith("docs/") and not uri.startswith("../")
    return None if inside or path.startswith("..") or not (ROOT / path).exists() else path
