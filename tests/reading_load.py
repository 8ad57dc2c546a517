"""Measure how dense the Python files of this project are: python tests/reading_load.py [REF]

It prints one row a file. With REF, a git commit, it measures the files as they were in that commit.
Nothing here passes or fails. The numbers only help to compare two states of the code.

    blank       a line that holds nothing but spaces
    words       a line that is only a comment, or a line of a docstring that is not blank
    code        every other line
    nodes       the nodes of the syntax tree, a measure of how much the code says

Names, numbers and operators are all nodes of the syntax tree. Many nodes in a line of code mean
that a reader has to take in many things at once.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What is measured. The first list is how pathlib names these files, the second how git names them.
PATTERNS = ["nanoreward.py", "train_small.py", "workers.py", "data/*.py", "notebooks/*.py"]
PLACES = ["nanoreward.py", "train_small.py", "workers.py", "data/", "notebooks/"]

# The parts of a program that can have a docstring.
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def run(command: list[str], text: str = "") -> str:
    """Run a command in the project, give it `text` to read, and return what it prints.

    A command that fails, for example because there is no such commit, ends this script with the
    message of the command.
    """
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip())
    return done.stdout


def read_sources(ref: str | None) -> dict[str, str]:
    """Return a dictionary from the path of each measured file to its source text.

    The files are those of the working tree, or of the commit `ref` if there is one.
    """
    sources = {}
    if ref is None:
        for pattern in PATTERNS:
            for path in sorted(ROOT.glob(pattern)):
                sources[path.relative_to(ROOT).as_posix()] = path.read_text()
        return sources

    # Some older code is folded into long and crowded lines. Ruff unfolds it first, so that it can
    # be compared with code that has the usual form. The comments that forbid this are removed.
    formatter = [sys.executable, "-m", "ruff", "format", "--line-length", "100", "-"]
    for name in run(["git", "ls-tree", "--name-only", ref, *PLACES]).splitlines():
        if name.endswith(".py"):
            source = run(["git", "show", f"{ref}:{name}"])
            sources[name] = run(formatter, source.replace("  # fmt: skip", ""))
    return sources


def lines_of_words(source: str) -> set[int]:
    """The numbers of the lines that are comments or belong to a docstring."""
    numbers = set()
    # A comment counts if it has the line for itself. The tokenizer knows comments from strings that
    # happen to hold a "#".
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip() == token.string:
            numbers.add(token.start[0])

    # A docstring is the first statement of a module, class or function, if that is a string.
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            numbers.update(range(docstring.lineno, docstring.end_lineno + 1))
    return numbers


def table_row(name: str, source: str) -> str:
    """The row of one file: lines, nodes in a line of code, and two shares in percent."""
    lines = source.splitlines()
    blank = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank.add(number)

    # A blank line inside a docstring counts as blank, so that every line has exactly one kind.
    words = lines_of_words(source) - blank
    code = len(lines) - len(blank) - len(words)
    nodes = len(list(ast.walk(ast.parse(source))))

    # An empty file has no lines, and a file without code has no lines of code. In both cases we
    # must not divide by zero.
    total = max(len(lines), 1)
    density = nodes / max(code, 1)
    percent_blank = 100 * len(blank) / total
    percent_words = 100 * len(words) / total
    return f"{name:28}{total:7}{density:12.1f}{percent_blank:10.1f}{percent_words:10.1f}"


def config_fields(tree: ast.Module) -> set[str]:
    """The distinct names of the fields of all dataclasses that hold settings.

    These are the classes Architecture and Config and all whose name ends in Config. A field is a
    name with a type, such as `width: int = 64`.
    """
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        # Several classes may have a field of the same name. The set counts it once.
        if node.name == "Architecture" or node.name.endswith("Config"):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign):
                    names.add(statement.target.id)
    return names


def main() -> None:
    """Print the table, then what is special about nanoreward.py."""
    ref = sys.argv[1] if len(sys.argv) > 1 else None
    sources = read_sources(ref)
    if ref is None:
        print("The working tree as it stands.\n")
    else:
        print(f"Commit {ref}, after `ruff format` at 100 columns unfolded its lines.\n")
    print(f"{'file':28}{'lines':>7}{'nodes/code':>12}{'% blank':>10}{'% words':>10}")
    for name, source in sources.items():
        print(table_row(name, source))

    # How much a reader must have seen before the first complete method is understood.
    source = sources["nanoreward.py"]
    tree = ast.parse(source)
    print(f"\nnanoreward.py has {len(config_fields(tree))} distinct Config fields.")
    total = len(source.splitlines())
    # A version that has no function of this name gets no line about it.
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "ppo":
            share = 100 * node.end_lineno / total
            print(f"Its function ppo ends at line {node.end_lineno}, {share:.0f} % of the file.")


if __name__ == "__main__":
    main()
