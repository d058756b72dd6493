"""Call a real server with clients that people use: `make clients`.

The clients are installed into an environment of their own outside of the repository, so this needs
a network, and is no part of `make test`. With --record the results are written to docs/clients.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pictures import data_url, encode, quarters
from serving import FLAGS, KEY, ServerProcess

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
PIP_PACKAGES = ("langchain-openai", "llama-index-llms-openai-like")
NPM_PACKAGES = ("openai",)
HEAD = """\
# Clients that were tried

Each row is a call that a client made to a real `engine serve` with the demo checkpoint, with what
it saw: the checks are in [tests/clients](../tests/clients), and fail where a streamed answer isn't
the whole one, a count of tokens is wrong, or an error isn't the client's own class for its status.
The `openai` client for Python is part of every test of the server, in the version that
[constraints.txt](../constraints.txt) names.

To repeat them, with a network, Node and npm (they aren't part of `make test`):

```console
$ make clients ARGS=--record
```
"""


@dataclass(frozen=True, slots=True)
class Suite:
    """A client, how its checks are called, and the packages whose versions are told."""

    name: str
    command: Sequence[str]
    packages: Sequence[str]


def main() -> int:
    """Install, serve, check; returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--record", action="store_true", help="write docs/clients.md")
    options.add_argument("--folder", type=Path, help="keep the installed clients here")
    given = options.parse_args()
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        suites = install(folder)
        variables = stack.enter_context(servers())
        results = [(suite, versions(suite, folder), called(suite, variables)) for suite in suites]
    for suite, version, rows in results:
        for row in rows:
            verdict = "passed" if row["passed"] else "FAILED"
            sys.stdout.write(f"{verdict}  {suite.name} {version}: {row['called']}: {row['saw']}\n")
    if given.record:
        PAGE.write_text("\n".join([HEAD, *map(section, *zip(*results, strict=True))]), "utf-8")
    return 0 if all(row["passed"] for _, _, rows in results for row in rows) else 1


def install(folder: Path) -> list[Suite]:
    """Install the clients into `folder`, as new as they are."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", *PIP_PACKAGES]
    subprocess.run(pip, check=True)
    node = folder / "node"
    node.mkdir(exist_ok=True)
    npm = ["npm", "install", "--silent", "--prefix", str(node), *NPM_PACKAGES]
    subprocess.run(npm, check=True)
    script = node / "checks.mjs"  # Node looks for packages beside the file
    script.write_bytes((HERE / "node_checks.mjs").read_bytes())
    return [
        Suite(
            "LangChain",
            (str(python), str(HERE / "langchain_checks.py")),
            ("langchain-openai", "openai"),
        ),
        Suite(
            "LlamaIndex",
            (str(python), str(HERE / "llama_index_checks.py")),
            ("llama-index-llms-openai-like", "openai"),
        ),
        Suite("JavaScript", ("node", str(script)), ("npm:openai",)),
    ]


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Three servers with the demo, as environment variables for the checks."""
    kinds: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "SERVER": ((), {}),
        "TIGHT_SERVER": (("--max-queued-requests", "1"), {}),
        "KEYED_SERVER": ((), {"MM_ENGINE_API_KEY": KEY}),
    }
    with ExitStack() as stack:
        file = encode(quarters(96, 96))
        variables = {"PICTURE": data_url(file), "BROKEN_PICTURE": data_url(file[:-40])}
        for name, (flags, env) in kinds.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            started = ServerProcess(folder, *FLAGS, *flags, env=env, fresh=True)
            variables[name] = f"{stack.enter_context(started).url}/v1"
        yield variables


def called(suite: Suite, variables: dict[str, str]) -> list[dict[str, Any]]:
    """What each check says; a suite that ends early has failed."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        suite.command,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or not rows:
        rows.append({"called": "(all)", "saw": f"exit code {done.returncode}", "passed": False})
    return rows


def versions(suite: Suite, folder: Path) -> str:
    """The versions of a suite's packages."""
    told = []
    for package in suite.packages:
        if package.startswith("npm:"):
            name = package.removeprefix("npm:")
            manifest = folder / "node" / "node_modules" / name / "package.json"
            told.append(f"{name} {json.loads(manifest.read_text())['version']}")
        else:
            ask = f"from importlib.metadata import version; print(version({package!r}))"
            python = str(folder / "venv" / "bin" / "python")
            done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
            told.append(f"{package} {done.stdout.strip()}")
    return ", ".join(told)


def section(suite: Suite, version: str, rows: list[dict[str, Any]]) -> str:
    """A suite's part of the page."""
    lines = [f"## {suite.name}", "", version, "", "| called | result | seen |", "|---|---|---|"]
    for row in rows:
        seen = str(row["saw"]).replace("|", "\\|").replace("\n", " ")
        verdict = "passed" if row["passed"] else "**failed**"
        lines.append(f"| {row['called'].replace('|', chr(92) + '|')} | {verdict} | `{seen}` |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
