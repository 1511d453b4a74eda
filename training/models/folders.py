"""Pretrained models by name: folders that the owner of a node put there.

A manifest comes from anybody, so it may name a model and never a path: a name is one folder's inside ``$SHOAL_MODELS``,
or inside ``models`` of the platform's folder for applications' data, which all profiles of a user share. What lies
there is the owner's; nothing is fetched, and nobody checks that two nodes hold the same under one name.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any, Final

import platformdirs

from shoal.protocol.errors import UsageError

VARIABLE: Final = "SHOAL_MODELS"
INSTALL: Final = "shoal[lm]"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def models_home() -> Path:
    """Where this user's models lie.

    Raises:
        UsageError: if there is no such place.
    """
    try:
        named = os.environ.get(VARIABLE) or f"{platformdirs.user_data_dir('shoal', appauthor=False)}/models"
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"this user has no home; set {VARIABLE} to the folder in which models lie") from error


def model_path(name: str) -> Path:
    """Where the model of this name lies, or would lie.

    Raises:
        UsageError: if that is no name.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"no model is called {name!r:.80}: a name is letters, digits, '.', '_' and '-', not a path; "
            f"put the folder, or a link to it, into {models_home()}"
        )
    return models_home() / name


def model_folder(name: str) -> Path:
    """The folder of the model of this name.

    Raises:
        UsageError: if that is no name, or nothing lies there.
    """
    folder = model_path(name)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"there is no model {name!r} in {folder.parent}: put its folder there, as transformers saves one, with "
            f"weights as safetensors, or set {VARIABLE} to where it is; SmolLM2 comes by "
            "python -m shoal.training.models.smollm2"
        )
    return folder


def library(module: str) -> Any:
    """A module that not everybody has.

    Raises:
        UsageError: if it, or what it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"a pretrained language model needs what is not installed ({reason}); pip install {INSTALL!r}"
        ) from error
