"""Read the section ``Example:`` of our docstrings as the doctest that it is.

griffe knows ``Examples:`` only, and takes the singular for a box of Markdown, where ``>>>`` is a quotation.
"""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Rename the section before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object, once it is loaded."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
