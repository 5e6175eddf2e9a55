"""Questions to a cluster and its storage, time and again, some of which these may be too busy to answer."""

import time
from collections.abc import Callable
from typing import TypeVar

from mhmoe_ray.errors import ClusterError, StorageError, TokenError

T = TypeVar("T")
SECONDS = 60.0
"""Without any answer, after which it counts as gone."""


class Patience:
    """Of one who asks, over all of its questions."""

    def __init__(self, say: Callable[[str], object], *, for_ever: bool = False) -> None:
        """Args:
        say: takes a line on the first of several questions without an answer.
        for_ever: wait so, where to give up would end what is asked about.
        """
        self._say, self._for_ever = say, for_ever
        self._unanswered_since: float | None = None

    def ask(self, question: Callable[[], T], meanwhile: T) -> T:
        """The answer, or without one `meanwhile`.

        Raises:
            ClusterError, StorageError: there has been none for too long.
            TokenError: the cluster wants another token.
        """
        try:
            answer = question()
        except TokenError:
            raise
        except (ClusterError, OSError) as e:
            if self._unanswered_since is None:
                self._unanswered_since = time.monotonic()
                self._say(f"still following, but {e}")
            elif time.monotonic() - self._unanswered_since > SECONDS and not self._for_ever:
                if isinstance(e, OSError):
                    raise StorageError("storage", str(e), "mend it, then give the command again") from e
                raise
            return meanwhile
        self._unanswered_since = None
        return answer
