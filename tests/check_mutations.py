"""Break one line at a time and see a test go red: python tests/check_mutations.py [words of a row]

The rows stand in tests/mutations.md: | file | line as it is | line broken | test that must fail |.
Each one is tried in a copy of the tree. Exit 1 if a broken line stays green, or if a row no longer
fits the source.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rows():
    """The rows of tests/mutations.md, each as its four cells."""
    for line in (ROOT / "tests" / "mutations.md").read_text().splitlines():
        cells = [
            c.strip().strip("`").replace("\\|", "|") for c in line.strip().strip("|").split(" | ")
        ]
        if line.startswith("| `") and len(cells) == 4:
            yield cells


def survives(copy, file, old, new, test):
    """None if the test went red, else why not."""
    source = (ROOT / file).read_text()
    if source.count(old) != 1:
        return f"stands {source.count(old)} times in {file}"
    (copy / file).write_text(source.replace(old, new))
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]
    code = subprocess.run(argv, cwd=copy, capture_output=True).returncode
    (copy / file).write_text(source)
    return None if code == 1 else f"pytest ended with {code}"


def main():
    """Try all rows, or those that hold all the given words."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__")
        )
        for file, old, new, test in rows():
            if all(word in f"{file} {old} {new} {test}" for word in sys.argv[1:]):
                why = survives(copy, file, old, new, test)
                failed += why is not None
                color = "red  " if why is None else "GREEN"
                print(f"{color}  {new[:70]:70}  {test}  {why or ''}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
