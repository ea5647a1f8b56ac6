"""Nothing in the lessons or the package runs what it has downloaded, or a shell.

`dangers(code)` reads code without running it. Each rule is first shown to find what it
is for, then applied to every lesson, module, test and script of the project.
"""

import ast
import json
import re

import notebook_rules as rules
import pytest
from test_house import project_files

from course_utils import models

# Modules whose loading runs code that the file brings along.
PICKLING = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
NETWORK = {"requests", "urllib", "httpx", "http", "ftplib", "aiohttp", "telnetlib"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
RUNS = {"subprocess.run", "subprocess.Popen", "subprocess.call"}
RUNS |= {"subprocess.check_call", "subprocess.check_output"}
PROMPTS = {"input", "getpass.getpass", "notebook_login", "login"}
PROMPTS |= {"huggingface_hub.login", "huggingface_hub.notebook_login"}


def dangers(code):
    """Return one line for each thing in a piece of code that must not be there."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        roots = {name.split(".")[0] for name in names}
        found += [f"line {node.lineno}: imports {n}" for n in roots & PICKLING]
        found += [f"line {node.lineno}: connects by {n}" for n in roots & NETWORK]
        if isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {why}" for why in call_dangers(node)]
    return found


def call_dangers(node):
    name = ast.unparse(node.func)
    given = {k.arg: k.value for k in node.keywords}

    def says(argument, *values):
        value = given.get(argument)
        return isinstance(value, ast.Constant) and value.value in values

    if "trust_remote_code" in given and not says("trust_remote_code", False):
        yield "trust_remote_code"
    if says("use_safetensors", False) or says("safe_serialization", False):
        yield "asks for pickled weights"
    if name.endswith("torch.load") and not says("weights_only", True):
        yield "torch.load without weights_only=True"
    if says("allow_pickle", True) or name.endswith("read_pickle"):
        yield "reads pickled arrays"
    if name in ("yaml.load", "yaml.unsafe_load") and "safe" not in ast.unparse(
        node
    ).lower().replace("unsafe", ""):
        yield "unsafe YAML"
    if name in ("eval", "exec"):
        yield f"{name} of a text"
    if name in SHELLS or says("shell", True):
        yield "a shell"
    if name in RUNS and node.args:
        first = node.args[0]
        if isinstance(first, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield "a command as one text, not as a list of words"
    if name in PROMPTS:
        yield f"asks the reader by {name}"
    for argument in ("token", "use_auth_token", "api_key", "password"):
        if isinstance(given.get(argument), ast.Constant) and given[argument].value:
            yield f"a {argument} in the code"


PLANTED = {
    "AutoModel.from_pretrained('x', trust_remote_code=True)": "trust_remote_code",
    "AutoModel.from_pretrained('x', trust_remote_code=flag)": "trust_remote_code",
    "AutoModel.from_pretrained('x', use_safetensors=False)": "pickled weights",
    "model.save_pretrained('x', safe_serialization=False)": "pickled weights",
    "torch.load('adapter.pt')": "weights_only",
    "torch.load('adapter.pt', weights_only=False)": "weights_only",
    "import pickle": "imports pickle",
    "from joblib import load": "imports joblib",
    "numpy.load('x.npy', allow_pickle=True)": "pickled arrays",
    "pandas.read_pickle('x')": "pickled arrays",
    "yaml.load(text)": "unsafe YAML",
    "yaml.unsafe_load(text)": "unsafe YAML",
    "eval(answer)": "eval of a text",
    "os.system(f'rm {name}')": "a shell",
    "subprocess.run(words, shell=True)": "a shell",
    "subprocess.run(f'git clone {name}')": "as one text",
    "subprocess.run('git clone ' + name)": "as one text",
    "requests_were_made = 1\nimport requests": "connects by requests",
    "from urllib.request import urlopen": "connects by urllib",
    "input('token?')": "asks the reader",
    "notebook_login()": "asks the reader",
    "model.push_to_hub('me/x', token='abc')": "a token in the code",
}
FINE = [
    "torch.load('x', weights_only=True)",
    "subprocess.run(['git', 'clone', name], check=True)",
    "yaml.safe_load(text)",
    "model.eval()",
    "AutoModel.from_pretrained('x', trust_remote_code=False)",
    "model.push_to_hub('me/x', token=None)",
]
# Where such a thing is what is tested, or runs our own words.
ALLOWED = {
    "tests/maintenance/test_setup_cell.py": "exec",  # the set-up cell, ours
    "maintenance/cells.py": "exec",  # cells of our lessons
    "tests/platforms/test_colab.py": "exec",  # the code that lesson 0 shows
    "tests/package/test_training.py": "eval",  # numbers of our own message
}


@pytest.mark.parametrize("code", PLANTED)
def test_each_danger_is_found(code):
    assert any(PLANTED[code] in line for line in dangers(code)), dangers(code)


@pytest.mark.parametrize("code", FINE)
def test_what_is_safe_is_let_be(code):
    assert dangers(code) == []


def python_of(path):
    """The Python of a file: a module, or the code cells and shown code of a lesson."""
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    if path.suffix != ".ipynb":
        return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [rules.source(c) for c in cells if c["cell_type"] == "code"]
    shown = "\n".join(rules.source(c) for c in cells if c["cell_type"] == "markdown")
    fences = re.findall(r"^```python\n(.*?)^```", shown, re.DOTALL | re.MULTILINE)
    return [rules.own_lines(text) for text in texts + fences]


def test_no_file_of_the_project_does_any_of_it():
    bad, read = [], 0
    for path in project_files():
        name = path.relative_to(rules.ROOT).as_posix()
        if name.startswith("tests/data/"):
            continue  # the canaries connect outward on purpose
        for code in python_of(path):
            read += 1
            for danger in dangers(code):
                if f"{ALLOWED.get(name)} of a text" not in danger:
                    bad.append(f"{name}: {danger}")
    assert not bad, "\n".join(bad)
    assert read > 150


def test_no_pickled_file_is_carried():
    names = [path.name for path in project_files()]
    pickled = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy")
    assert not [name for name in names if name.endswith(pickled)]


def test_each_model_that_is_downloaded_has_its_hash():
    bundles = [b for b in vars(models).values() if isinstance(b, models.Bundle)]
    assert {bundle.name for bundle in bundles} >= {"SmolLM2-135M-Instruct"}
    for bundle in bundles:
        assert re.fullmatch(r"[0-9a-f]{64}", bundle.sha256), bundle.name
