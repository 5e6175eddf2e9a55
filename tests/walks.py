"""Count the files and functions of this project that run in four tasks, which are called walks through the code.

    submit        `mhmoe submit SPEC --dry-run`, from the command line to the printed request
    step          one optimizer step of a small decoder on one rank
    completion    a streamed completion of three tokens, from the HTTP request to the last event
    batch         from lines of raw JSON to the first micro-batch of a training

The figures compare the structure of the code before and after modules move. So this script imports by name only modules
that stay. It finds everything else by the name of its top-level definition, whichever file has it.

    python -m tests.walks                        a table of all walks
    python -m tests.walks --list step            the files and functions of one walk
    python -m tests.walks --tree DIR --json      the figures of another checkout, for programs

A function counts when it is called while the walk is recorded, in any thread that Python starts. Lambdas,
comprehensions and generator expressions count as the function around them. Bodies of modules and classes do not count,
and neither does what a module's body calls when it is imported. A file counts when one of its functions does. Each walk
has a process of its own, so that no walk profits from caches that another one has filled.
"""

import argparse
import ast
import asyncio
import importlib
import inspect
import io
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

from tests.support.ray_in_process import ray_in_this_process

OWN_TREE = Path(__file__).resolve().parent.parent
PACKAGE_FOLDERS = {"mhmoe_ray": Path(), "mhmoe_kernels": Path("kernels")}
"""Folder of the tree that holds each of our packages."""
CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MHMOE_API_KEYS", "MHMOE_DEBUG", "MHMOE_STORAGE")
"""Environment variables that are removed, because they would make a walk enter other functions."""
SETTLING_SECONDS = 0.5
"""Number of seconds without a call of a new function after which the other threads of a walk count as idle."""
PROMPT = "the quick"
NEW_TOKENS = 3


class Function(NamedTuple):
    """A function of our packages, identified by its location and name."""

    file: str
    """Path of the file below the tree."""
    line: int
    """First line of the function, which tells functions of one name apart."""
    name: str
    """Qualified name of the function."""


class Tree:
    """A checkout whose packages this process imports."""

    def __init__(self, root: Path) -> None:
        """Let this process import our packages from a checkout, and index the definitions there.

        Args:
            root: The resolved folder of the checkout.
        """
        self.root = root
        self.packages = {name: root / folder / name for name, folder in PACKAGE_FOLDERS.items()}
        homes = [str(package.parent) for package in self.packages.values()]
        # Python puts the folder of this script first in sys.path. It is removed, because its folders have names that
        # other packages may have too.
        script_folder = Path(__file__).resolve().parent
        other_entries = [entry for entry in sys.path if entry not in homes and Path(entry).resolve() != script_folder]
        sys.path[:] = [*homes, *other_entries]
        for name, package in self.packages.items():
            origin = importlib.import_module(name).__file__
            assert origin is not None
            assert Path(origin) == package / "__init__.py", f"{name} is imported from {origin}, not from {package}"
        self._definitions = self._parsed_definitions()

    def _parsed_definitions(self) -> dict[str, list[tuple[Path, list[str]]]]:
        """Return the file and the parameters of each definition of a top-level function or class, by its name.

        Classes have no parameters.
        """
        definitions = defaultdict(list)
        for package in self.packages.values():
            for file in sorted(package.rglob("*.py")):
                for node in ast.parse(file.read_text()).body:
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                        arguments = node.args
                        every_argument = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                        parameters = [argument.arg for argument in every_argument]
                        definitions[node.name].append((file, parameters))
                    elif isinstance(node, ast.ClassDef):
                        definitions[node.name].append((file, []))
        return definitions

    def definition(self, name: str, parameters: list[str] | None = None) -> Any:
        """Import and return the function or class of this name, whichever module defines it.

        Args:
            name: The name of a top-level function or class.
            parameters: The names of all parameters of the function, to choose one of several with that name; None if
                there is only one.

        Raises:
            LookupError: There is no such definition, or there are several.
        """
        # Files are counted and not definitions, because overloads define a name several times in one file.
        files = sorted({file for file, names in self._definitions[name] if parameters in (None, names)})
        if len(files) != 1:
            raise LookupError(f"{name} has to be defined once, and is defined in {files or 'no file'}")
        [file] = files
        [home] = [p.parent for p in self.packages.values() if file.is_relative_to(p)]
        parts = file.relative_to(home).with_suffix("").parts
        module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        return getattr(module, name)


class Recorder:
    """Recorder of the functions that are called in this process."""

    def __init__(self, tree: Tree) -> None:
        """Watch every thread that starts from now on, and the current thread while recording is on.

        Args:
            tree: The checkout whose functions count.
        """
        self._tree = tree
        self._prefixes = tuple(f"{package}{os.sep}" for package in tree.packages.values())
        self._codes: dict[int, CodeType] = {}
        """Code objects by their identities, since code objects of two files are equal where their text and line are."""
        self._is_recording = False
        self._thread_state = threading.local()
        threading.setprofile(self._profile)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the functions that are called during the block, and afterwards until other threads are idle."""
        self._is_recording = True
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._wait_for_rest()
            self._is_recording = False

    def _wait_for_rest(self) -> None:
        """Wait until other threads enter no new function; without this the figures of a walk would vary."""
        count = -1
        while count < len(self._codes):
            count = len(self._codes)
            time.sleep(SETTLING_SECONDS)

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        """Record a call, if it counts; this is the callback of `sys.setprofile`, which also passes returns."""
        if event not in ("call", "return"):
            return
        code, state = frame.f_code, self._thread_state
        if code.co_name == "<module>" and code.co_filename.startswith(self._prefixes):
            state.module_bodies = getattr(state, "module_bodies", 0) + (1 if event == "call" else -1)
        elif event == "call" and self._is_recording and not getattr(state, "module_bodies", 0):
            self._codes[id(code)] = code

    def functions(self) -> list[Function]:
        """Return the functions of our packages that have been recorded, sorted by file and line."""
        codes = [code for code in self._codes.values() if code.co_filename.startswith(self._prefixes)]
        owners = {file: self._owners(Path(file)) for file in {code.co_filename for code in codes}}
        functions = {owners[code.co_filename][code.co_qualname, code.co_firstlineno] for code in codes}
        return sorted(function for function in functions if function is not None)

    def _owners(self, file: Path) -> dict[tuple[str, int], Function | None]:
        """Return the function that each code object of a file counts as, by its qualified name and first line.

        A lambda that no function surrounds, as in the default of a parameter or in a table, counts as none.
        """
        path = str(file.relative_to(self._tree.root))
        owners: dict[tuple[str, int], Function | None] = {}

        def visit(code: CodeType, owner: Function | None) -> None:
            for constant in code.co_consts:
                if not isinstance(constant, CodeType):
                    continue
                inner_owner = owner
                # Only functions have both flags: the body of a class has neither. The code of the module itself is no
                # constant of other code, so it does not come here.
                if constant.co_flags & inspect.CO_OPTIMIZED and constant.co_flags & inspect.CO_NEWLOCALS:
                    if not constant.co_name.startswith("<"):
                        inner_owner = Function(path, constant.co_firstlineno, constant.co_qualname)
                    owners[constant.co_qualname, constant.co_firstlineno] = inner_owner
                visit(constant, inner_owner)

        visit(compile(file.read_text(), str(file), "exec"), None)
        return owners


def small_run(folder: Path) -> dict[str, Any]:
    """Return the spec of a small training on one worker, with all paths below `folder`."""
    return {
        "name": "walk",
        "storage": str(folder / "runs"),
        "model": {
            "vocab_size": 320,
            "d_model": 32,
            "layers": 2,
            "attention_heads": 4,
            "d_ff": 64,
            "moe": {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 16},
        },
        "data": {
            "sources": {"web": {"path": str(folder / "raw")}},
            "prepared": str(folder / "prepared"),
            "tokenizer": str(folder / "tokenizer.json"),
            "seq_len": 16,
            "validation_fraction": 0.1,
        },
        "train": {"steps": 4, "micro_batches": 2, "micro_batch_size": 2, "lr": 3e-3, "warmup_steps": 2},
    }


def preset_run(folder: Path) -> dict[str, Any]:
    """Return a spec as most users write it: it names a preset and a size, which have to be resolved."""
    return {
        "name": "walk",
        "preset": "mhmoe",
        "size": "tiny",
        "storage": str(folder / "runs"),
        "data": {"sources": {"web": {"path": str(folder / "raw")}}, "prepared": str(folder / "prepared")},
        "cluster": {"workers": 2, "ep": 2},
    }


def walk_submit(_tree: Tree, folder: Path, recorder: Recorder) -> None:
    """Run `mhmoe submit SPEC --dry-run` in this process, without a cluster."""
    from mhmoe_ray.cli.app import main

    file = folder / "spec.yaml"
    file.write_text(json.dumps(preset_run(folder), indent=1))  # JSON is YAML too
    with mock.patch.object(sys, "argv", ["mhmoe", "submit", str(file), "--dry-run"]), recorder.recording():
        try:
            main()
        except SystemExit as request:  # a command that succeeds raises it too
            if request.code:
                raise


def walk_step(tree: Tree, folder: Path, recorder: Recorder) -> None:
    """Train one optimizer step as a run on one worker does."""
    import torch

    from mhmoe_ray.spec import RunSpec

    trainer_class, micro_batch_class = tree.definition("Trainer"), tree.definition("MicroBatch")
    spec = RunSpec.model_validate(small_run(folder))
    mesh = tree.definition("build_mesh")(spec.cluster, ["node"], "cpu")
    trainer = trainer_class(spec, mesh, torch.device("cpu"), 0)
    generator = torch.Generator().manual_seed(1)
    shape = spec.train.micro_batch_size, spec.data.seq_len + 1
    batches = [
        micro_batch_class(
            torch.randint(spec.model.vocab_size, shape, generator=generator),
            torch.ones(shape[0], shape[1] - 1, dtype=torch.bool),
        )
        for _ in range(spec.train.micro_batches)
    ]
    with recorder.recording():
        sums = trainer.accumulate(batches)
        trainer.update(sums)
    assert trainer.step == 1


def walk_completion(tree: Tree, folder: Path, recorder: Recorder) -> None:
    """Request a streamed completion from the HTTP application with our own engine, without a server."""
    import httpx
    import torch

    from mhmoe_ray.spec import RunSpec, ServeSpec

    spec, serve_spec = RunSpec.model_validate(small_run(folder)), ServeSpec()
    torch.set_num_threads(1)
    model = tree.definition("Decoder")(spec.model).requires_grad_(False).eval()
    tree.definition("init_weights")(model, 7)
    tokenizer = small_tokenizer(spec.model.vocab_size)
    end_tokens, token_total = tree.definition("boundaries")(tokenizer).ends, tree.definition("token_count")(tokenizer)
    # The engine starts its thread here. The thread is watched, because the recorder exists already.
    engine = tree.definition("own_engine")(model, end_tokens, token_total, 64, serve_spec)
    details = tree.definition("ModelDetails").from_spec("walk/step_00000001.0", spec.model)
    answerer = tree.definition("Answerer")(engine, tokenizer, None, details)
    app = tree.definition("create_app")(answerer, "walk", serve_spec)
    body = {"model": "walk", "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}

    async def response() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://walk", timeout=60) as client:
            return await client.post("/v1/completions", json=body)

    with recorder.recording():
        answer = asyncio.run(response())
    engine.close()
    assert answer.status_code == 200, answer.text
    assert '"finish_reason":"length"' in answer.text.replace(" ", ""), answer.text
    assert answer.text.rstrip().endswith("data: [DONE]"), answer.text


def walk_batch(tree: Tree, folder: Path, recorder: Recorder) -> None:
    """Prepare raw lines of JSON as a job does, and read the first micro-batch of the training as a worker does.

    The tasks of Ray and Ray Data run in this process, since nothing records what other processes call.
    """
    import torch

    from mhmoe_ray.spec import RunSpec

    spec = RunSpec.model_validate(small_run(folder))
    write_raw_lines(folder / "raw" / "lines.jsonl")
    # The walk does not train a tokenizer: a thread of the tokenizer's library would read the texts, and Python cannot
    # watch that thread.
    small_tokenizer(spec.model.vocab_size).save(str(folder / "tokenizer.json"))
    prepare = tree.definition("prepare", ["spec"])
    training_stream, to_model_samples = tree.definition("training_stream"), tree.definition("to_model_samples")
    micro_batch = tree.definition("micro_batch")
    size = spec.train.micro_batch_size
    with ray_in_this_process(), recorder.recording():
        manifest = prepare(spec)
        batch = next(training_stream(spec, 0, 1).iter_batches(batch_size=size, batch_format="numpy"))
        model_batch = micro_batch(to_model_samples(batch["tokens"], manifest.token_bytes), torch.device("cpu"))
    assert model_batch[0].shape == (size, spec.data.seq_len + 1)


WALKS: dict[str, Callable[[Tree, Path, Recorder], None]] = {
    "submit": walk_submit,
    "step": walk_step,
    "completion": walk_completion,
    "batch": walk_batch,
}


def small_tokenizer(vocab_size: int) -> Any:
    """Return a tokenizer of bytes and a few merges, with the token <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    return tokenizer


def write_raw_lines(file: Path) -> None:
    """Write 200 documents of random words as lines of JSON, the same every time."""
    words = "the quick brown fox jumps over the lazy dog and runs away from here".split()
    generator = random.Random(1)
    documents = [" ".join(generator.choices(words, k=generator.randint(5, 60))) for _ in range(200)]
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def walked_functions(root: Path, walk_name: str) -> list[Function]:
    """Run one walk in this process, which must have run no other, and return the functions that it entered.

    Args:
        root: The resolved folder of the checkout.
        walk_name: A key of `WALKS`.
    """
    output = io.StringIO()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.environ["MHMOE_HOME"] = str(folder / "home")
        for variable in CLUSTER_VARIABLES:
            os.environ.pop(variable, None)
        tree = Tree(root)
        recorder = Recorder(tree)
        try:
            with redirect_stdout(output), redirect_stderr(output):
                WALKS[walk_name](tree, folder, recorder)
        except BaseException:
            sys.stderr.write(output.getvalue())
            raise
    return recorder.functions()


def functions_by_file(functions: Iterable[Function]) -> dict[str, list[Function]]:
    """Return the functions by their file."""
    files = defaultdict(list)
    for function in functions:
        files[function.file].append(function)
    return files


def main() -> None:
    """Run the walks that the command line selects, and print the figures."""
    parser = argparse.ArgumentParser(description="Count the files and functions of ours that four walks enter.")
    parser.add_argument("--tree", type=Path, default=OWN_TREE, help="Checkout to measure; by default this script's.")
    parser.add_argument("--json", action="store_true", help="Print JSON, with the functions of each file.")
    parser.add_argument("--list", choices=WALKS, metavar="WALK", help="Print the files and functions of one walk.")
    options = parser.parse_args()
    root, walk_names = options.tree.resolve(), [options.list] if options.list else list(WALKS)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        results = pool.starmap(walked_functions, [(root, name) for name in walk_names], chunksize=1)
    files_of_walks = {name: functions_by_file(functions) for name, functions in zip(walk_names, results, strict=True)}
    if options.json:
        figures = {
            name: {
                "files": len(files),
                "functions": sum(map(len, files.values())),
                "entered": {file: [f"{f.name}:{f.line}" for f in functions] for file, functions in files.items()},
            }
            for name, files in files_of_walks.items()
        }
        print(json.dumps(figures, indent=1))
    elif options.list:
        for file, functions in files_of_walks[options.list].items():
            print(file)
            for function in functions:
                print(f"    {function.line:4} {function.name}")
    else:
        print(f"{'walk':<12}{'files':>7}{'functions':>11}")
        for name, files in files_of_walks.items():
            print(f"{name:<12}{len(files):7}{sum(map(len, files.values())):11}")


if __name__ == "__main__":
    main()
