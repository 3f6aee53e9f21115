"""Plants one wrong formula after another in a copy of the project; a test must turn red for each.

    python tools/mutations.py [--only WORD] [--jobs 2]

Each row of FAULTS is a file of moescale/, what stands there, what is written instead, and the tests that must notice.
Prints a line a fault with the test that failed. Exits with 1 when a fault goes unnoticed, or when what a row replaces
is no longer there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parent.parent
PAPERS = "tests/papers/test_model.py tests/papers/test_weights.py tests/papers/test_golden.py"  # formulas by name first
DESCRIPTIONS = "tests/spec"
RECURRENCES = "tests/papers/test_mamba.py"
SEGMENTS = "tests/papers/test_segments.py"
SYSTEMS = "tests/ops/test_state_space.py"
LAYOUTS = "tests/parallel/test_layouts.py"


@dataclass(frozen=True)
class Fault:
    """One formula written wrongly. right: stands once in the file. tests: a path of the suite that must turn red."""

    file: str
    right: str
    wrong: str
    tests: str = PAPERS


FAULTS = (
    # layers
    Fault("layers/norm.py", "F.layer_norm(upcast, scale.shape, scale, None, self.eps)",
          "F.rms_norm(upcast, scale.shape, scale, self.eps)"),
    Fault("model/block.py", "scatter(mixed + y) if dense", "scatter(mixed + 2 * y) if dense"),
    Fault("model/build.py", "model.d_model**-0.5 if model.scale_logits", "model.d_model**-1.0 if model.scale_logits"),
    Fault("ops/head_losses.py", "(log_sum.square() * valid).sum()", "(3 * log_sum.square() * valid).sum()"),
    Fault("layers/feed_forward.py", '"geglu": "gelu"', '"geglu": "silu"'),
    Fault("layers/feed_forward.py", '"relu": "relu"}', '"relu": "gelu"}'),
    Fault("layers/positions.py", "theta ** (-2 * pair / head_dim)", "theta ** (-pair / head_dim)"),
    Fault("layers/positions.py", "2 ** (-8 * (index + 1) / power)", "2 ** (-8 * index / power)"),
    Fault("mixers/attention.py", "visibility=visibility,", "visibility=Visibility(),"),
    Fault("mixers/attention.py", "self._keys_and_values(x.detach(), angles)", "self._keys_and_values(x, angles)",
          SEGMENTS),  # gradients flow through the memory
    Fault("ops/attention_pattern.py", "% self.block_size + self.memory", "% self.block_size + self.memory - 1",
          SEGMENTS),
    # recurrences
    Fault("mixers/mamba.py", "apart(self.sequence.part(positions)) == 0", "apart(self.sequence.part(positions)) < 0",
          RECURRENCES),  # a state crosses a document
    Fault("mixers/mamba.py", "F.softplus(linear(step, matrix) + bias)",
          "F.softplus(linear(step, matrix) + bias).mean(-1, keepdim=True).expand(*step.shape[:2], len(d))",
          RECURRENCES),  # one step for all channels
    Fault("mixers/mamba.py", "-a_log.exp()", "a_log.exp().neg().exp().neg()", RECURRENCES),
    Fault("ops/ssd.py", "masked_fill((document > 0).unsqueeze(-1), -torch.inf)", "clone()",
          "tests/ops/test_scan.py"),
    Fault("mixers/mamba2.py", "(squares / size + self.eps)", "(squares / size).clamp(min=1)", RECURRENCES),
    Fault("ops/causal_conv.py", "positions < back", "positions < back - 1", RECURRENCES),
    Fault("spec/mamba.py", 'table="real_log_decay"), decays=False)', 'table="real_log_decay"))', RECURRENCES),
    Fault("comm/sequence_shards.py", "return run(self.first_states(last, passes, positions))", "return run(None)",
          "tests/comm"),  # a state is not handed on
    Fault("comm/sequence_shards.py", "state.masked_fill(begins, 0) + lasts", "state + lasts", "tests/comm"),
    Fault("ops/state_space.py", "slope = taken_in + torch", "slope = taken_in - torch", SYSTEMS),
    Fault("ops/convolution.py", "(above * response.conj())", "(above * response)", SYSTEMS),
    Fault("ops/s4.py", "(1 - eigenvalues / 2) * (1 - wrapped)", "(1 - eigenvalues / 2)", "tests/ops/test_s4.py"),
    # first values
    Fault("spec/weights.py", "math.sqrt(0.1 / fan_in)", "math.sqrt(1.0 / fan_in)"),
    Fault("spec/weights.py", 'Init("normal", fan_in**-0.5)', 'Init("normal", fan_in**-1.0)'),
    Fault("spec/model.py", '0.02 if model.init == "normal" else 1.0', "0.02"),
    Fault("model/initialize.py", "            tensor.log_()", "            pass", RECURRENCES),
    Fault("model/initialize.py", "-2 * init.std, 2 * init.std", "-3 * init.std, 3 * init.std"),
    # routers
    Fault("moe/routers/token_choice.py", "return expert, chosen.softmax(-1)",
          "return expert, probs.gather(-1, expert)"),
    Fault("moe/routers/token_choice.py", "return expert, weight / weight.sum(-1, keepdim=True)",
          "return expert, weight"),
    Fault("moe/routers/token_choice.py", "2 * weight[..., 1].detach() >", "weight[..., 1].detach() >"),
    Fault("moe/routers/token_choice.py", "return normalise(logits.sigmoid())", "return logits.softmax(-1)"),
    Fault("moe/routers/token_choice.py", "class SwitchRouter(Router):\n",
          "class SwitchRouter(Router):\n    drops_nothing = True\n"),
    Fault("moe/routers/base.py", "valid.sum(1).double() * self.top_k / self.num_experts",
          "valid.sum(1).double() / self.num_experts"),
    Fault("moe/routers/sequence_choice.py", "valid.sum(1).double() / self.num_experts",
          "valid.sum(1).double() * self.top_k / self.num_experts"),
    Fault("moe/losses.py", "return mass.shape[-1] * (share * mass).sum()", "return (share * mass).sum()"),
    Fault("moe/losses.py", "(torch.logsumexp(logits, -1).square() * valid)", "(torch.logsumexp(logits, -1) * valid)"),
    # optimizer and schedule
    Fault("optim/optimizer.py", "config.weight_decay * decays", "config.weight_decay"),
    Fault("optim/adamw.py", "betas=config.betas", "betas=config.betas[::-1]"),
    Fault("optim/adafactor.py", "SHARE_EXPONENT = -0.8", "SHARE_EXPONENT = -1.0"),
    Fault("optim/adafactor.py", "* self.lr**2)", "* self.lr)"),
    Fault("optim/adafactor.py", "range(int(experts), parameter.ndim)", "range(parameter.ndim)"),
    Fault("optim/adafactor.py", "mesh.size(axis) > 1)", "mesh.size(axis) > 2)",
          "tests/engine/test_resume.py"),
    Fault("optim/schedule.py", "(1 + math.cos(math.pi * done)) / 2", "(1 + math.cos(math.pi * done)) / 3"),
    Fault("optim/schedule.py", "(step + 1) / (config.warmup_steps + 1)", "step / (config.warmup_steps + 1)"),
    # descriptions that lie about their module
    Fault("spec/weights.py", 'Init("ones"), decays=False)', 'Init("ones"))'),
    Fault("spec/weights.py", 'return Init("normal", 0.02)', 'return Init("normal", 0.03)'),
    Fault("spec/attention.py", 'matrix("q", (q, d_model)', 'matrix("q", (kv, d_model)', DESCRIPTIONS),
    Fault("spec/attention.py", "products = 2 * sum", "products = 3 * sum", DESCRIPTIONS),
    Fault("spec/attention.py", "return 2 * batch * kept", "return batch * kept", "tests/model"),
    Fault("spec/attention.py", '"v", (kv, d_model), ("kv_heads", "d_model"), "kv_heads", init, unit=self.head_dim',
          '"v", (kv, d_model), ("kv_heads", "d_model"), "kv_heads", init', LAYOUTS),
    Fault("spec/attention.py", '("d_model", "heads"), "heads"', '("d_model", "heads"), "d_model"', LAYOUTS),
    Fault("spec/feed_forward.py", '("d_model", "d_ff"), "d_ff"', '("d_model", "d_ff"), "d_model"', LAYOUTS),
    Fault("spec/moe.py", 'init, "sparse")', 'init, "dense")', LAYOUTS),
    Fault("spec/moe.py", "decays=False, learns=False", "decays=False", DESCRIPTIONS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or text has this in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.file + fault.right + fault.tests]
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(arguments.jobs):
            trees.put(_copy(Path(folder) / str(job)))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            noticed = list(pool.map(lambda fault: _try(fault, trees), faults))
    print(f"{sum(noticed)} of {len(faults)} faults were noticed")
    sys.exit(not all(noticed))


def _copy(tree: Path) -> Path:
    """Copy what tests need, so that the checkout stays as it is."""
    for name in ("moescale", "tests", "configs", "docs", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copy(file, tree)
    return tree


def _try(fault: Fault, trees: SimpleQueue[Path]) -> bool:
    """Plant one fault, run its tests and take it out again. Returns whether a test turned red."""
    tree = trees.get()
    file = tree / "moescale" / fault.file
    text = file.read_text()
    try:
        if text.count(fault.right) != 1:
            print(f"STANDS {text.count(fault.right)} TIMES  {fault.file}: {fault.right!r}", flush=True)
            return False
        file.write_text(text.replace(fault.right, fault.wrong))
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *fault.tests.split()],
            cwd=tree, env=environment, capture_output=True, text=True)
        failed = re.findall(r"^FAILED (\S+)", ran.stdout, re.MULTILINE)
        print(f"{failed[0] if failed else 'NOT NOTICED'}  {fault.file}: {fault.wrong!r}", flush=True)
        return bool(failed)
    finally:
        file.write_text(text)
        trees.put(tree)


if __name__ == "__main__":
    main()
