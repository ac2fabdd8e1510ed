"""Writes a kernel repository of the Hugging Face Hub, which `kernels.get_local_kernel` loads.

    python hub/layout.py build/hub

    build/hub/
      build.toml                                  of this folder
      README.md                                   the card of the repository
      build/torch-stable-abi211-cpu-x86_64-linux/
        metadata.json                             name, version, backend, digests
        __init__.py                               the public names, and `layers`
        seqkernels/                               the package, with ops in a namespace of its own

The namespace, which is also the name under which `kernels` imports the module, contains a hash of the sources: two
versions load into one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools.compat.py310 import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"

INIT = '''"""Fused recurrent layers and other sequence kernels for PyTorch."""

from .seqkernels import *
from .seqkernels import __all__ as _names
from .seqkernels.integrations import kernels as layers

__all__ = [*_names, "layers"]
'''

CARD = """---
license: bsd-3-clause
library_name: kernels
tags: [kernels]
---
Fused recurrent layers (LSTM, GRU, RNN and variants), EmbeddingBag, attention and CRF for PyTorch on CPUs.

```python
from kernels import get_local_kernel

seqkernels = get_local_kernel("path of this folder")
lstm = seqkernels.nn.LSTM(64, 128, batch_first=True)
```

`layers` has the forward methods of torch.nn's {layers} for `kernelize`.
"""


def sources() -> list[Path]:
    folders = [path for name in ("csrc", "seqkernels") for path in sorted((ROOT / name).rglob("*"))]
    return [path for path in folders if path.suffix in (".h", ".cpp", ".py", ".pyi") or path.name == "py.typed"]


def identifier(name: str, backend: str) -> str:
    digest = hashlib.sha256()
    for path in sources():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"_{name}_{backend}_{digest.hexdigest()[:8]}"


def compile_module(namespace: str) -> Path:
    """Builds the target `hub` in the folder in which setup.py has built seqkernels._C."""
    scripts = Path(sysconfig.get_path("scripts"))
    cmake = shutil.which("cmake", path=str(scripts)) or shutil.which("cmake")
    if cmake is None:
        raise SystemExit("hub/layout.py: cmake not found: pip install cmake ninja")
    if not (BUILD / "build.ninja").exists():
        raise SystemExit("hub/layout.py: seqkernels is not built: python setup.py build_ext --inplace")
    for command in (
        [cmake, f"-DSEQKERNELS_HUB_NAMESPACE={namespace}", str(BUILD)],
        [cmake, "--build", str(BUILD), "--target", "hub"],
    ):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            raise SystemExit(f"{result.stdout}\nhub/layout.py: the build failed at: {' '.join(command)}")
    return BUILD / "hub" / "_C.abi3.so"


def variant_of(stable: str, backend: str) -> str:
    return f"torch-stable-abi{stable.replace('.', '')}-{backend}-{platform.machine()}-{platform.system().lower()}"


def digests_of(variant: Path) -> dict[str, str]:
    """The SHA-256 digests of the files of a variant, in base64."""
    files = (path for path in sorted(variant.rglob("*")) if path.is_file() and path.suffix != ".pyc")
    return {
        str(path.relative_to(variant)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
        if path.name != "metadata.json"
    }


def write(target: Path) -> Path:
    """Writes the repository and returns the folder of its variant."""
    configuration = tomllib.loads((HERE / "build.toml").read_text())
    general = configuration["general"]
    (backend,) = general["backends"]
    name, namespace = general["name"], identifier(general["name"], backend)
    variant = target / "build" / variant_of(configuration["torch"]["stable-abi"][backend], backend)
    if target.exists():
        if not (target / "build.toml").exists():
            raise SystemExit(f"hub/layout.py: {target} must be a folder that this script has written, or absent")
        shutil.rmtree(target)
    module = compile_module(namespace)
    package = variant / name
    for path in sources():
        if path.is_relative_to(ROOT / "seqkernels"):
            copy = package / path.relative_to(ROOT / "seqkernels")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    shutil.copy2(module, package / module.name)
    (variant / "__init__.py").write_text(INIT)
    metadata = {
        "name": name,
        "id": namespace,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests_of(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy2(HERE / "build.toml", target)
    layers = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Embedding", "EmbeddingBag"]
    (target / "README.md").write_text(CARD.format(layers=", ".join(layers)))
    return variant


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, nargs="?", default=ROOT / "build" / "hub", help="default: build/hub")
    print(write(parser.parse_args(arguments).target))


if __name__ == "__main__":
    sys.exit(main())
