"""transformers' loading of weights and tokenizers, where whatever is wrong with the files is one line that says so."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def load_weights(directory: Path, **options: Any) -> Any:
    """The causal LM of a directory, in eval mode; `options` are those of transformers' from_pretrained.

    Raises ValueError for files that cannot be loaded, and for weights that are missing, which transformers would fill
    with random numbers.
    """
    name = options.get("gguf_file")
    where = f"--model: {directory / name if name else directory}"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights is the error below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except ImportError as error:
        install = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) and error.name else ""
        raise ValueError(f"{where}: {_quantization(directory)}{one_line(error)}{install}") from error
    except SafetensorError as error:
        broken = _broken_file(directory)
        raise ValueError(f"{broken or where}: cut short or damaged, get it again ({one_line(error)})") from error
    except Exception as error:  # transformers and the formats that it reads have no common one
        raise ValueError(f"{where}: cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{where}: expected all weights of {type(model).__name__}, got none for {', '.join(missing[:3])}{more}: "
            "the files are incomplete, or of a model that is no causal LM"
        )
    return model.eval()


def load_tokenizer(directory: Path, **options: Any) -> Any:
    """The tokenizer of a directory; `options` are those of transformers' from_pretrained. ValueError where it fails."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers and what it reads have no common one
        name = options.get("gguf_file")
        raise ValueError(
            f"--model: {directory / name if name else directory}: expected a tokenizer (tokenizer.json, or what it is "
            f"made of): tokenizer.save_pretrained puts it there ({one_line(error)})"
        ) from error


def one_line(error: Exception) -> str:
    """The error's words as one line, not without end."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else words[:297] + "..."


def _quantization(directory: Path) -> str:
    """Words about how the weights were quantized, as the config has it, if they were."""
    config = directory / "config.json"
    entry = json.loads(config.read_bytes()) if config.is_file() else {}
    method = (entry.get("quantization_config") or {}).get("quant_method")
    return f"quantized by {method}: " if method else ""


def _broken_file(directory: Path) -> Path | None:
    """The first file of weights that cannot be opened."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return None
