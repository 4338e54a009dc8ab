"""Model repositories of a Hugging Face hub: which files make a model, and their download. No torch.

Only what is data is taken: safetensors, JSON, tokenizer files, the licence. Pickles and code stay where they are. A
token, where one is needed, is the library's business (HF_TOKEN, `hf auth login`); it is neither read nor printed here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Endings of what a model is loaded from."""
INDEX, CONFIG = "model_index.json", "config.json"
"""What the folder of a pipeline, and that of a single component, is known by."""
_PAPERS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8\w*|non_ema)[.-]")


class HubError(RuntimeError):
    """A repository cannot be fetched as asked; the message names it and the remedy."""


@dataclass(frozen=True)
class Snapshot:
    """The files of a model at one commit. prefix: folder in the repository that holds them, "" for all of it; files:
    name below the prefix -> size [bytes]; digests: of those that the hub keeps as large files, sha256 in hex."""

    repo: str
    commit: str
    prefix: str
    files: Mapping[str, int]
    digests: Mapping[str, str]


def find(repo: str, revision: str, subfolder: str | None = None) -> Snapshot:
    """What of `repo` at `revision` (branch, tag or commit) makes a model. Asks the hub, downloads model_index.json alone.

    Raises HubError: no such repository, revision or folder, no access, no weights as safetensors, or no network.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        api = HfApi()
        commit = api.repo_info(repo, revision=revision).sha
        assert commit is not None, "the hub names the commit of a revision"
        entries = api.list_repo_tree(repo, recursive=True, revision=commit)
        listed = {e.path: e for e in entries if isinstance(e, RepoFile) and e.path.startswith(prefix)}
        components = None
        if f"{prefix}{INDEX}" in listed:
            index = json.loads(Path(hf_hub_download(repo, f"{prefix}{INDEX}", revision=commit)).read_text())
            components = {name for name, value in index.items() if isinstance(value, list)}
    except Exception as error:  # those of the library's network client have no base that we could name
        raise explained(repo, revision, error) from error
    found = {path.removeprefix(prefix): entry for path, entry in listed.items()}
    files = {name: found[name].size for name in wanted(found, components)}
    if not any(name.endswith(".safetensors") for name in files):
        raise HubError(
            f"{repo}{'/' + prefix if prefix else ''} at {revision} has no weights as safetensors (pickles are never "
            f"loaded); check the repository, or name the folder of the model with --subfolder"
        )
    digests = {name: lfs.sha256 for name in files if (lfs := found[name].lfs) is not None}
    return Snapshot(repo, commit, prefix, files, digests)


def wanted(names: Iterable[str], components: set[str] | None) -> list[str]:
    """The files of a model among a repository's. components: folders of a pipeline; None where it is no pipeline.

    Of a pipeline's own weights those at its top, and copies in other precisions, are left out.
    """
    taken = []
    for name in sorted(names):
        path = PurePosixPath(name)
        below = path.parts[0] if len(path.parts) > 1 else None
        part = components is None or (below in components if below else path.suffix == ".json")
        data = path.suffix in MODEL_FILES and not _VARIANT.search(path.name)
        if (part and data) or name in _PAPERS:
            taken.append(name)
    return taken


def download(snapshot: Snapshot, names: Iterable[str], folder: Path) -> Path:
    """Fetch files of the snapshot below `folder`, with a progress bar; a second call goes on with what is missing.

    Returns the folder that corresponds to the snapshot's prefix. Raises HubError, also where a file came out short
    or is not what the hub lists.
    """
    names = list(names)
    try:
        snapshot_download(
            snapshot.repo,
            revision=snapshot.commit,
            local_dir=folder,
            # Names are patterns to the library: what a shell would expand is taken literally.
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", snapshot.prefix + name) for name in names],
        )
    except Exception as error:
        raise explained(snapshot.repo, snapshot.commit, error) from error
    root = folder / snapshot.prefix
    # The library returns a folder as it is where the hub has gone meanwhile.
    short = [
        name for name in names if not (root / name).is_file() or (root / name).stat().st_size != snapshot.files[name]
    ]
    if short:
        raise HubError(
            f"{len(short)} of {len(names)} files of {snapshot.repo} are not complete, first {short[0]}; the same command "
            "goes on"
        )
    other = [name for name in names if name in snapshot.digests and _sha256(root / name) != snapshot.digests[name]]
    if other:
        for name in other:
            (root / name).unlink()  # what is there is not fetched again
        raise HubError(
            f"{len(other)} of {len(names)} files of {snapshot.repo} are not what the hub lists (sha256), first {other[0]}; "
            "they are removed, and the same command fetches them again; if that does not help, check HF_ENDPOINT"
        )
    return root


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explained(repo: str, revision: str, error: Exception) -> HubError:
    """The error with what to do next."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, OfflineModeIsEnabled):
        remedy = "HF_HUB_OFFLINE is set; unset it on this machine"
    elif isinstance(error, GatedRepoError | RepositoryNotFoundError):
        remedy = "check the name; accept its licence on the hub, and set HF_TOKEN or log in with `hf auth login`"
    elif isinstance(error, HfHubHTTPError):
        remedy = "check name and revision; the same command goes on"
    else:
        remedy = "check network and disk; the same command goes on"
    return HubError(f"{repo} at {revision}: {type(error).__name__}: {first} ({remedy})")
