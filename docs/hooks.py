"""What mkdocs does beside building pages: tables from the code, and links to files outside `docs/`."""

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
MARKER = "<!-- kvpack: options of all stacks -->"


def on_files(files: Any, config: Any) -> Any:
    """Add the measured pictures and tables, under the names that they have in the repository."""
    for path in sorted((ROOT / RESULTS).iterdir()):
        if path.suffix in (".png", ".md", ".json"):
            name = str(path.relative_to(ROOT))
            files.append(File.generated(config, name, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write the table of options, and links to the repository as names of files where the site has no page."""
    here = Path(page.file.src_uri).parent.as_posix()
    if MARKER in markdown:
        markdown = markdown.replace(MARKER, options_of_stacks())

    def linked(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        inside = relpath(f"docs/{here}/{target}", ".")
        if inside.startswith("docs/"):
            return found[0]
        if inside.startswith(RESULTS):
            return f"[{text}]({relpath(inside, here)})"
        return text if text.startswith("`") else f"{text} (`{inside}`)" if text != inside else f"`{inside}`"

    return re.sub(r"\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)\)", linked, markdown)


def options_of_stacks() -> str:
    """Return a section for each installed stack, with a table of its options, their defaults and meanings."""
    from kvpack.cli.tables import described, installed

    sections = []
    for name in (row["name"] for row in installed() if row["role"] == "stack"):
        row = next(each for each in described(name) if each["role"] == "stack")
        table = "\n".join(
            f"| `{each['option']}` | `{each['default']}` | {cell(each['meaning'])} |" for each in row["options"]
        )
        columns = f"| option | default | meaning |\n|---|---|---|\n{table}" if table else "It has no options."
        sections.append(f"### `{name}` {{ #{name} }}\n\n{cell(row['summary'])}\n\n{columns}")
    return "\n\n".join(sections)


def cell(text: str) -> str:
    """Return text that does not end a cell of a table."""
    return text.replace("|", "\\|")
