from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from qsim_core.testing import AdapterSuite


class TestGpt2(AdapterSuite):
    text = "gpt2"

    def checkpoint(self, folder: Path) -> Path:
        config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer = Tokenizer(models.BPE({chr(32 + n): n for n in range(64)}, []))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder)
        return folder
