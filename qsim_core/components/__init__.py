"""Text to component and back, and the registry of plugins."""

from qsim_core.components.host import Host as Host
from qsim_core.components.host import installed as installed
