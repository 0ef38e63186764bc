"""Fair comparisons: several recipes at the same seeds, with intervals."""
