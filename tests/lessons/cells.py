"""What a lesson builds, taken from its cells: tests run on what a reader sees."""

from maintenance.cells import cells

__all__ = ["cells"]
