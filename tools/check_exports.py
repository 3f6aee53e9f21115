"""Hold exports of runs to what other programs make of them: transformers, lm-evaluation-harness, llama.cpp.

    python tools/check_exports.py runs/a runs/b --prompt "def main" --converter llama.cpp/convert_hf_to_gguf.py

Each run is exported with `moescale convert RUN OUT --to hf`. Then, for every prompt: the greedy tokens of transformers'
`generate`, and whether it stops by itself; log-likelihoods of lm-evaluation-harness, where it is installed; the greedy
tokens of llama.cpp, where llama_cpp is installed and its converter given. A line each; exit status 1 if one differs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch

from moescale.scoring import Scorer

CONTINUATIONS = (" a", " of the same", "\n", " äöü 🙂 ", "1 + 1 = 2")
TOLERANCE = 1e-3  # nats
KNOWN_PRE = """
import runpy, sys
_, converter, pre, *sys.argv[1:] = sys.argv
sys.path.insert(0, converter.rpartition("/")[0])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
runpy.run_path(converter, run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--tokens", type=int, default=30, help="greedy tokens that are compared")
    parser.add_argument("--most", type=int, default=1000, help="tokens after which nothing has stopped by itself")
    parser.add_argument("--converter", type=Path, help="convert_hf_to_gguf.py of llama.cpp")
    parser.add_argument("--pre", help="pre-tokenizer of a BPE tokenizer that llama.cpp does not know, e.g. gpt-2")
    arguments = parser.parse_args()
    prompts, failed = arguments.prompt or ["a", "The "], False
    for run in arguments.runs:
        with tempfile.TemporaryDirectory() as work:
            export = Path(work) / "export"
            subprocess.run([sys.executable, "-m", "moescale", "convert", str(run), str(export), "--to", "hf"],
                           check=True, stdout=subprocess.DEVNULL)
            scorer = Scorer(run)
            checks = [_transformers(scorer, export, prompts, arguments.tokens, arguments.most)]
            if importlib.util.find_spec("lm_eval"):
                checks.append(_lm_eval(scorer, export, prompts))
            if importlib.util.find_spec("llama_cpp") and arguments.converter:
                checks.append(_llama_cpp(scorer, export, prompts, arguments.tokens, arguments.converter,
                                         arguments.pre))
            for check in checks:
                for good, text in check:
                    print(f"{'ok    ' if good else 'FAULT '} {run}: {text}", flush=True)
                    failed |= not good
    sys.exit(int(failed))


def _greedy(scorer: Scorer, start: list[int], count: int) -> list[int]:
    """Return the likeliest tokens, one after another, whatever ends in between."""
    return scorer.model.generate([start], count, temperature=0)[0][0]


def _compare(program: str, prompt: str, ours: list[int], theirs: list[int]) -> tuple[bool, str]:
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    return equal == len(ours), f"{program}: {equal} of {len(ours)} greedy tokens after {prompt!r} equal ours"


def _transformers(
    scorer: Scorer, export: Path, prompts: list[str], num_tokens: int, most: int
) -> Iterator[tuple[bool, str]]:
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        same = ids == scorer.tokenizer.encode_published(prompt).tolist()
        yield same, f"transformers: {prompt!r} is {len(ids)} tokens" + ("" if same else f" {ids}, other than ours")
        start = ids if ids[:1] == [scorer.tokenizer.begin] else [scorer.tokenizer.begin, *ids]
        given, ends = torch.tensor([start]), model.generation_config.eos_token_id
        model.generation_config.eos_token_id = None
        found = model.generate(given, max_new_tokens=num_tokens, do_sample=False)[0, len(start) :].tolist()
        yield _compare("transformers", prompt, _greedy(scorer, start, num_tokens), found)
        model.generation_config.eos_token_id = ends
        found = model.generate(given, max_new_tokens=most, do_sample=False)[0, len(start) :].tolist()
        stopped = bool(found) and found[-1] in scorer.tokenizer.stops
        yield stopped, f"transformers: generate {'stops by itself' if stopped else 'goes on'} after {len(found)} tokens"


def _lm_eval(scorer: Scorer, export: Path, prompts: list[str]) -> Iterator[tuple[bool, str]]:
    models: Any = importlib.import_module("lm_eval.models.huggingface")
    instances: Any = importlib.import_module("lm_eval.api.instance")
    model = models.HFLM(pretrained=str(export), dtype="float32", device="cpu", batch_size=1)
    pairs = [(context, continuation) for context in ("", *prompts) for continuation in CONTINUATIONS]
    texts = [prompt + continuation * 20 for prompt in prompts for continuation in CONTINUATIONS]

    def request(kind: str, *arguments: str) -> Any:
        return instances.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    theirs = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    ours = [scorer.loglikelihood(*pair) for pair in pairs]
    worst = max(abs(one[0] - two[0]) for one, two in zip(ours, theirs, strict=True))
    greedy = sum(one[1] != two[1] for one, two in zip(ours, theirs, strict=True))
    yield worst < TOLERANCE and not greedy, (f"lm_eval: loglikelihood of {len(pairs)} pairs within {worst:.1e} nats, "
                                             f"{greedy} differ in being the likeliest")
    rolling = model.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
    worst = max(abs(scorer.loglikelihood_rolling(text) - value) for text, value in zip(texts, rolling, strict=True))
    yield worst < TOLERANCE, f"lm_eval: loglikelihood_rolling of {len(texts)} texts within {worst:.1e} nats"


def _llama_cpp(
    scorer: Scorer, export: Path, prompts: list[str], num_tokens: int, converter: Path, pre: str | None
) -> Iterator[tuple[bool, str]]:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    file = export.parent / "model.gguf"
    code = [str(converter)] if pre is None else ["-c", KNOWN_PRE, str(converter), pre]
    done = subprocess.run([sys.executable, *code, str(export), "--outtype", "f32", "--outfile", str(file)],
                          capture_output=True, text=True)
    if done.returncode:
        yield False, f"llama.cpp: its converter refuses: {' '.join(done.stderr.strip().splitlines()[-1:])}"
        return
    try:
        model = llama_cpp.Llama(str(file), n_ctx=scorer.context, verbose=False)
    except ValueError as error:
        yield False, f"llama.cpp: {error}"
        return
    for prompt in prompts:
        ids = model.tokenize(prompt.encode(), add_bos=False, special=False)
        own = scorer.tokenizer.encode_batch([prompt])[0].tolist()
        yield ids == own, f"llama.cpp: {prompt!r} is {len(ids)} tokens" + ("" if ids == own else f" {ids}, ours {own}")
        start = [scorer.tokenizer.begin, *own]
        ours = _greedy(scorer, start, num_tokens)
        yield _compare("llama.cpp", prompt, ours, list(islice(model.generate(start, temp=0.0, repeat_penalty=1.0),
                                                              len(ours))))


if __name__ == "__main__":
    main()
