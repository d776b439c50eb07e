from typing import Any

from qsim_core.components.component import Component as Component
from qsim_core.components.component import Preset as Preset
from qsim_core.components.host import Host as Host
from qsim_core.components.host import parse as parse
from qsim_core.errors import CalibrationWarning as CalibrationWarning
from qsim_core.errors import DataError as DataError
from qsim_core.errors import ModelError as ModelError
from qsim_core.errors import PluginError as PluginError
from qsim_core.errors import QsimError as QsimError
from qsim_core.errors import RecipeError as RecipeError
from qsim_core.errors import SpecError as SpecError
from qsim_core.errors import TrainingError as TrainingError
from qsim_core.evaluation.adapter import Adapter as Adapter
from qsim_core.evaluation.adapter import LoadedModel as LoadedModel
from qsim_core.evaluation.adapter import NamedModel as NamedModel
from qsim_core.evaluation.bench import Bench as Bench
from qsim_core.evaluation.bench import evaluate as evaluate
from qsim_core.evaluation.data import Calibration as Calibration
from qsim_core.evaluation.data import Data as Data
from qsim_core.evaluation.evaluator import Evaluator as Evaluator
from qsim_core.evaluation.metrics import Metrics as Metrics
from qsim_core.evaluation.result import Result as Result
from qsim_core.formats.codes import Encoded as Encoded
from qsim_core.formats.codes import pack as pack
from qsim_core.formats.codes import unpack as unpack
from qsim_core.formats.format import Format as Format
from qsim_core.formats.quantizer import Quantizer as Quantizer
from qsim_core.hookspecs import hookimpl as hookimpl
from qsim_core.operations.functions import OperationCall as OperationCall
from qsim_core.operations.operation import Operation as Operation
from qsim_core.quantizers.calibrators import Calibrator as Calibrator
from qsim_core.quantizers.scheme import Scheme as Scheme
from qsim_core.quantizers.standard_schemes import Scaled as Scaled
from qsim_core.simulation.audit import Audit as Audit
from qsim_core.simulation.recipe import Override as Override
from qsim_core.simulation.recipe import Recipe as Recipe
from qsim_core.simulation.simulation import Simulation as Simulation
from qsim_core.simulation.simulation import simulate as simulate
from qsim_core.simulation.work import Cost as Cost
from qsim_core.simulation.work import Hardware as Hardware
from qsim_core.simulation.work import SiteWork as SiteWork
from qsim_core.sites.arithmetic import Accumulator as Accumulator
from qsim_core.sites.arithmetic import Arithmetic as Arithmetic
from qsim_core.sites.arithmetic import ExactArithmetic as ExactArithmetic
from qsim_core.sites.arithmetic import QuantizedRows as QuantizedRows
from qsim_core.transforms.context import Context as Context
from qsim_core.transforms.encoded_weights import EncodedWeight as EncodedWeight
from qsim_core.transforms.run import Run as Run
from qsim_core.transforms.transform import Transform as Transform

__version__: str

def __getattr__(name: str) -> Any: ...
