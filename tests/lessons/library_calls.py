"""Read code without running it: does each library call still fit what is installed?

`complaints(code)` follows the imports of a piece of code to the installed objects and
compares the keywords, and the number of positional arguments, of each call with the
signature there. Classes that override a library's method must take what it is called
with. What cannot be decided from the text alone is left to the tests that run it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

LIBRARIES = {
    *("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes"),
    *("accelerate", "course_utils"),
}
# Calls with **kwargs: which further keywords they take, and how we know.
LOADING = {"config", "dtype", "use_safetensors", "gguf_file", "quantization_config"}
LOADING |= {"device_map", "num_labels", "attn_implementation"}
ALLOWED: dict[str, tuple[set[str], str]] = {
    r"transformers\.Auto\w+\.from_pretrained": (
        LOADING,
        "handed to the model's own from_pretrained; test_models loads with each",
    ),
    r"transformers\.Auto\w+\.from_config": (
        {"dtype", "attn_implementation"},
        "read by PreTrainedModel._from_config",
    ),
    r"peft\.PeftModel\w*\.from_pretrained": (
        {"torch_device", "low_cpu_mem_usage"},
        "handed to load_adapter",
    ),
    r"transformers\.PreTrainedTokenizerFast": (
        {"tokenizer_object", "chat_template"},
        "read from **kwargs; test_models makes a tokenizer with both",
    ),
}
# Calls whose **kwargs go to other signatures: those keywords are checked there.
PEFT_FIELDS = tuple(
    f"peft.{name}"
    for name in (
        *("LoraConfig", "IA3Config", "PromptTuningConfig", "PrefixTuningConfig"),
        *("PromptEncoderConfig", "AdaLoraConfig", "LoHaConfig", "VeraConfig"),
    )
)
FORWARDS: dict[str, tuple[str, ...]] = {
    "course_utils.training.sft_config": ("trl.SFTConfig",),
    "course_utils.training.training_arguments": ("transformers.TrainingArguments",),
    "course_utils.memory.estimate.t4_plan": (
        "course_utils.memory.estimate.estimate_memory",
        *PEFT_FIELDS,
    ),
    "course_utils.memory.estimate.estimate_memory": PEFT_FIELDS,
    "course_utils.parameters.adapter_parameters": PEFT_FIELDS,
    "torch.nn.LSTM": ("torch.nn.RNNBase",),
    "torch.nn.GRU": ("torch.nn.RNNBase",),
    "peft.optimizers.create_loraplus_optimizer": ("torch.optim.AdamW",),
    "transformers.GenerationMixin.generate": (
        "transformers.GenerationConfig",
        "transformers.LlamaForCausalLM.forward",
    ),
}
# Methods that are known by their name, whatever the object before the dot is.
METHODS = {
    "generate": "transformers.GenerationMixin.generate",
    "apply_chat_template": "transformers.PreTrainedTokenizerBase.apply_chat_template",
    "merge_and_unload": "peft.tuners.lora.LoraModel.merge_and_unload",
    "resize_token_embeddings": "transformers.PreTrainedModel.resize_token_embeddings",
    "set_attn_implementation": "transformers.PreTrainedModel.set_attn_implementation",
}
CLASSES_OF = {  # what our own functions return, where a lesson calls its methods
    "course_utils.models.load_model": "transformers.PreTrainedModel",
    "course_utils.models.load_tokenizer": "transformers.PreTrainedTokenizerBase",
    "course_utils.data.load_examples": "datasets.Dataset",
    "peft.get_peft_model": "peft.PeftModelForCausalLM",
}


@functools.cache
def find(path: str) -> Any:
    """Return the object of a dotted path; raises AttributeError or ImportError."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError as error:
            if not path.startswith(error.name or "?"):
                raise
            continue
        for name in parts[size:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(f"no module {parts[0]}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a callable takes: names of keywords, count of positions, and the rest."""

    keywords: frozenset[str]
    positions: float
    open: bool  # it has **kwargs


def shape(path: str) -> Shape | None:
    """Return what the callable of a path takes; None where nothing says it."""
    found = find(path)
    if path == "transformers.GenerationConfig":  # it lists no argument by name
        return Shape(frozenset(vars(found())), 0, False)
    plain = found.__func__ if inspect.ismethod(found) else found
    try:
        parameters = list(inspect.signature(plain).parameters.values())
    except (TypeError, ValueError):
        return _stub_shape(path, found)
    # Some of transformers' class methods are wrapped and have lost their `cls`.
    if parameters and plain is not found and parameters[0].name == "cls":
        parameters = parameters[1:]
    elif inspect.isfunction(found) and isinstance(_owner(path), type):
        static = inspect.getattr_static(_owner(path), path.rsplit(".", 1)[1], None)
        if not isinstance(static, staticmethod) and parameters:
            parameters = parameters[1:]  # self
    kinds = inspect.Parameter
    named = {kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY}
    placed = {kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD}
    rest = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    return Shape(
        frozenset(p.name for p in parameters if p.kind in named),
        float("inf") if rest else sum(p.kind in placed for p in parameters),
        any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )


def _owner(path: str) -> Any:
    return find(path.rpartition(".")[0]) if "." in path else None


@functools.cache
def _torch_stubs() -> dict[str, list[ast.arguments]]:
    import torch

    file = Path(torch.__file__).parent / "_C" / "_VariableFunctions.pyi"
    stubs: dict[str, list[ast.arguments]] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            stubs.setdefault(node.name, []).append(node.args)
    return stubs


def _stub_shape(path: str, found: Any) -> Shape | None:
    """Functions written in C++: their stubs, else the first line of their docs."""
    if path.count(".") == 1 and path.startswith("torch."):
        overloads = _torch_stubs().get(path.rpartition(".")[2])
    else:
        text = re.match(r"\s*[\w.]*\((.*?)\)", inspect.getdoc(found) or "", re.DOTALL)
        try:
            overloads = text and [ast.parse(f"def f({text[1]}): ...").body[0].args]
        except SyntaxError:
            overloads = None
    if not overloads:
        return None
    every = [[*a.posonlyargs, *a.args, *a.kwonlyargs] for a in overloads]
    rest = any(a.vararg for a in overloads)
    # Sizes may come one by one: torch.zeros(2, 3).
    rest = rest or any(x.arg == "size" for row in every for x in row)
    return Shape(
        frozenset(x.arg for row in every for x in row),
        float("inf") if rest else max(len(a.posonlyargs + a.args) for a in overloads),
        any(a.kwarg for a in overloads),
    )


class _Reader(ast.NodeVisitor):
    """Follows names to dotted paths, scope by scope, and checks calls on the way."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, str | None]] = [{}]
        self.dicts: dict[str, ast.Dict] = {}
        self.kinds: list[dict[str, str | None]] = [{}]
        self.bad: list[str] = []
        self.seen: list[str] = []
        self.unknown: list[str] = []

    # --- names -------------------------------------------------------------------

    def path(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            for scope in reversed(self.scopes):
                if node.id in scope:
                    return scope[node.id]
        elif isinstance(node, ast.Attribute):
            start = self.path(node.value)
            return f"{start}.{node.attr}" if start else None
        return None

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] in LIBRARIES:
                self._known(node, alias.name)
                name = alias.asname or alias.name.split(".")[0]
                self.scopes[-1][name] = alias.name if alias.asname else name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level or module.split(".")[0] not in LIBRARIES:
            return
        for alias in node.names:
            path = f"{module}.{alias.name}"
            if self._known(node, path):
                self.scopes[-1][alias.asname or alias.name] = _home(path)

    def _known(self, node: ast.AST, path: str) -> bool:
        try:
            find(path)
        except (ImportError, AttributeError) as error:
            self.bad.append(f"line {node.lineno}: {path} is not there ({error})")
            return False
        return True

    def _function(self, node: Any) -> None:
        # Defaults and decorators belong to the scope outside.
        for part in [*node.decorator_list, node.args]:
            self.visit(part)
        arguments = node.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        names += [a for a in (arguments.vararg, arguments.kwarg) if a]
        bound = {a.arg for a in names}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                bound.add(inner.id)
        self.scopes.append(dict.fromkeys(bound))
        self.kinds.append(dict.fromkeys(bound))
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()
        self.kinds.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        kind = self.kind(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.scopes[-1][target.id] = None
                self.kinds[-1][target.id] = kind
                if isinstance(node.value, ast.Dict):
                    self.dicts[target.id] = node.value

    def kind(self, node: ast.AST) -> str | None:
        """The class of what an expression makes, where the text says it."""
        if isinstance(node, ast.Call):
            path = self.path(node.func)
            if path is None:
                return None
            if path in CLASSES_OF:
                return CLASSES_OF[path]
            try:
                return path if isinstance(find(path), type) else None
            except (ImportError, AttributeError):
                return None
        if isinstance(node, ast.Name):
            for scope in reversed(self.kinds):
                if node.id in scope:
                    return scope[node.id]
        return None

    # --- classes -----------------------------------------------------------------

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [p for p in map(self.path, node.bases) if p]
        for statement in node.body:
            if not isinstance(statement, ast.FunctionDef):
                continue
            for base in bases:
                self._override(node.name, statement, base)
        self.generic_visit(node)

    def _override(self, name: str, ours: ast.FunctionDef, base: str) -> None:
        theirs = getattr(find(base), ours.name, None)
        if ours.name.startswith("__") or not inspect.isfunction(theirs):
            return
        wanted = shape(f"{base}.{ours.name}")
        given = ours.args
        names = {a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs]}
        missing = (wanted.keywords if wanted else frozenset()) - names
        if missing and not given.kwarg and not given.vararg:
            self.bad.append(
                f"line {ours.lineno}: {name}.{ours.name} does not take "
                f"{', '.join(sorted(missing))}, which {base}.{ours.name} takes"
            )

    # --- calls -------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        path = self.path(node.func)
        if path is None and isinstance(node.func, ast.Attribute):
            owner = self.kind(node.func.value)
            if owner and hasattr(find(owner), node.func.attr):
                path = f"{owner}.{node.func.attr}"
            path = METHODS.get(node.func.attr, path)
        if path is None or path.split(".")[0] not in LIBRARIES:
            return
        if not self._known(node, path):
            return
        found = find(path)
        if isinstance(found, type) and issubclass(found, BaseException):
            return  # exceptions take anything
        self.seen.append(path)
        self._check(node, path)

    def _keywords(self, node: ast.Call) -> list[str]:
        names: list[str] = []
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg is not None:
                names.append(keyword.arg)
                continue
            for part in _parts(value):
                if isinstance(part, ast.Name) and part.id in self.dicts:
                    part = self.dicts[part.id]
                if isinstance(part, ast.Dict):
                    keys = [k for k in part.keys if isinstance(k, ast.Constant)]
                    names += [key.value for key in keys]
        return names

    def _check(self, node: ast.Call, path: str) -> None:
        taken = shape(path)
        if taken is None:
            self.unknown.append(path)
            return
        fixed = sum(not isinstance(a, ast.Starred) for a in node.args)
        if fixed > taken.positions:
            self.bad.append(
                f"line {node.lineno}: {path} takes {taken.positions:.0f} positional "
                f"arguments, here are {fixed}"
            )
        for name in self._keywords(node):
            if name not in taken.keywords and not (taken.open and _passed(path, name)):
                self.bad.append(f"line {node.lineno}: {path} takes no argument {name}")


def _parts(node: ast.AST) -> list[ast.AST]:
    """`a | b | c` as its parts."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_parts(node.left), *_parts(node.right)]
    return [node]


def _home(path: str) -> str:
    """Our own functions by the module they are defined in, whoever hands them on."""
    found = find(path)
    if path.startswith("course_utils.") and callable(found):
        return f"{found.__module__}.{getattr(found, '__qualname__', '')}".rstrip(".")
    return path


def _passed(path: str, name: str) -> bool:
    """Whether a call with **kwargs takes this keyword, by one of the two lists."""
    for pattern, (names, _reason) in ALLOWED.items():
        if re.fullmatch(pattern, path) and name in names:
            return True
    if path not in FORWARDS:
        return path.startswith("course_utils.")  # ours look at what they are given
    for other in FORWARDS[path]:
        taken = shape(other)
        if name in taken.keywords or (taken.open and _passed(other, name)):
            return True
    return False


def read(code: str) -> _Reader:
    """Read a piece of code and return what was found: `.bad`, `.seen`, `.unknown`."""
    reader = _Reader()
    reader.visit(ast.parse(code))
    return reader


def complaints(code: str) -> list[str]:
    """Return one line for each call that does not fit what is installed."""
    return read(code).bad
