"""A model that is larger than memory: weights stay on disk, and are loaded module by module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

import qsim_core as qsim

RUN = """
import sys, threading, time
import qsim_core as qsim

def private():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while True:
        peaks.append(private())
        time.sleep(0.002)

directory, text, device = sys.argv[1:]
recipe = lambda model: qsim.Recipe.of({"model": model, "weights": "int4", "evaluate": "perplexity(seqlen=32)"})
qsim.evaluate(recipe("opt-tiny"), data=text)  # all that is imported and reserved once is there
before, peaks = private(), []
threading.Thread(target=watch, daemon=True).start()
qsim.evaluate(recipe(directory), data=text, device=device)
print(max(peaks) - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT whose checkpoint takes about 200 MB, with the tokenizer of the zoo's model."""
    from qsim_zoo import trained
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(trained("opt-tiny"))
    shape = {"hidden_size": 512, "ffn_dim": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
    config = OPTConfig(vocab_size=len(tokenizer), word_embed_proj_dim=512, max_position_embeddings=64, **shape)
    path = tmp_path_factory.mktemp("large")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text("some words to be predicted " * 40)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to know the memory in use")
@pytest.mark.parametrize(("device", "less"), [("cpu", False), ("disk", True)])
def test_weights_on_disk_take_less_than_half_a_checkpoint_of_memory(large: Path, device: str, less: bool) -> None:
    size = sum(shard.stat().st_size for shard in large.glob("*.safetensors"))
    run = [sys.executable, "-c", RUN, str(large), str(large / "text.txt"), device]

    # glibc keeps freed blocks of up to 32 MB for later unless told otherwise; a large model's matrices are larger
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}

    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)

    assert (int(done.stdout) < size / 2) == less, f"{done.stdout} of {size} bytes"


@pytest.mark.parametrize("device", ["auto", "disk"])
def test_where_weights_are_kept_changes_no_number(device: str) -> None:
    recipe = {"model": "opt-tiny", "weights": "int4", "activations": "int8", "evaluate": "perplexity(seqlen=32)"}
    run = qsim.Run(limit=2)

    here, elsewhere = (qsim.evaluate(qsim.Recipe.of(recipe), device=where, run=run) for where in ("cpu", device))

    assert elsewhere.simulated == here.simulated


def test_an_adapter_that_cannot_do_it_says_so() -> None:
    class Own(qsim.Adapter):
        name = "own"

        def load(self, model: str, dtype: torch.dtype) -> qsim.LoadedModel:
            return qsim.LoadedModel(torch.nn.Linear(2, 2))

    with pytest.raises(qsim.ModelError, match="^adapter own cannot put weights elsewhere; name a --device$"):
        Own().load_dispatched("model", torch.float32, "disk")


def test_the_command_line_says_nothing_but_qsims_own() -> None:
    run = [*forked.python(), "-m", "qsim_core", "evaluate", "--weights", "int4", "--limit", "1", "--device", "disk"]
    run += ["--set", "perplexity.seqlen=32"]

    done = subprocess.run(run, capture_output=True, text=True, check=True)

    assert "meta device" not in done.stderr
