"""python docs/notebook.py: the notebooks of pages, whose ```python blocks become their cells.

The page is the only source; a test fails if the two differ.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PAGE, QUESTIONS = (Path(__file__).parent / name for name in ("colab.md", "questions.md"))
NOTEBOOK = PAGE.with_suffix(".ipynb")


def notebook_of(page: str, gpu: bool = True) -> Any:
    """The notebook of a Markdown text: no outputs, cells numbered in order. `gpu`: that Colab gives it one."""
    cells = []
    for index, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)):
        if text := part.strip():
            cell = (new_markdown_cell, new_code_cell)[index % 2](text)
            cell.id = f"cell-{len(cells)}"
            cells.append(cell)
    metadata: dict[str, Any] = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    return new_notebook(cells=cells, metadata=metadata | ({"accelerator": "GPU"} if gpu else {}))


if __name__ == "__main__":
    for path in (PAGE, QUESTIONS):
        made = notebook_of(path.read_text(encoding="utf-8"), gpu=path == PAGE)
        nbformat.write(made, path.with_suffix(".ipynb"))
