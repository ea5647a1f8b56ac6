"""Answers of several models side by side, as text and as a Markdown table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Answers of several models to the same prompts; a notebook shows it as a table.

    Attributes:
        prompts: the user texts.
        answers: {name of the model: its answers, in the order of `prompts`}.
        references: the right answers, or None.
    """

    prompts: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]
    references: tuple[str, ...] | None = None

    def _columns(self) -> list[tuple[str, tuple[str, ...]]]:
        """Pairs, since a model may be called "prompt"."""
        right = [("right answer", self.references)] if self.references else []
        return [("prompt", self.prompts), *self.answers.items(), *right]

    def __str__(self) -> str:
        columns = self._columns()
        width = max(len(name) for name, _ in columns)
        blocks = []
        for i in range(len(self.prompts)):
            lines = []
            for name, texts in columns:
                text = texts[i].replace("\n", "\n" + " " * (width + 2))
                lines.append(f"{name:<{width}}  {text}".rstrip())
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)

    def _repr_markdown_(self) -> str:
        columns = self._columns()
        names = [name for name, _ in columns]
        lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(columns)]
        lines += [
            "| " + " | ".join(_cell(texts[i]) for _, texts in columns) + " |"
            for i in range(len(self.prompts))
        ]
        return "\n".join(lines)


def _cell(text: str) -> str:
    """Any text as one cell of a Markdown table, in a code span."""
    text = " ⏎ ".join(text.splitlines()).replace("|", "\\|").strip()
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}" if text else "*(empty)*"
