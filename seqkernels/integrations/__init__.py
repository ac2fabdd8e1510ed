"""seqkernels in other libraries; each is a module of its own, and importing it does it."""
