"""What maintainers run; README.md says what each command writes and what checks it."""
