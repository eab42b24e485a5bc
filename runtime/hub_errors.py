"""Our errors as those that callers of huggingface_hub catch."""

from __future__ import annotations

from weightcache.errors import OriginUnavailable, SourceDenied, SourceNotFound, UnknownBlob


def as_hub_error(error: Exception) -> Exception:
    """What huggingface_hub would have raised for it, with our words; ``error`` itself if it has nothing of the kind.

    SourceNotFound: RepositoryNotFoundError, or RevisionNotFoundError when the hub said so. SourceDenied:
    GatedRepoError. Nothing here and nobody to ask: LocalEntryNotFoundError.
    """
    from huggingface_hub import errors

    if isinstance(error, OriginUnavailable | UnknownBlob):
        return errors.LocalEntryNotFoundError(str(error))
    if isinstance(error, SourceNotFound):
        # The hub's own code for it, which the message ends with.
        revision = "RevisionNotFound" in str(error)
        return _http(errors.RevisionNotFoundError if revision else errors.RepositoryNotFoundError, error, 404)
    if isinstance(error, SourceDenied):
        unknown = "no such repository" in str(error)  # strangers are not told whether it is there
        return _http(
            errors.RepositoryNotFoundError if unknown else errors.GatedRepoError, error, 401 if unknown else 403
        )
    return error


def _http(kind: type, error: Exception, status: int) -> Exception:
    """An error of the kind that holds an answer of the hub: the daemon has had it, here is one of its shape."""
    from importlib import import_module

    from huggingface_hub.errors import HfHubHTTPError

    http = import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])  # httpx, or what has taken its place
    answer = http.Response(status, request=http.Request("GET", "https://huggingface.co"))
    made: Exception = kind(str(error), response=answer)
    return made
