"""Tasks: problems with an exact grader. See data/README.md."""
