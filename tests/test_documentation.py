"""What the README and the API page say is there, is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rag_blockcache

ROOT = Path(__file__).parent.parent


def test_the_api_page_describes_every_public_name():
    described = re.findall(r"^::: (\S+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    missing = [
        name for name in rag_blockcache.__all__ if not any(each.endswith(f".{name}") for each in described)
    ]
    assert not missing
    assert rag_blockcache.__all__ == sorted(rag_blockcache.__all__)


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    broken = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not broken


@pytest.mark.parametrize(
    "page", ["README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
)
def test_python_on_a_page_is_valid(page):
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        compile(code, page, "exec")


def test_every_make_target_on_a_page_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ["README.md", "docs/quickstart.md", "docs/contributing.md", "docs/benchmarks.md"]:
        commands = re.findall(r"(?:`|^\$ |^)make ([a-z]+)", (ROOT / page).read_text(), re.MULTILINE)
        assert commands
        assert set(commands) <= targets


def test_importing_the_package_brings_in_no_framework_and_no_torch():
    code = (
        "import sys, rag_blockcache, rag_blockcache.cli\n"
        "from rag_blockcache import Chat, Passage, Question, Text\n"
        "heavy = {'torch', 'transformers', 'langchain_core', 'llama_index'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
