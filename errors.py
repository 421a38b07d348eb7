"""The errors of the package. Each says where, what was found, what was expected and what to do.

No message holds frame content, a patient attribute or the path of an image.
"""

from __future__ import annotations


class Msa2NetError(Exception):
    """Base of all: `str(error)` is one line, "place: found, expected. What to do." """

    def __init__(self, place: object, found: str, expected: str = "", advice: str = "") -> None:
        self.place = str(place)
        self.found = found
        self.expected = expected
        self.advice = advice
        sentence = f"{place}: {found}" + (f", {expected}" if expected else "")
        whole = f"{sentence}. {advice}" if advice else sentence
        super().__init__(whole.replace("\n", " "))  # a runtime's own message, quoted in `found`, can have several lines

    def __reduce__(self) -> tuple[type[Msa2NetError], tuple[str, str, str, str]]:
        """The parts, not the whole sentence: an error of another process comes back pickled."""
        return type(self), (self.place, self.found, self.expected, self.advice)


class FrameError(Msa2NetError):
    """An image that cannot be segmented: dtype, shape, values, or a file that cannot be read."""


class CheckpointError(Msa2NetError):
    """A checkpoint that is damaged or belongs to another network."""


class BundleError(Msa2NetError):
    """A bundle that is damaged, changed, incomplete or of an unknown schema."""


class SignatureError(BundleError):
    """A bundle without the signature that is asked for: missing, of other files, or by another or a revoked key."""


class RuntimeUnavailableError(Msa2NetError):
    """A runtime, device, precision or number of threads that cannot run here, or a predictor that no longer can."""


class OutputError(Msa2NetError):
    """A runtime that failed, or logits not finite or not of the promised shape: no mask is made from them."""


class FaultError(OutputError):
    """A predictor whose stream has failed: it gives no mask until `Predictor.reset` has proven it again."""

    @classmethod
    def of(cls, error: Msa2NetError) -> FaultError:
        """The same words, without the traceback, which would keep images for as long as the fault is latched."""
        return cls(error.place, error.found, error.expected, error.advice)


class ExportError(Msa2NetError):
    """An export that was refused; unless it says otherwise, nothing has been written under the target's name."""


class DataError(Msa2NetError):
    """A data set whose layout or content is not as its kind promises."""


class KernelError(Msa2NetError, ValueError):
    """An argument that the gate's operator cannot take, or a kernel that cannot run here."""
