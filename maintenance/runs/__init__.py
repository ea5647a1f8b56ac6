"""The recorded runs of the lessons; `python -m maintenance.runs 02` makes them."""
