"""Check of the language of the code: docstrings, names and commit subjects. `make check` runs it as
`python -m tests.language`; CONTRIBUTING.md has the rules.

A docstring's first line starts with a verb or a noun, and a name carries a noun: `matching_blocks`, not `found`. The
words listed below are neither, so the check finds the common violations of these rules, but not all. Docstrings of the
packages also have a budget, and sections only where callers or plug-ins of others depend on a signature.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PROJECT = Path(__file__).parents[1]

# Pronouns, conjunctions, prepositions and adverbs. A docstring that starts with one of them is a clause of a sentence
# whose rest the reader does not have.
FRAGMENT_STARTS = frozenset(
    """above after also among and around as at because before beside between beyond but by from hence here how
    in inside into it its neither never no nobody none nor not nothing now of off on once only or out
    outside over since so still such than that their them then they this those though through thus till to
    too under unless until up upon what whatever when whenever where wherever whether which whichever while
    who whoever whom whose why with within without yet""".split()
)

# Words that bring no noun into a name. If a name has no others, only its author knows what it stands for.
VAGUE_WORDS = frozenset(
    """about above added after again all alone along any anyone anything apart around asked at away before
    began begun below beside beyond both by called came chosen counted done down drawn each elsewhere ended
    every everybody everyone everything far few fewer fewest first found given gone got had happened has
    have heard held here how into its kept known last late later least left less like listed looked lost
    made many meant mine missing more most moved named near nearest needed new nobody none not nothing now
    of off old on once one only other others ours over own place places put reached refused rest said same
    saw says seen sent several shown since so some something started still stopped such taken than that
    theirs then there these they this those through to together told until up used waited wanted was what
    when where which while who whole whom whose why with within without written wrong yet""".split()
)

EXCEPTIONS = {
    ("mhmoe_ray/api/run.py", "now"): "a parameter of the Python interface, like `mhmoe stop --now`",
    ("mhmoe_ray/api/run.py", "until"): "a parameter of the Python interface, like `mhmoe resume --until`",
    ("mhmoe_ray/data/prepare/work.py", "done"): "a key of progress.json",
    ("mhmoe_ray/planner/match.py", "by"): "a key of specs",
    ("mhmoe_ray/planner/match.py", "to"): "a key of specs",
    ("mhmoe_ray/runs/sweeps.py", "wanted"): "a key of a sweep's orders",
    ("mhmoe_ray/serving/app.py", "again"): "a key of the arguments of a deployed application",
    ("mhmoe_ray/runs/start.py", "how"): "a key of start.json",
    ("mhmoe_ray/spec/moe.py", "every"): "a key of specs",
    ("mhmoe_ray/spec/train.py", "at"): "a key of specs",
    ("mhmoe_ray/spec/start.py", "how"): "a key of specs",
    ("mhmoe_ray/spec/sweep.py", "only"): "a key of sweeps",
    ("mhmoe_ray/train/watchdog.py", "began"): "a key of the event `started`",
}
"""Vague names that stay because users write them or files contain them; each value says where the name is used."""

PACKAGES = ("mhmoe_ray", "kernels")
LARGEST_DOCSTRING_SHARE = 0.19
"""Largest share of docstrings in the lines of the packages."""
MOST_DOCSTRING_WORDS = 2.8
"""Largest number of words of docstrings for each line of code in the packages."""
SECTION = re.compile(r"^(?:Args|Returns|Raises|Yields):$", re.M)
INTERFACES = frozenset(("MhmoeError", "fused_routing", "run_experts", "run_sorted_experts"))
"""Interfaces besides the public API, protocols and abstract classes: classes and functions with sections."""

# Only commits since this time are checked, because subjects of older ones have another form. It is a time and not a
# hash, because a shallow clone may lack the commit of the hash.
FIRST_COMMIT_TIME = "2026-11-28T17:06:00Z"
SUBJECT = re.compile(r"[a-z][\w, /.-]*: [a-z`][^\n]*[^.\n]")


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that a module binds: variables, arguments, attributes, functions,
    classes and import aliases."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case _:
                pass


def is_vague(name: str) -> bool:
    """Return whether every word of `name` is a vague one."""
    if name.startswith("__"):
        return False
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().strip("_").split("_")
    return all(word in VAGUE_WORDS for word in words)


def docstring_starts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the first line of each docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring.splitlines()[0]


def is_fragment(first_line: str) -> bool:
    """Return whether the first word of a docstring is one of `FRAGMENT_STARTS`."""
    word = re.match(r"[A-Za-z']*", first_line)
    return word is not None and word[0].lower() in FRAGMENT_STARTS


def documented_parameters(docstring: str) -> Iterator[str]:
    """Yield the names that the section `Args:` of a docstring describes."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.M)
    for names in re.findall(r"^    ([\w*]+(?:, [\w*]+)*):", section[1] if section else "", re.M):
        yield from names.replace("*", "").split(", ")


def unknown_parameters(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line of each function whose docstring describes a parameter that it does not have, and that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            for name in documented_parameters(ast.get_docstring(node) or ""):
                if name not in names:
                    yield node.lineno, name


def misplaced_sections(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each definition whose docstring has sections although it is no interface."""

    def visit(node: ast.AST, is_interface: bool) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            is_inner = is_interface
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                bases = {ast.unparse(base) for base in getattr(child, "bases", [])}
                is_inner |= child.name in INTERFACES or not bases.isdisjoint({"ABC", "Protocol"})
                if not is_inner and SECTION.search(ast.get_docstring(child) or ""):
                    yield child.lineno, child.name
            yield from visit(child, is_inner)

    if path.startswith(PACKAGES) and not path.startswith("mhmoe_ray/api/"):
        yield from visit(tree, False)


def imports_of_tests(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each test file from which a module imports by `from`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2].startswith("test_"):
            yield node.lineno, node.module or ""


def docstring_budget(sources: Mapping[str, str]) -> tuple[float, float]:
    """Return the share of docstrings in the lines of files, and their words for each line of code.

    Strings below attributes count as docstrings. Blank lines and comments are no lines of code.
    """
    line_count, docstring_count, word_count, code_count = 0, 0, 0, 0
    for source in sources.values():
        docstring_lines: set[int] = set()
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text)), lineno=first_line, end_lineno=int(last_line)):
                    docstring_lines |= set(range(first_line, last_line + 1))
                    word_count += len(text.split())
        lines = source.splitlines()
        line_count += len(lines)
        docstring_count += len(docstring_lines)
        code_count += sum(
            number not in docstring_lines and line.strip() != "" and not line.lstrip().startswith("#")
            for number, line in enumerate(lines, 1)
        )
    return docstring_count / line_count, word_count / code_count


def problems_of_budget(sources: Mapping[str, str]) -> Iterator[str]:
    """Yield one line of text for each figure of `docstring_budget` that is above its limit."""
    share, words = docstring_budget(sources)
    if share > LARGEST_DOCSTRING_SHARE:
        yield f"docstrings are {share:.1%} of the lines, and {LARGEST_DOCSTRING_SHARE:.0%} is the limit"
    if words > MOST_DOCSTRING_WORDS:
        yield f"docstrings have {words:.2f} words for each line of code, and {MOST_DOCSTRING_WORDS} is the limit"


def problems_of_file(path: str, source: str) -> Iterator[str]:
    """Yield one line of text for each docstring and each name of a file that breaks a rule.

    Args:
        path: The path of the file below the project, which the lines name.
        source: The text of the file.
    """
    tree = ast.parse(source)
    for line, first_line in docstring_starts(tree):
        if is_fragment(first_line):
            yield f"{path}:{line}: the docstring is a fragment: {first_line}"
    for line, name in unknown_parameters(tree):
        yield f"{path}:{line}: the docstring describes a parameter that does not exist: {name}"
    for line, name in imports_of_tests(tree):
        yield f"{path}:{line}: it imports from {name}; shared helpers lie beside the tests or in tests/support"
    for line, name in misplaced_sections(path, tree):
        yield f"{path}:{line}: {name} is no interface, so its docstring has no sections"
    for line, name in bound_names(tree):
        if is_vague(name) and (path, name) not in EXCEPTIONS:
            yield f"{path}:{line}: the name has no noun: {name}"


def stale_exceptions(sources: Mapping[str, str]) -> Iterator[str]:
    """Yield one line of text for each entry of `EXCEPTIONS` whose name the file does not bind.

    Args:
        sources: The texts of all files that are checked, by their paths below the project.
    """
    for path, name in EXCEPTIONS:
        if path not in sources or name not in {bound_name for _, bound_name in bound_names(ast.parse(sources[path]))}:
            yield f"{path}: EXCEPTIONS names {name}, which is not bound there"


def commit_subjects() -> list[str]:
    """Return the subjects of the commits since `FIRST_COMMIT_TIME`; none in a source archive, which has no history."""
    if not (PROJECT / ".git").exists():
        return []
    command = ["git", "log", "--no-merges", "--format=%s", f"--since={FIRST_COMMIT_TIME}"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()


def is_good_subject(subject: str) -> bool:
    """Return whether a commit subject is `area: imperative`, of at most 72 characters and without a full stop."""
    return len(subject) <= 72 and SUBJECT.fullmatch(subject) is not None


def main() -> None:
    """Print every problem of the code and of commit subjects; exit with 1 if there is one, else with 0."""
    sources = {
        path.relative_to(PROJECT).as_posix(): path.read_text()
        for folder in ("mhmoe_ray", "kernels", "jobs", "tests")
        for path in sorted((PROJECT / folder).rglob("*.py"))
    }
    problems = [problem for path, source in sources.items() for problem in problems_of_file(path, source)]
    problems += problems_of_budget({path: source for path, source in sources.items() if path.startswith(PACKAGES)})
    problems += stale_exceptions(sources)
    problems += [
        f"commit subject is not `area: imperative` of at most 72 characters: {subject}"
        for subject in commit_subjects()
        if not is_good_subject(subject)
    ]
    print(*problems, sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
