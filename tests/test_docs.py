"""Every Python block in README and docs runs, or says in plain sight why not.

A page is one program: its blocks run in order, in one fresh process and an empty directory, on the lines
where they stand in the page, so a traceback points into the page. A block that cannot run has an HTML
comment directly above it: `<!-- not run: the reason -->`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tests.forked import run_program

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TIMEOUT_S = 150

NOT_RUN = re.compile(r"<!--\s*not run:(?P<reason>.*?)-->", re.DOTALL)
# Other spellings would be shown as Python and never run.
SPELLED_OTHERWISE = re.compile(
    r"(py|py3|python3|pycon|ipython3?|\{code(-block|-cell)?\}\s*(py|ipy)\S*)\b", re.IGNORECASE
)


def reason_not_to_run(above: Token | None, place: str) -> str | None:
    """The reason given in the comment above a block; None if there is no such comment."""
    found = NOT_RUN.search(above.content) if above is not None and above.type == "html_block" else None
    if found is None:
        return None
    reason = found["reason"].strip()
    if len(reason.split()) < 2:
        raise ValueError(f"{place}: `not run:` needs a reason in words, got {reason!r}")
    return reason


def program_of(page: Path) -> str:
    """A page's runnable blocks as one program, each on its own lines; empty if it has none."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 2)
    above: Token | None = None
    for token in MarkdownIt().parse(text):
        if token.type == "fence" and token.map is not None:
            first = token.map[0] + 1  # the line after the fence, counted from 0
            language = token.info.strip()
            if SPELLED_OTHERWISE.match(language):
                raise ValueError(
                    f"{page.name}:{first}: a block of {language!r}; spell it `python` so that it is run"
                )
            runs = language.split(maxsplit=1)[:1] == ["python"]
            if runs and reason_not_to_run(above, f"{page.name}:{first}") is None:
                body = token.content.splitlines()
                lines[first : first + len(body)] = body
        above = token
    return "\n".join(lines) + "\n" if any(lines) else ""


def run_page(page: Path, directory: Path) -> subprocess.CompletedProcess[str] | None:
    """Run a page's program; None if it has nothing to run."""
    program = program_of(page)
    if not program:
        return None
    script = directory / page.name.replace(".md", "_md.py")
    script.write_text(program, encoding="utf-8")
    workdir = directory / "empty"
    workdir.mkdir()
    return run_program(script, cwd=workdir, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_in_each_page_runs(page: Path, tmp_path: Path) -> None:
    done = run_page(page, tmp_path)
    if done is not None:
        assert done.returncode == 0, f"{page.name} (line numbers are the page's own)\n{done.stdout}"


def test_the_readme_has_something_to_run() -> None:
    assert "keepstep" in program_of(ROOT / "README.md")


def page_with(directory: Path, text: str) -> Path:
    page = directory / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_a_broken_block_fails_on_its_own_line(tmp_path: Path) -> None:
    page = page_with(
        tmp_path,
        "# Title\n\n```python\nx = 1\n```\n\ntext\n\n- item\n\n  ```python\n  assert x == 2\n  ```\n",
    )
    done = run_page(page, tmp_path)
    assert done is not None
    assert done.returncode == 1
    assert "line 12" in done.stdout
    assert "assert x == 2" in done.stdout


def test_a_block_that_does_not_compile_fails(tmp_path: Path) -> None:
    done = run_page(page_with(tmp_path, "````python\ndef broken(:\n````\n"), tmp_path)
    assert done is not None
    assert "SyntaxError" in done.stdout


def test_blocks_share_names_and_other_languages_are_left_alone(tmp_path: Path) -> None:
    page = page_with(
        tmp_path, "```python\nx = 1\n```\n```console\n$ false\n```\n```python\nprint(x + 1)\n```\n"
    )
    done = run_page(page, tmp_path)
    assert done is not None
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_a_block_with_a_reason_is_left_out(tmp_path: Path) -> None:
    page = page_with(tmp_path, "<!-- not run: needs eight GPUs -->\n```python\nraise SystemExit(3)\n```\n")
    assert program_of(page) == ""


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not run: -->\n```python\n1\n```\n",
        "<!-- not run: because -->\n```python\n1\n```\n",
        "```py\n1\n```\n",
        "```pycon\n>>> 1\n```\n",
        "```{code-block} python\n1\n```\n",
    ],
)
def test_ways_round_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:\d+"):
        program_of(page_with(tmp_path, text))


def test_a_comment_that_is_not_directly_above_gives_no_reason(tmp_path: Path) -> None:
    page = page_with(tmp_path, "<!-- not run: needs eight GPUs -->\n\nwords\n\n```python\nprint(1)\n```\n")
    assert "print(1)" in program_of(page)


def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "docs",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert built.returncode == 0, built.stderr
    assert "Accelerator" in (tmp_path / "api.html").read_text()
