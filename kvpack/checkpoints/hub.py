"""Models by name: a folder, or a repository of the Hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from kvpack.errors import InvalidOptionError

#: What `owner/name` of the Hub looks like.
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_RIGHT = "give the folder of a whole diffusers pipeline, or a Hub id, which is owner/name"


def model_folder(
    name: Path | str, what: str = "model", *, only: list[str] | None = None, without: list[str] | None = None
) -> Path:
    """Return the folder of a model; that of a Hub id is its snapshot in the local cache, fetched where it is not there.

    Args:
        name: folder, or Hub id as `from_pretrained` takes it.
        what: how an error calls it.
        only: patterns of the files that are needed; all if None.
        without: patterns of files that are not.

    Raises:
        InvalidOptionError: if there is no such folder and no such repository, or neither cache nor network has it.
    """
    if Path(name).is_dir():
        return Path(name)
    if not HUB_ID.fullmatch(str(name)):
        raise InvalidOptionError(f"no {what} folder {name}; {_RIGHT}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=only, ignore_patterns=without))
    except RepositoryNotFoundError as error:
        raise InvalidOptionError(f"no {what} folder {name}, and the Hub has no such repository; {_RIGHT}") from error
    except LocalEntryNotFoundError as error:
        raise InvalidOptionError(
            f"no {what} folder {name}, and the Hub's {name} is not in the local cache and cannot be fetched offline; "
            "fetch it once where there is a network, or give a folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InvalidOptionError(f"no {what} folder {name}, and the Hub does not give it: {error}; {_RIGHT}") from error
