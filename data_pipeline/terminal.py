"""Words of others on our terminal: shown as they are, never obeyed, and never without end.

Names of files, hosts and samples, captions, and messages of libraries may hold markup, colours and
control characters; whatever is printed goes through here.
"""

from typing import Any

from rich.console import Console
from rich.text import Text

from data_pipeline.printable import plain


class Terminal(Console):
    """A console that reads no markup in text and shows control characters instead of sending them;
    what shall be styled is given as rich's `Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)
