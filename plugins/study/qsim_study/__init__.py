"""Studies: many recipes on many models, compared with each other."""
