"""An interpreter whose forks run code as `python -c` does, behind the imports of what kvpack itself imports.

Neither kvpack nor diffusers is imported here unless the command line names them, and a fork ends as an interpreter
does. A line of standard input asks for one, a line of standard output is its status.
"""

import importlib
import json
import os
import sys

if __name__ == "__main__":
    import peft  # noqa: F401
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        if not (child := os.fork()):
            break
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201
    else:
        sys.exit()
    for number, path in enumerate([os.devnull, *asked["files"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.chdir(asked["folder"])
    sys.path[:0] = asked["path"]
    sys.argv = ["-c", *asked["words"]]
    exec(compile(asked["code"], "<string>", "exec"))
