"""What tests share: builders, fakes, waits, and the seams to what qmpvcpu has no public name for.

A seam speaks in the words of the behaviour, takes and gives plain data or public classes of
qmpvcpu, and hides which modules answer: who rebuilds qmpvcpu's inside edits these modules, and no
test.
"""

import os

from tests.support import plain_client

if plain_client.PLAIN in os.environ:
    plain_client.use()
