from qsim_study.blame.report import Blame as Blame
from qsim_study.blame.report import Cost as Cost
from qsim_study.blame.report import SiteBlame as SiteBlame
from qsim_study.blame.whole import blame as blame
