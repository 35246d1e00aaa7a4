"""Label budgets: which cases, slices or voxels are annotated, drawn by a seed, small ones within large ones."""
