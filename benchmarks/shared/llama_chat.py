"""What llama.cpp answers to questions, in the turns of a file's own chat template: run as a process of its own, so that
a build that dies takes nothing with it.

    python llama_chat.py FILE.gguf FOLDER     # FOLDER: of an unpacked xllamacpp

stdin: a JSON list of questions. stdout: one of greedy answers.
"""

from __future__ import annotations

import importlib
import json
import sys

CONTEXT, ANSWER_TOKENS = 1024, 128


def main() -> None:
    """Command line: see the top of this file."""
    sys.path.insert(0, sys.argv[2])
    llama = importlib.import_module("xllamacpp")  # from the folder: it is not installed
    given = llama.CommonParams()
    given.model.path = sys.argv[1]
    given.n_ctx, given.n_parallel, given.n_gpu_layers, given.verbosity = CONTEXT, 1, 0, -1
    given.use_jinja = True
    server = llama.Server(given)
    answers = []
    for question in json.load(sys.stdin):
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": ANSWER_TOKENS, "temperature": 0}
        found = server.handle_chat_completions(asked)
        answers.append(found["choices"][0]["message"]["content"])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
