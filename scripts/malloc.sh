# Sourced: glibc's malloc in huge pages, and what is freed stays with the process. On a CPU a step's
# memory is allocated anew in each call; given back to the system between calls, its pages must be
# had again, which took up to a third of a call's time on a virtual machine. A GPU's memory is another.
keep=17179869184  # bytes: no single allocation and no rest is that large
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=$keep:glibc.malloc.trim_threshold=$keep}"
