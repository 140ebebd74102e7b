"""What MkDocs adds to the pages in docs/: files from elsewhere in the repository, and the API.

Pages link to files of the repository by relative paths, which also work outside the site. On the
site such a link leads to the page made of that file, and a link to a source file becomes text. A
comment "text of NAME.py" becomes the program of that name in docs/examples.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file in the repository -> page of the site
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "results.md",
    "research_agent/README.md": "reference/contract.md",
}
PACKAGES = ("research_env", "research_agent")
PROGRAM = re.compile(r"<!-- text of (\w+\.py) -->")
LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def modules(package: str) -> list[str]:
    """Full names of the public modules of a package, itself first."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return sorted(names)


def on_config(config: Any) -> Any:
    """Add the pages of the API to the navigation, one tab with a list for each package."""
    config.nav.append(
        {"API": [{package: [{n: _page(n)} for n in modules(package)]} for package in PACKAGES]}
    )
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        if page != "index.md":
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    for package in PACKAGES:
        for name in modules(package):
            text = f"# {name}\n\n::: {name}\n"
            files.append(File.generated(config, _page(name), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let relative links work that are right in the repository, not within docs/."""
    sources = {target: source for source, target in PAGES.items() if target != "index.md"}
    page_path = page.file.src_uri
    source = sources.get(page_path, f"docs/{page_path}")

    def rewrite(match: re.Match[str]) -> str:
        bang, text, link = match.groups()
        path, hash_, anchor = link.partition("#")
        if not path or "://" in link or link.startswith("mailto:"):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return text  # a source file, which the site does not hold
        relative = os.path.relpath(target, posixpath.dirname(page_path) or ".")
        return f"{bang}[{text}]({relative}{hash_}{anchor})"

    return PROGRAM.sub(_program, LINK.sub(rewrite, markdown))


def _program(match: re.Match[str]) -> str:
    text = (ROOT / "docs/examples" / match[1]).read_text(encoding="utf-8")
    return f"```python\n{text}```"


def _page(module: str) -> str:
    return f"api/{module}.md"
