"""Stage `solve`: the shared inverse-Hessian system."""
