def write_report(*a, **k): pass
def sample_grids(*a): return None
