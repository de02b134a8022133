"""No module of the packages runs code that came as data, or reaches the network, but in the places named here.

Sources are read, so a name that is put together while it runs is not seen: that is a reviewer's affair.
"""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from tests.packaging.test_distribution import PACKAGE_FOLDERS

# Modules whose import alone is asked about, with everything in them: reading makes objects of any class, or runs code.
READERS_OF_CODE = (
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"),
    *("multiprocessing", "torch.multiprocessing", "torch.hub", "torch.package", "code", "codeop", "runpy"),
)
NETWORK = (
    *(
        "socket",
        "socketserver",
        "ssl",
        "http",
        "urllib",
        "urllib3",
        "requests",
        "httpx",
        "aiohttp",
        "websockets",
        "zmq",
    ),
    *("ftplib", "smtplib", "poplib", "imaplib", "telnetlib", "nntplib", "xmlrpc", "paramiko", "grpc"),
    *("huggingface_hub", "datasets", "fsspec", "openai", "pycurl"),
)
# These only take addresses apart, or are what is raised.
HARMLESS = ("urllib.parse", "huggingface_hub.errors")
USES = (
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.*", "torch.ops.load_library", "pandas.read_pickle"),
    *("yaml.load*", "yaml.full_load*", "yaml.unsafe_load*", "os.system", "os.popen", "os.exec*", "os.spawn*"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("asyncio.open_connection", "asyncio.start_server", "ctypes.CDLL", "ctypes.cdll.*", "ctypes.PyDLL"),
    "transformers.*.from_pretrained",
)
# Arguments, fields and keys that are False wherever they are given.
SWITCHES = ("trust_remote_code", "allow_pickle", "shell", "eval_str")
# A module by its name: one that is written there is judged as if it were imported.
BY_NAME = ("importlib.import_module", "importlib.util.spec_from_file_location")

# Reason, file, and names in it.
EXCEPTIONS = (
    (
        "the one download: a hub id that the user has given in the place of a directory; safetensors, JSON, tokenizer",
        "twotower_spec/checkpoint/index.py",
        ("huggingface_hub.snapshot_download",),
    ),
    (
        "the other one: a data set that the user has named, from the hub or from files",
        "twotower_spec/evaluation/datasets.py",
        ("datasets",),
    ),
    (
        "from a directory; a verifier's own Python only where vLLM was told to trust it",
        "twotower_spec/checkpoint/tokenizer.py",
        ("transformers.PreTrainedTokenizerFast.from_pretrained", "transformers.AutoTokenizer.from_pretrained"),
    ),
    ("see above: handed on to transformers", "twotower_spec/checkpoint/tokenizer.py", ("trust_remote_code",)),
    (
        "a verifier to learn from, from a directory, its own Python never",
        "twotower_spec/training/stages.py",
        ("transformers.AutoModelForCausalLM.from_pretrained",),
    ),
    ("likewise", "twotower_spec/training/workspace.py", ("transformers.AutoConfig.from_pretrained",)),
    ("training in processes that it starts itself", "twotower_spec/training/processes.py", ("multiprocessing",)),
    ("likewise, to end them", "twotower_spec/training/pipeline.py", ("multiprocessing",)),
    ("whether it is one of them", "twotower_spec/training/loop.py", ("multiprocessing.parent_process",)),
    ("whether it is one of them", "twotower_spec/training/sampling.py", ("multiprocessing.parent_process",)),
    ("modules of its own table", "twotower_kernels/compilation.py", ("importlib.import_module",)),
    ("modules of our own tables", "vllm_twotower/check_wheel.py", ("importlib.import_module",)),
    ("modules of the table of hooks, and vLLM", "vllm_twotower/compat.py", ("importlib.import_module",)),
    ("annotations in vLLM's own sources", "vllm_twotower/compat.py", ("eval_str",)),
    ("modules of the table of hooks", "vllm_twotower/routing.py", ("importlib.import_module",)),
    ("modules of the table of hooks", "vllm_twotower/model/registration.py", ("importlib.import_module",)),
    ("modules of the table of hooks", "vllm_twotower/v2/registration.py", ("importlib.import_module",)),
    (
        "orders to the process it has started, through a pipe that both have inherited",
        "twotower_bench/fork_server.py",
        (
            "importlib.import_module",
            "multiprocessing.Pipe",
            "multiprocessing.connection.Connection",
            "multiprocessing.reduction.recv_handle",
            "multiprocessing.reduction.send_handle",
        ),
    ),
    (
        "the same kind of pipe",
        "twotower_bench/connected_process.py",
        ("multiprocessing.Pipe", "multiprocessing.connection.Connection"),
    ),
    ("the same kind of pipe", "twotower_bench/engines/worker.py", ("multiprocessing.connection.Connection",)),
    ("the same kind of pipe", "twotower_bench/servers/load_worker.py", ("multiprocessing.connection.Connection",)),
    ("the same kind of pipe", "twotower_bench/faults/engine.py", ("multiprocessing.connection.Connection",)),
    ("lets vLLM fork what it spawns otherwise", "twotower_bench/servers/forked_server.py", ("multiprocessing",)),
    (
        "free ports and answers of the server that it has started, on 127.0.0.1",
        "twotower_bench/servers/server.py",
        ("socket", "urllib.request.ProxyHandler", "urllib.request.Request", "urllib.request.build_opener"),
    ),
    (
        "answers of the servers that it has started",
        "twotower_bench/soak/answers.py",
        ("openai.AsyncOpenAI", "openai.DefaultAsyncHttpxClient", "openai.OpenAIError"),
    ),
    (
        "answers of a server that it has started and will stop or kill",
        "twotower_bench/faults/servers.py",
        (
            "urllib.error.HTTPError",
            "urllib.request.ProxyHandler",
            "urllib.request.Request",
            "urllib.request.build_opener",
        ),
    ),
)


def suspects(source: str) -> set[str]:
    """Names of what a module does that the lists above ask about: dotted, as it was imported, or a switch."""
    tree = ast.parse(source)
    meaning: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                meaning[alias.asname or root] = alias.name if alias.asname else root
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")
    found = {name for name in found if is_asked_about(name)}
    for node in ast.walk(tree):
        is_read = isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load)
        if is_read and matches(name := dotted(node, meaning), USES):
            found.add(name)
        if isinstance(node, ast.Call) and dotted(node.func, meaning) in BY_NAME:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else dotted(node.func, meaning)
            found |= {name} if is_asked_about(name) or name in BY_NAME else set()
        found |= {name for name, value in settings(node) if name in SWITCHES and not is_false(value)}
    return found


def dotted(node: ast.AST, meaning: dict[str, str]) -> str:
    """The full name of a name or attribute; empty for what is neither."""
    if isinstance(node, ast.Name):
        return meaning.get(node.id, f"builtins.{node.id}")
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, meaning)
        return owner and f"{owner}.{node.attr}"
    return ""


def is_asked_about(name: str) -> bool:
    """Whether an imported name is a module of the lists, in one, or a function of the lists."""
    modules = (*READERS_OF_CODE, *NETWORK)
    is_listed = matches(name, [pattern for module in modules for pattern in (module, f"{module}.*")])
    return (is_listed or matches(name, USES)) and not matches(name, [f"{module}*" for module in HARMLESS])


def matches(name: str, patterns: "list[str] | tuple[str, ...]") -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def settings(node: ast.AST) -> Iterator[tuple[object, ast.expr | None]]:
    """Every name with its value that a node sets: arguments, defaults, keys, variables and fields."""
    match node:
        case ast.keyword():
            yield node.arg, node.value
        case ast.Dict():
            yield from ((getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True))
        case ast.Assign():
            yield from ((getattr(one, "attr", getattr(one, "id", None)), node.value) for one in node.targets)
        case ast.AnnAssign(value=ast.expr()):
            yield getattr(node.target, "attr", getattr(node.target, "id", None)), node.value
        case ast.arguments():
            positional = [*node.posonlyargs, *node.args][::-1]
            pairs = [*zip(positional, node.defaults[::-1], strict=False)]
            pairs += [(one, value) for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True) if value]
            yield from ((one.arg, value) for one, value in pairs)


def is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_what_may_run_code_or_reach_the_network_is_what_is_named_here() -> None:
    found = {
        (file.relative_to(folder.parent).as_posix(), name)
        for folder in PACKAGE_FOLDERS.values()
        for file in sorted(folder.rglob("*.py"))
        for name in suspects(file.read_text(encoding="utf-8"))
    }
    assert sorted(found) == sorted((file, name) for _, file, names in EXCEPTIONS for name in names)


@pytest.mark.parametrize("module", [*READERS_OF_CODE, *NETWORK])
@pytest.mark.parametrize(
    ("source", "found_as"),
    [
        ("import {}", "{}"),
        ("import {}.part as other", "{}.part"),
        ("def late():\n    from {} import name as other", "{}.name"),
        ("from importlib import import_module\nimport_module('{}')", "{}"),
    ],
)
def test_a_module_that_is_asked_about_is_found_however_it_is_imported(source: str, found_as: str, module: str) -> None:
    assert suspects(source.format(module)) == {found_as.format(module)}


@pytest.mark.parametrize("use", [use.replace("*", "x") for use in USES if not use.startswith("torch.hub")])
def test_a_function_that_is_asked_about_is_found_under_any_name(use: str) -> None:
    module, _, name = use.rpartition(".")
    root, _, rest = use.partition(".")
    sources = [
        f"import {root}\n{use}(given)",
        f"import {root} as other\nfunction = other.{rest}",
        f"from {module} import {name} as other\nother(given)",
        *([f"def late():\n    return {name}(given)"] if module == "builtins" else []),
    ]
    assert [suspects(source) for source in sources] == [{use}] * len(sources)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("value", ["True", "given", "1"])
@pytest.mark.parametrize(
    "source",
    [
        "call({switch}={value})",
        "call(**{{'{switch}': {value}}})",
        "options.{switch} = {value}",
        "{switch}: bool = {value}",
        "def call(path, {switch}={value}): ...",
        "def call(path, *, {switch}={value}): ...",
    ],
)
def test_a_switch_is_found_unless_it_is_false(source: str, value: str, switch: str) -> None:
    assert suspects(source.format(switch=switch, value=value)) == {switch}
    assert suspects(source.format(switch=switch, value="False")) == set()


def test_a_module_by_a_name_that_is_not_written_there_is_found() -> None:
    assert suspects("import importlib\nimportlib.import_module(settings['class'])") == {"importlib.import_module"}


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re, torch\nre.compile(text), torch.compile(model)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "from urllib.parse import urlsplit",
        "from huggingface_hub.errors import HfHubHTTPError",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['git', 'status'])",
        "from importlib import import_module\nimport_module('json')",
        "from .pickle import jar",
    ],
)
def test_what_only_looks_alike_is_not_found(source: str) -> None:
    assert suspects(source) == set()
