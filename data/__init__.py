"""Tasks, which are problems with an exact grader, and model folders. See data/README.md."""
