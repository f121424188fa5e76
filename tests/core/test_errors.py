"""What libraries raise becomes an error of ours."""

from __future__ import annotations

import pytest
from bcosify.core.errors import BcosifyError, CheckpointError, DataError, SourceError, first_line, translated


def test_only_the_errors_named_are_translated():
    with pytest.raises(SourceError, match="^x cannot be had: no file$") as caught:
        with translated((OSError, ValueError), SourceError, lambda error: f"x cannot be had: {error}"):
            raise FileNotFoundError("no file")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(KeyError), translated((OSError, ValueError), SourceError, str):
        raise KeyError("a")
    with translated(OSError, SourceError, str):
        pass


def test_our_own_errors_pass():
    with pytest.raises(DataError, match="ours"), translated(Exception, SourceError, lambda error: "theirs"):
        raise DataError("ours")
    with pytest.raises(CheckpointError, match="theirs"):
        with translated(Exception, CheckpointError, lambda error: "theirs", ours=CheckpointError):
            raise DataError("ours")


def test_the_last_of_several_has_the_first_word():
    def both(error: Exception) -> None:
        with (
            translated(OSError, SourceError, lambda e: "general"),
            translated(TimeoutError, DataError, lambda e: "late"),
        ):
            raise error

    with pytest.raises(SourceError, match="general"):
        both(OSError())
    with pytest.raises(DataError, match="late"):
        both(TimeoutError())


def test_a_secret_stays_out_of_the_traceback():
    with pytest.raises(BcosifyError) as caught:
        with translated(OSError, SourceError, lambda error: "hidden", chained=False):
            raise OSError("token")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("error", "count", "said"),
    [
        (ValueError("a\nb"), 1, "a"),
        (ValueError("\n  a \n\n b\nc"), 2, "a b"),
        (ValueError(), 1, "ValueError"),
        (ValueError(" \n"), 3, "ValueError"),
    ],
)
def test_the_first_line_of_an_error(error, count, said):
    assert first_line(error, count) == said
