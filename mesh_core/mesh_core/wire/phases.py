"""What a worker says that it does in a ``progress`` message: values of the format, not words for people."""

CHECKING = "checking weights"
LOADING = "loading"
