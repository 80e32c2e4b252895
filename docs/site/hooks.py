"""What the site needs beyond MkDocs: links out of docs/, and formulas as MathML, which browsers read without a script."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_OUTSIDE = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\.\./([^)#]*)(#[^)]*)?\)")
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
_CODE = re.compile(r"(^```(\w*)[^\n]*\n.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
_DISPLAY = re.compile(r"\$\$((?:(?!\n\n)[^$])+?)\$\$")
_INLINE = re.compile(r"(?<![\\$\w])\$(?!\s)((?:(?!\n\n)[^$])+?)(?<!\s)\$(?![\w$])")


def on_config(config: Any) -> Any:
    """Put pages that the navigation doesn't name at the end of "How to"."""
    named = set(re.findall(r"[\w-]+\.md", str(config.nav)))
    tasks = next(entry["How to"] for entry in config.nav if "How to" in entry)
    tasks += [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in named]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the changelog, and the files outside docs/ that pages link to."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "changelog.md", content=changes))
    wanted = {
        found[3] for page in (ROOT / "docs").glob("*.md") for found in _OUTSIDE.finditer(page.read_text(encoding="utf-8"))
    }
    for path in sorted(wanted - _PAGES.keys()):
        if (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links out of docs/ to their place in the site, and set formulas."""
    text = _OUTSIDE.sub(_inside, markdown)
    parts = _CODE.split(text)
    return "".join(_rendered(parts[i : i + 3]) for i in range(0, len(parts), 3))


def _inside(found: re.Match[str]) -> str:
    image, label, path, anchor = found[1], found[2], found[3], found[4] or ""
    target = _PAGES.get(path, path)
    return f"{image}[{label}]({target}{anchor})" if (ROOT / path).is_file() else label


def _rendered(parts: list[str]) -> str:
    """Text with its formulas set, and the code behind it; a block of mathematics is a formula."""
    text = _DISPLAY.sub(lambda found: f"<div>{convert(' '.join(found[1].split()), display='block')}</div>", parts[0])
    text = _INLINE.sub(lambda found: convert(" ".join(found[1].split())), text)
    if len(parts) < 3:
        return text
    code, language = parts[1], parts[2]
    if language == "math":
        formula = " ".join(code.splitlines()[1:-1])
        return f"{text}\n<div>{convert(formula, display='block')}</div>\n"
    return text + re.sub(r"\A(```\w+)[^\n]*", r"\1", code)
