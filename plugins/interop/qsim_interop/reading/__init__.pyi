from qsim_interop.reading.checkpoint import open_checkpoint as open_checkpoint
from qsim_interop.reading.findings import examine as examine
from qsim_interop.reading.packed_weight import Layer as Layer
from qsim_interop.reading.packed_weight import PackedWeight as PackedWeight
from qsim_interop.reading.reader import Reader as Reader
