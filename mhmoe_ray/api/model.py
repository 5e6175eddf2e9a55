"""A model in this process: generate text with the serving engine, and compute logits."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, Unpack, overload

from tokenizers import Tokenizer

from mhmoe_ray.api.checkpoints import (
    Checkpoint,
    CheckpointName,
    find_model_folder,
    path_text,
    pick_checkpoint,
    refuse_checkpoint,
)
from mhmoe_ray.api.defaults import OnNote, ignore_note
from mhmoe_ray.api.engine_thread import CONCURRENCY, Answer, EngineThread, close_abandoned_engine
from mhmoe_ray.api.generation import (
    Messages,
    Prompt,
    SamplingArguments,
    TokenIds,
    are_token_ids,
    checked_messages,
    checked_sampling,
    checked_text,
    prompt_elements,
    split_prompts,
)
from mhmoe_ray.api.model_source import ModelSource, checkpoint_source, folder_source
from mhmoe_ray.api.run import Run
from mhmoe_ray.checkpoint.manifest import is_committed, read_manifest
from mhmoe_ray.data.tokenizer import token_count
from mhmoe_ray.errors import ServeError
from mhmoe_ray.runs.directory import RunDir
from mhmoe_ray.serving.answer import Answerer, AnswerPiece, ModelDetails, check_biases, check_length
from mhmoe_ray.serving.engine import EngineError, Request
from mhmoe_ray.serving.load import check_generates, check_predicts, token_limits
from mhmoe_ray.serving.sampling import SamplingParams
from mhmoe_ray.spec import ModelSpec, ServeSpec
from mhmoe_ray.storage import default_storage

if TYPE_CHECKING:
    from torch import Tensor

    from mhmoe_ray.model.decoder import Decoder

Device = Literal["cpu", "cuda"]


def load(
    model: Run | Checkpoint | str | os.PathLike[str],
    checkpoint: CheckpointName | None = None,
    device: Device = "cpu",
    *,
    threads: int | None = None,
    storage: str | os.PathLike[str] | None = None,
    on_note: OnNote = ignore_note,
) -> "LoadedModel":
    """Return a model that computes in this process, and that should be closed after use.

    Its weights are loaded when they are first needed.

    Args:
        model: a run, its id, the start of its id, or its path; RUN@STEP; a checkpoint or its folder; a folder in
            Hugging Face's layout; or hf:ORGANIZATION/NAME.
        checkpoint: one of the run's checkpoints, its name or its step; None for the newest.
        device: device to compute on.
        threads: number of threads that generate on a CPU; None for torch's default.
        storage: folder that holds run directories; by default MHMOE_STORAGE, else `runs`.
        on_note: callback that gets a warning for each newer checkpoint that is damaged and therefore skipped.

    Raises:
        RunError, CheckpointError: there is no such run, checkpoint or model, or it is damaged.
        DataError: the tokenizer is missing or does not fit the model.
        ServeError: the chat template is invalid, or there is no such device.
    """
    folder = find_model_folder(model, default_storage() if storage is None else path_text(storage))
    if isinstance(folder, RunDir):
        path, manifest = pick_checkpoint(folder, checkpoint, verify_hashes=True, on_note=on_note)
        return LoadedModel(checkpoint_source(path, manifest), device, threads)
    refuse_checkpoint(checkpoint, path_text(model))
    if is_committed(folder):
        path = folder.absolute()
        return LoadedModel(checkpoint_source(path, read_manifest(path, parts=("weights",))), device, threads)
    return LoadedModel(folder_source(Path(str(folder))), device, threads)


class LoadedModel:
    """A model that computes in this process. As a context manager, it closes itself at the end."""

    def __init__(self, source: ModelSource, device: Device = "cpu", threads: int | None = None) -> None:
        """Create the model without loading its weights; the function `load` finds a stored model by its name. An
        unknown or missing device is a ServeError."""
        import torch

        if device not in ("cpu", "cuda"):
            raise ServeError(f"device {device}", "a model computes on a CPU or on a GPU", 'choose "cpu" or "cuda"')
        if device == "cuda" and not torch.cuda.is_available():
            fix = 'choose "cpu", or install torch for CUDA'
            raise ServeError(f"device {device}", "torch finds no GPU in this process", fix)
        self._source, self._device = source, device
        self._threads = threads or torch.get_num_threads()
        self._lock = Lock()
        self._decoder: Decoder | None = None
        self._engine: EngineThread | None = None
        self._finalizer: weakref.finalize[..., LoadedModel] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"LoadedModel({self.name!r}, device={self._device!r})"

    @property
    def name(self) -> str:
        """The run's id and the checkpoint's name, or the name of the folder."""
        return self._source.name

    @property
    def spec(self) -> ModelSpec:
        """The `model` section of a spec that describes this model: its sizes and options."""
        return self._source.model

    @property
    def seq_len(self) -> int:
        """Largest number of tokens of prompt and answer together."""
        return self._source.seq_len

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model. For prompts, use `encode`, which adds the start token if the model expects it."""
        return self._source.encoder.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt as the model reads them.

        Args:
            prompt: a text; a conversation, as a list of messages; or token ids, which stay as they are.

        Raises:
            ServeError: the model has no chat template, or the template does not accept these messages; a message lacks
                a role or a content; or a token id is not in the model's vocabulary.
        """
        if isinstance(prompt, str):
            return self._source.encoder.encode(checked_text(prompt))
        elements = prompt_elements(prompt)
        if are_token_ids(elements):
            ids = [int(token) for token in elements]
            if min(ids) < 0 or max(ids) >= self.spec.vocab_size:
                reason = f"it has other token ids than those of the model, 0 to {self.spec.vocab_size - 1}"
                raise ServeError("the prompt", reason, "give tokens of the model")
            return ids
        messages = checked_messages(elements)
        if self._source.template is None:
            reason = "it has no chat template, so it cannot answer conversations"
            fix = "give a text (`mhmoe generate`), or fine-tune it on conversations as jobs/chat.yaml does"
            raise ServeError("the model", reason, fix)
        return self._source.encoder.encode_chat(self._source.template, messages)

    @overload
    def generate(self, prompt: Prompt, **sampling: Unpack[SamplingArguments]) -> Answer: ...

    @overload
    def generate(
        self, prompt: list[str] | Sequence[Messages] | Sequence[TokenIds], **sampling: Unpack[SamplingArguments]
    ) -> list[Answer]: ...

    def generate(
        self, prompt: Prompt | Sequence[Prompt], **sampling: Unpack[SamplingArguments]
    ) -> Answer | list[Answer]:
        """Return the answer to a prompt, or the answers to a list of prompts, which are computed together.

        On a CPU, an answer is bit-identical whether its prompt is computed alone or together with others.

        Args:
            prompt: a text to continue; a conversation, as a list of messages like {"role": "user", "content": "..."};
                token ids, before which no start token is added; or a list of such prompts.
            sampling: sampling parameters by name, with these defaults:
                max_tokens=128: largest number of tokens of an answer. Prompt and answer have at most `seq_len` tokens
                    in any case; both limits give the finish reason "length".
                temperature=1.0: sampling temperature; 0 takes the most likely token each time.
                top_p=1.0: total probability of the smallest set of most likely tokens to draw from.
                top_k=0: number of most likely tokens to draw from; 0 draws from all.
                min_p=0.0: smallest probability of a token to draw from, as a share of the most likely token's.
                presence_penalty=0.0: amount subtracted from the logit of each token of the answer, -2 to 2.
                frequency_penalty=0.0: amount subtracted for each time that the answer has the token, -2 to 2.
                repetition_penalty=1.0: amount that divides positive logits and multiplies negative ones of tokens of
                    prompt and answer, 0.01 to 100.
                min_tokens=0: smallest number of tokens of the answer, unless a stop text ends it.
                ignore_eos=False: whether the answer goes on after a token that ends a document.
                logit_bias={}: amounts added to the logits of tokens, -100 to 100, by token id.
                seed=None: seed of the random draws, from which each prompt of a list derives its own; None for a random
                    one. Equal seeds give equal answers.
                stop=(): text that ends an answer and is not part of it, or a list of such texts.
                logprobs=None: number of most likely tokens to score beside each token; `stream` returns the scores.

        Raises:
            ServeError: a prompt does not fit, a parameter is out of its range, the model cannot generate text or has no
                chat template, or the engine failed.
        """
        prompts, is_single = split_prompts(prompt)
        params = checked_sampling(**sampling)
        requests = [self._request(item, params.for_answer(index)) for index, item in enumerate(prompts)]
        with self._report_engine_errors():
            answers = self._start_engine().answer_all(requests)
        return answers[0] if is_single else answers

    def stream(self, prompt: Prompt, **sampling: Unpack[SamplingArguments]) -> Iterator[AnswerPiece]:
        """Return the pieces of the answer to a prompt, each as soon as it is generated; for arguments see `generate`.

        The last piece has the finish reason. Closing the iterator early ends the computation.

        Raises:
            ServeError: as in `generate`; a failure of the engine is raised when the next piece is asked for.
        """
        return self._pieces(self._request(prompt, checked_sampling(**sampling)))

    def _pieces(self, request: Request) -> Iterator[AnswerPiece]:
        """Yield the pieces of the answer to a request. The generator keeps the model and its engine alive."""
        with self._report_engine_errors():
            yield from self._start_engine().pieces(request)

    def _request(self, prompt: Prompt, sampling: SamplingParams) -> Request:
        check_generates(self.spec)
        ids = self.encode(prompt)
        check_length(ids, has_answer=True, seq_len=self.seq_len)
        check_biases(sampling, token_count(self.tokenizer))
        return Request(tuple(ids), sampling)

    def logits(self, text: str | TokenIds, domain: str | None = None) -> "Tensor":
        """Return the logits for the next token after each token of a text, computed in float32.

        Args:
            text: a text, before which the start token is added if the model expects it; or token ids, which stay as
                they are.
            domain: name of the text's domain, for a model with router `domain`; None for any other.

        Returns:
            Tensor of shape (tokens, vocabulary) on the device of the model.

        Raises:
            ServeError: the model is closed or is not a decoder, the text does not fit, a token id is not in the
                vocabulary, or the domain is missing or unknown.
        """
        import torch

        check_predicts(self.spec)
        if not isinstance(text, str) and not are_token_ids(prompt_elements(text)):
            raise ServeError("the prompt", "it is neither a text nor token ids", "`encode` a conversation first")
        ids = self.encode(text)
        check_length(ids, has_answer=False, seq_len=self.seq_len)
        expert = _expert_of(self.spec, domain)
        decoder = self._load_decoder()
        token_1T = torch.tensor([ids], device=self._device)
        with torch.no_grad():
            output = decoder(
                token_1T,
                document_BT=torch.zeros_like(token_1T) if self.spec.document_masks else None,
                domain_B=None if expert is None else token_1T.new_tensor([expert]),
            )
        logits_TV: Tensor = output.logits_BTV[0]
        return logits_TV

    def close(self) -> None:
        """End the engine and release the weights. A closed model cannot be used any more."""
        with self._lock:
            self._is_closed = True
            engine, self._engine, self._decoder = self._engine, None, None
        if self._finalizer is not None:
            self._finalizer.detach()
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._is_closed:
            raise ServeError(f"model {self.name}", "it is closed", "load it again")

    @contextmanager
    def _report_engine_errors(self) -> Iterator[None]:
        """Turn an error of the engine, or the close of the model meanwhile, into a ServeError."""
        try:
            yield
        except EngineError as e:
            self._require_open()
            raise ServeError("the engine", str(e), "try another checkpoint, or compute on the CPU") from e

    def _load_decoder(self) -> "Decoder":
        with self._lock:
            self._require_open()
            if self._decoder is None:
                self._decoder = self._source.load_decoder().to(self._device)
            return self._decoder

    def _start_engine(self) -> EngineThread:
        with self._lock:
            self._require_open()
            engine = self._engine
            if engine is None:
                # The engine loads a copy of the weights for itself, because it changes its model in place: on a CPU,
                # for example, it packs the weights.
                engine = self._engine = EngineThread(_answerer_builder(self._source, self._device, self._threads))
                # An engine must be closed before the process ends (`Engine.close`), even if nobody closes the model.
                self._finalizer = weakref.finalize(self, close_abandoned_engine, engine)
        try:
            # This waits until the engine has started, which may take long, and raises the error if it fails.
            _ = engine.answerer
        except Exception:
            with self._lock:
                # Another thread may have closed the model meanwhile, or started the engine again.
                if self._engine is engine:
                    self._engine = None
            raise
        return engine


def _answerer_builder(source: ModelSource, device: Device, threads: int) -> Callable[[], Answerer]:
    """Return a function that loads the weights of a model and starts a serving engine with them."""

    def build() -> Answerer:
        import torch

        from mhmoe_ray.serving.engine.torch_engine import own_engine

        # This limits only the current thread, in which answers arrive. OpenMP threads that it starts would slow
        # down those of the engine (see `TorchEngine`).
        torch.set_num_threads(1)
        gpus = int(device == "cuda")
        settings = ServeSpec(
            max_concurrency=CONCURRENCY,
            cpus_per_replica=threads,
            gpus_per_replica=gpus,
            # None gives the KV cache room for `max_concurrency` prompts of full length; on a CPU, parts that are not
            # used take no memory. On a GPU it has room for one prompt of full length or for several short ones.
            cache_tokens=source.seq_len if gpus else None,
        )
        tokenizer = source.encoder.tokenizer
        stop_token_ids, tokenizer_size = token_limits(tokenizer, source.ends)
        engine = own_engine(source.load_decoder(), stop_token_ids, tokenizer_size, source.seq_len, settings)
        details = ModelDetails.from_spec(source.name, source.model)
        return Answerer(engine, tokenizer, source.template, details, source.encoder.adds_start)

    return build


def _expert_of(model: ModelSpec, domain: str | None) -> int | None:
    """Return the index of a domain's expert; None for a model whose router does not use domains. A missing, unknown or
    unused domain is a ServeError."""
    names = model.moe.domains if model.moe is not None else None
    if names is None:
        if domain is not None:
            raise ServeError(f"domain {domain}", "the model's router does not use domains", "leave it out")
        return None
    if domain not in names:
        reason = "the model's router needs the domain of a text, and this is none of its domains"
        raise ServeError(f"domain {domain}", reason, f"choose from {', '.join(names)}")
    return names.index(domain)
