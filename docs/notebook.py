"""python docs/notebook.py: docs/colab.ipynb from docs/colab.md, whose ```python blocks become its cells.

colab.md is the only source; a test fails if the two differ.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PAGE = Path(__file__).parent / "colab.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")


def notebook_of(page: str) -> Any:
    """The notebook of a Markdown text: no outputs, cells numbered in order."""
    cells = []
    for index, part in enumerate(re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)):
        if text := part.strip():
            cell = (new_markdown_cell, new_code_cell)[index % 2](text)
            cell.id = f"cell-{len(cells)}"
            cells.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "accelerator": "GPU"})


if __name__ == "__main__":
    nbformat.write(notebook_of(PAGE.read_text(encoding="utf-8")), NOTEBOOK)
