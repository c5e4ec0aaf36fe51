"""README.md and the other pages of the root, for the site and for PyPI, where their links lead elsewhere than here.

mkdocs takes them as pages of the site. Before a release is built,

    python .ci/pages.py https://github.com/OWNER/zeroadam v0.1.0

makes the links of README.md absolute, in place: PyPI shows nothing else of the project.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Pages of the site by their files in the root.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def with_links(text: str, target: Callable[[str, bool], str]) -> str:
    """The text with other targets of its links and pictures; target: of a path, and whether it is a picture.

    Links to other sites and into the same page stay as they are.
    """

    def replace(match: re.Match[str]) -> str:
        mark, name, path = match.groups()
        if re.match(r"[a-z]+:|#", path):
            return match[0]
        return f"{mark}[{name}]({target(path, bool(mark))})"

    return LINK.sub(replace, text)


def for_pypi(text: str, address: str, tag: str) -> str:
    """address: of the repository, as https://github.com/OWNER/NAME; tag: of the release, whose files are shown."""
    return with_links(text, lambda path, picture: f"{address.rstrip('/')}/{'raw' if picture else 'blob'}/{tag}/{path}")


def site_path(path: str, picture: bool = False) -> str:  # noqa: ARG001
    """A path from the root, as pages of the site see it."""
    file, hash_sign, anchor = path.partition("#")
    return PAGES.get(file, file.removeprefix("docs/")) + hash_sign + anchor


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with the files of docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = with_links((ROOT / source).read_text(encoding="utf-8"), site_path)
        files.append(File.generated(config, page, content=text))
    return files


if __name__ == "__main__":
    if len(sys.argv) != 3 or not re.match(r"https?://", sys.argv[1]):
        sys.exit("give the repository's address and the release's tag: pages.py https://github.com/OWNER/NAME v0.1.0")
    readme = ROOT / "README.md"
    readme.write_text(for_pypi(readme.read_text(encoding="utf-8"), *sys.argv[1:]), encoding="utf-8")
