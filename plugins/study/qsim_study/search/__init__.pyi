from qsim_study.search.found import Budget as Budget
from qsim_study.search.found import Found as Found
from qsim_study.search.searching import search as search
