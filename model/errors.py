"""Every error useg raises on purpose.

UsegError
├─ InputError            the caller's fault
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
│  ├─ Forbidden
│  ├─ ModelNotFound
│  └─ RegistryConflict
├─ Busy                  the queue is full: come back later
│  └─ RateLimited        this caller asked too often
├─ NotReady              the service is not warm, or is being restarted
│  └─ Draining           it is going away
├─ DeadlineExceeded
├─ ArtifactError         refused at load
│  ├─ ContractMismatch
│  ├─ ParityError
│  └─ InvalidSignature
├─ InferenceError        a network that failed on a picture, or gave numbers that are none
├─ InvalidCategoryNames            names of clusters that cannot be read, kept or applied
├─ LabelStoreError       a label file that does not hold what it says
├─ CheckpointError       weights that do not fit the network they were given for
├─ TrainingError         a fit that cannot go on
├─ RegistryError         a registry's folder that does not hold what it should
└─ ConfigError           options that contradict each other or do not exist
   └─ BackendUnavailable a backend that this machine does not have
"""


class UsegError(Exception):
    """The message says what was given, what was expected and what to do, on one line."""


class InputError(UsegError):
    """The caller sent something that no retry will mend."""


class ImageTooLarge(InputError):
    """More bytes or pixels than the stated limit."""


class TooManyPixels(ImageTooLarge):
    """A header that promises more pixels than the stated limit; nothing was decoded."""


class InvalidImage(InputError):
    """Bytes that are not a whole picture in a format we read."""


class UnsupportedMediaType(InputError):
    """A request body or a wished answer in a media type we do not speak."""


class NotAcceptable(UnsupportedMediaType):
    """None of the media types that the caller accepts is one we answer in."""


class InvalidParameter(InputError):
    """A parameter outside its range, unknown or missing."""


class UrlInputUnsupported(InputError):
    """An address where a picture was expected: the service fetches nothing."""


class HeadersTooLarge(InputError):
    """More headers, or longer ones, than the stated limit."""


class ClusterNotFound(InputError):
    """A cluster that the model does not have."""


class PreconditionFailed(InputError):
    """A change to a revision that is no longer the last."""


class Unauthorized(InputError):
    """No API key, or one that is not known."""


class PermissionDenied(InputError):
    """A caller who is known, or need not be, and may not do this."""


class ModelNotFound(InputError):
    """A model, or a version of one, that there is not."""


class RegistryConflict(InputError):
    """A change that does not fit what the registry holds."""


class QueueFull(UsegError):
    """The bounded queue is full; `retry_after_s` is computed from its depth and recent service times."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(QueueFull):
    """This caller asked more often than it may; others are served."""


class NotReady(UsegError):
    """The model is still warming up, or is being restarted."""


class ShuttingDown(NotReady):
    """The service finishes what it has, and takes no more."""


class DeadlineExceeded(UsegError):
    """The answer would come after the caller's time limit."""


class ArtifactError(UsegError):
    """An artifact with a file missing, changed or wrong; nothing of it is loaded."""


class ContractMismatch(ArtifactError):
    """A contract of another version, or one that its network does not keep."""


class ParityError(ArtifactError):
    """The same input gave different answers where one answer is promised."""


class InvalidSignature(ArtifactError):
    """An artifact without a signature by one of the keys that are trusted."""


class InferenceError(UsegError):
    """A network that failed on a picture, or gave numbers that are none."""


class InvalidCategoryNames(UsegError):
    """Names of clusters that cannot be read, kept or applied; what was there is left as it was."""


class LabelStoreError(UsegError):
    """A label store that is missing, incomplete or inconsistent."""


class CheckpointError(UsegError):
    """Weights with missing, unexpected or misshapen tensors; the message names them."""


class TrainingError(UsegError):
    """A fit that cannot go on, such as a loss that is not finite."""


class RegistryError(UsegError):
    """A registry's folder that cannot be read or written, or holds something else."""


class ConfigError(UsegError):
    """Options that do not exist or contradict each other."""


class BackendUnavailable(ConfigError):
    """A backend that this machine, or what is installed on it, does not have; the message says what to install."""
