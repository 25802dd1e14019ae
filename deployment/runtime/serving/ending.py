"""The last moments of a server: whoever is refused then waits until its connection has been told that it ends."""

from __future__ import annotations

import threading
import time

# Nobody is held for longer than any stop takes, whatever happens to it.
_LONGEST = 10.0


class Ending:
    """Holds refusals back while a server stops.

    gRPC answers a call that arrives while it stops with CANCELLED, which says nothing of the server. Who was refused
    would ask again at once, and meet just that. So in the end refusals are held: soon all who ask wait for one, nobody
    new comes, gRPC stops and tells the connections, and only then are they refused, with UNAVAILABLE.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holds = self._released = False
        self._last = 0.0

    def hold(self) -> None:
        """Hold refusals from now on."""
        with self._changed:
            self._holds, self._last = True, time.monotonic()

    def release(self) -> None:
        """Let all go who are held, and hold nobody any more."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Wait while refusals are held; called by whoever is about to refuse somebody."""
        with self._changed:
            if self._holds and not self._released:
                self._last = time.monotonic()
                self._changed.wait_for(lambda: self._released, _LONGEST)

    def quiet(self, window: float, longest: float) -> None:
        """Wait until nobody new has come for some seconds.

        Args:
            window: These seconds.
            longest: Most seconds to wait for them.
        """
        end = time.monotonic() + longest
        while True:
            with self._changed:
                still = self._last + window - time.monotonic()
            left = end - time.monotonic()
            if still <= 0 or left <= 0:
                return
            time.sleep(min(still, left))
