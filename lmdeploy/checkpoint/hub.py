"""From what the user wrote to a model folder: nothing (the embedded model), a path, or a hub id, which is downloaded.

Only weights, configs and tokenizers are fetched: code (`*.py`) would never be run and other formats never be read.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from lmdeploy.errors import CheckpointError
from lmdeploy.log import get_logger
from lmdeploy.spec import explain_not_a_model

EMBEDDED = "tiny-internlm2-chat"
WANTED = ("*.safetensors", "*.bin", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
#: config.json, and the likes of generation_config.json and quantize_config.json
CONFIGS = ("*config.json",)
UNWANTED = ("*.pth", "*.py", "*.gguf", "*.onnx", "original/*", "consolidated*", "training_args.bin", "optimizer.bin", "onnx/*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def resolve_model(path: str | Path | None, download_dir: str | None = None, revision: str | None = None, *, configs_only: bool = False) -> Path:
    """The folder of a model: the embedded one for None, an existing folder, or a download of the hub's `org/name`; of that only its configs where these are enough."""
    if path is None:
        return embedded_model()
    if not str(path).strip():
        raise CheckpointError(
            "the model's path is empty; give a folder or a hub id such as internlm/internlm2_5-1_8b-chat, or leave it out for the embedded model"
        )
    folder = Path(path).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise CheckpointError(explain_not_a_model(folder))
        return folder
    if isinstance(path, str) and _HUB_ID.fullmatch(path):
        return _download(path, download_dir, revision, configs_only)
    raise CheckpointError(f"{path}: there is no such folder, and it is no hub id (organisation/name)")


def embedded_model() -> Path:
    """The small chat model that comes with the package."""
    folder = Path(str(resources.files("lmdeploy") / "assets" / EMBEDDED))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: the embedded model is not installed; reinstall lmdeploy or give a model")
    return folder


def _download(name: str, download_dir: str | None, revision: str | None, configs_only: bool) -> Path:
    """Fetch a hub model, or take it from the hub's cache when the hub cannot be reached."""
    # Imported here: huggingface_hub takes 0.3 s and most starts do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    get_logger(__name__).info("%s is no folder; looking it up on the hub", name)
    place = f"{name}{f' at {revision}' if revision else ''}"
    wanted, unwanted = (list(CONFIGS), []) if configs_only else (list(WANTED), [*UNWANTED, *_second_copies(name, revision)])
    try:
        found = snapshot_download(name, revision=revision, cache_dir=download_dir, allow_patterns=wanted, ignore_patterns=unwanted)
    except GatedRepoError:
        raise CheckpointError(f"{place}: the hub asks for a licence agreement and a token (`hf auth login`)") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{place}: there is no such folder here and no such model on the hub (or it is private: `hf auth login`)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{place}: the hub's model has no such revision") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{place}: there is no such folder here, it is not in the hub's cache, and the hub cannot be reached; give a local folder"
        ) from None
    except Exception as error:  # network libraries below the hub raise many types; the user needs one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{place}: download from the hub failed ({type(error).__name__}: {reason[:200]}); try again or give a local folder") from None
    return Path(found)


def _second_copies(name: str, revision: str | None) -> list[str]:
    """`*.bin` when the hub has the same weights as safetensors, so that they are not downloaded twice.

    `model_info` and not `list_repo_files`: the latter tries again for 25 s, with a line on stderr each time, when there is no network.
    """
    from huggingface_hub import HfApi

    try:
        files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or ()]
    except Exception:  # not reachable, or refused: the download that follows says why
        return []
    return ["*.bin"] if any(file.endswith(".safetensors") for file in files) else []
