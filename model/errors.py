"""Every error that useg raises on purpose.

UsegError
├─ InputError             a request or argument that no retry can fix
│  ├─ ImageTooLarge
│  │  └─ TooManyPixels
│  ├─ InvalidImage
│  ├─ UnsupportedMediaType
│  │  └─ NotAcceptable
│  ├─ InvalidParameter
│  ├─ UrlInputUnsupported
│  ├─ HeadersTooLarge
│  ├─ ClusterNotFound
│  ├─ PreconditionFailed
│  ├─ Unauthorized
│  ├─ PermissionDenied
│  ├─ ModelNotFound
│  └─ RegistryConflict
├─ QueueFull              retry later
│  └─ RateLimited
├─ NotReady
│  └─ ShuttingDown
├─ DeadlineExceeded
├─ UploadTimeout
├─ ArtifactError          an artifact that is not loaded
│  ├─ ContractMismatch
│  ├─ ParityError
│  └─ SignatureError
├─ InferenceError
├─ InvalidCategoryNames
├─ DatasetError
├─ CheckpointError
├─ TrainingError
├─ RegistryError
└─ ConfigError
   └─ BackendUnavailable
"""


class UsegError(Exception):
    """Base class. The message is one line: what was given, what was expected and what to do."""


class InputError(UsegError):
    """Invalid input: the same request fails again."""


class ImageTooLarge(InputError):
    """An image or request body above its size limit."""


class TooManyPixels(ImageTooLarge):
    """An image whose header declares more pixels than the limit; nothing was decoded."""


class InvalidImage(InputError):
    """Bytes that are not a complete image in a supported format."""


class UnsupportedMediaType(InputError):
    """A request body in a media type that is not supported."""


class NotAcceptable(UnsupportedMediaType):
    """None of the media types in the client's Accept header is available."""


class InvalidParameter(InputError):
    """A parameter that is unknown, missing or out of range."""


class UrlInputUnsupported(InputError):
    """A URL in place of an image: the service does not download images."""


class HeadersTooLarge(InputError):
    """Request headers above the limit in number or size."""


class ClusterNotFound(InputError):
    """A cluster id that the model does not have."""


class PreconditionFailed(InputError):
    """An update of a revision that is no longer the latest."""


class Unauthorized(InputError):
    """A missing or unknown API key."""


class PermissionDenied(InputError):
    """A client that may not do what it requests."""


class ModelNotFound(InputError):
    """A model or model version that does not exist."""


class RegistryConflict(InputError):
    """A change that contradicts the state of the registry."""


class QueueFull(UsegError):
    """The request queue is full; `retry_after_s` is estimated from its length and recent inference times."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(QueueFull):
    """This client exceeded its rate limit."""


class NotReady(UsegError):
    """The model is still loading, or is being restarted."""


class ShuttingDown(NotReady):
    """The service finishes the requests it has and accepts no more."""


class DeadlineExceeded(UsegError):
    """The response cannot be ready before the request's deadline."""


class UploadTimeout(UsegError):
    """A client that pauses while it sends a request, or sends it too slowly."""


class ArtifactError(UsegError):
    """An artifact with a missing, changed or invalid file."""


class ContractMismatch(ArtifactError):
    """A contract with an unsupported format version or invalid content, or a network that differs from its contract."""


class ParityError(ArtifactError):
    """Two sessions that must agree gave different outputs for the same input."""


class SignatureError(ArtifactError):
    """An artifact without a signature by a trusted key."""


class InferenceError(UsegError):
    """A network that failed on an image, or returned values that are not finite."""


class InvalidCategoryNames(UsegError):
    """Names of clusters that cannot be read, written or applied; the stored names are unchanged."""


class DatasetError(UsegError):
    """A dataset, annotated or of pseudo-labels, that is missing, incomplete or inconsistent."""


class CheckpointError(UsegError):
    """Weights with missing, unexpected or wrongly shaped tensors; the message names them."""


class TrainingError(UsegError):
    """A training run that cannot continue, for example after a loss that is not finite."""


class RegistryError(UsegError):
    """A registry folder that cannot be read or written, or has unexpected content."""


class ConfigError(UsegError):
    """Options that are unknown, out of range or contradictory."""


class BackendUnavailable(ConfigError):
    """A backend that is not installed or not supported on this machine; the message says what to install."""
