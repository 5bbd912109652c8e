"""Model names to local folders: a path is itself, `org/name` is downloaded once (extra `hub`). Weights come as safetensors only."""

import re
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from pathlib import Path

ALLOWED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*"]
"""What is fetched. Never *.bin, *.pt or *.pkl (pickles run code when opened) and never *.py."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself if there is such a folder, else the hub's `org/name` at `revision`."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{path} is a folder on this machine and has no revision {revision!r}; leave the revision out"
            )
        return path
    name = str(name_or_path)
    if path.exists():
        raise ValueError(f"{name} is a file; expected a model folder or a hub name such as org/name")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no folder {name}, and it is no hub name (org/name) either; check the spelling")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download  # the optional extra, imported in this file only
    except ImportError as error:
        raise ValueError(
            f"there is no folder {name}; to fetch it from the hub, install the extra: pip install 'qvl[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=ALLOWED))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} asks for consent on the hub first; accept its terms there and log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{name} has no revision {revision!r} on the hub; leave it out or name a branch, tag or commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no {name} that you may read, and there is no such folder here; check the spelling"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        if getattr(error, "errno", None) in (ENOSPC, EACCES, EROFS, EDQUOT):
            raise ValueError(
                f"{name} cannot be kept here ({error}); free space, or let HF_HOME name a folder that can be written"
            ) from error
        cause = type(error.__cause__ or error).__name__
        raise ValueError(
            f"cannot reach the hub for {name} ({cause}) and no copy is kept here; give a local folder instead"
        ) from error
