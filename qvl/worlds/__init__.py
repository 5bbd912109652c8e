"""Synthetic worlds: pictures, clips and texts drawn from counted random numbers, with exact answers and known blind priors."""
