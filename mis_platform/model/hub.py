"""Files from the Hugging Face hub, by way of its cache. Fails within seconds on a machine without network."""

from pathlib import Path

import huggingface_hub

PROBE_SECONDS = 5.0


def fetch(repository: str, name: str) -> Path:
    """The local path of file `name` of `repository`: from the hub's cache if it is there, else downloaded.

    Raises ConnectionError, in one line, when it can be had from neither.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=True))
    except FileNotFoundError:
        pass
    try:
        # The hub's client tries for half a minute to reach a hub that does not answer; one short question comes first.
        url = huggingface_hub.hf_hub_url(repository, name)
        huggingface_hub.get_session().head(url, timeout=PROBE_SECONDS)
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # offline, refused, timed out: the client and its HTTP library have many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(f"{repository} cannot be fetched from the Hugging Face hub: {reason}") from None
