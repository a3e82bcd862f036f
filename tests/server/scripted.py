"""A server whose model says the text of its last argument, whatever it is asked.

`python -m tests.server.scripted TEXT` serves it, for clients of another environment.
"""

import sys
import threading

from tests.server.fake_engine import ServerThread
from tests.server.tool_models import model

if __name__ == "__main__":
    server = ServerThread(model=model())
    server.engine.text = sys.argv[-1]
    print(f"serving a script at {server.url}/v1", flush=True)
    threading.Event().wait()
