"""Training under a simulated precision: `qsim finetune`, and a callback for transformers' own `Trainer`.

from qsim_finetune.finetuning import finetune
from qsim_finetune.trainer import SimulationCallback
"""
